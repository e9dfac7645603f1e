// AdamW over many tensors in one launch, and the norm of their gradients.
//
// For a tensor in group j at its step t, in fp32:
//
//     s  = clip / grad_scale,  clip = min(1, max_norm / (norm / grad_scale + 1e-6))
//     g  = s grad
//     m' = m + (1 - beta1) (g - m)
//     v' = beta2 v + (1 - beta2) g^2
//     p' = (1 - lr wd) p - lr / (1 - beta1^t) m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)
//
//     norm = sqrt(sum over all elements of grad^2)
//
// and nothing at all, not even t, where found_inf is not 0. beta^t is taken in fp64: 1 - beta2 = 0.001 at t =
// 1 would keep 16 bits of fp32's 24.
//
// Bytes an element: p, m, v read and written and grad read, 28 in fp32; with bf16 gradients and the bf16 copy
// of fp32 master weights 28 too (4 and 4 for p, 16 for m and v, 2 for grad, 2 for the copy). The norm reads
// grad.
//
// Launch: tensors are cut into chunks of 4096 elements, a block of 128 threads each, whatever tensor they are
// of; a thread has 8 neighbouring elements of each of 4 parts. Before it, a thread for each tensor computes
// what its elements share, in fp64, and counts the step: hyperparameters, steps, norm, scale and found_inf
// are read on the device, and the host never waits. The norm is a partial sum a chunk, then one block that
// adds those in fp64.
//
// Stochastic rounding: fp32 bits plus 16 random bits, cut to bf16, is the lower neighbour or the upper one
// with the probabilities that make the mean exact. One Philox of the block and the thread has those of 8
// elements.
#pragma once

#include "cuda/adamw.h"
#include "cuda/philox.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace fastgpt::cuda {

constexpr int kAdamwThreads = 128, kAdamwElements = 8;
constexpr int kAdamwPart = kAdamwThreads * kAdamwElements, kAdamwParts = kAdamwChunk / kAdamwPart;
constexpr int kPrepareThreads = 128;
constexpr int kRootThreads = 1024;

__global__ void __launch_bounds__(kPrepareThreads)
    adamw_prepare_kernel(const AdamwTensor* __restrict__ tensors,
                         AdamwCoefficients* __restrict__ coefficients, const double* __restrict__ hyper,
                         const float* __restrict__ grad_norm, const float* __restrict__ grad_scale,
                         const float* __restrict__ found_inf, float max_grad_norm, int64_t count) {
  const int64_t tensor = static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x;
  if (tensor >= count) return;
  float* const step = tensors[tensor].step;
  *step += found_inf == nullptr || *found_inf == 0.0f ? 1.0f : 0.0f;

  float scale = grad_scale == nullptr ? 1.0f : 1.0f / *grad_scale;
  if (grad_norm != nullptr) {
    const float clip = max_grad_norm / (*grad_norm * scale + 1e-6f);
    scale *= clip > 1.0f ? 1.0f : clip;  // a NaN stays
  }

  const double t = *step;
  const double* const group = hyper + tensors[tensor].group * 5;
  const double lr = group[0], beta1 = group[1], beta2 = group[2], eps = group[3], decay = group[4];
  AdamwCoefficients c;
  c.decay = static_cast<float>(1.0 - lr * decay);
  c.step_size = static_cast<float>(lr / (1.0 - exp(t * log(beta1))));
  c.root = static_cast<float>(sqrt(1.0 - exp(t * log(beta2))));
  c.weight1 = static_cast<float>(1.0 - beta1);
  c.beta2 = static_cast<float>(beta2);
  c.weight2 = static_cast<float>(1.0 - beta2);
  c.eps = static_cast<float>(eps);
  c.scale = scale;
  coefficients[tensor] = c;
}

// One element: p, m and v at the next step.
FASTGPT_DEVICE void adamw_element(float& p, float& m, float& v, float grad, const AdamwCoefficients& c) {
  const float g = grad * c.scale;
  m += (g - m) * c.weight1;
  v = v * c.beta2 + g * g * c.weight2;
  // Correctly rounded: the approximations would flush small v to 0, and memory is slower than these.
  const float denominator = sqrtf(v) / c.root + c.eps;
  p = p * c.decay - c.step_size * (m / denominator);
}

// The bf16 neighbours of p, as fp32: which one, 16 random bits decide.
FASTGPT_DEVICE float round_randomly(float p, uint32_t bits) {
  const float rounded = __uint_as_float((__float_as_uint(p) + bits) & 0xffff0000u);
  return p == p ? rounded : p;  // a NaN might wrap around
}

template <int N>
FASTGPT_DEVICE void load_as(float (&out)[N], const void* from, DType dtype, int64_t first, int left,
                            bool whole) {
  if (dtype == DType::kFloat)
    return load_floats(out, static_cast<const float*>(from) + first, 0, left, whole);
  if (dtype == DType::kHalf) return load_floats(out, static_cast<const half*>(from) + first, 0, left, whole);
  load_floats(out, static_cast<const bf16*>(from) + first, 0, left, whole);
}

template <int N>
FASTGPT_DEVICE void store_as(const float (&values)[N], void* to, DType dtype, int64_t first, int left,
                             bool whole) {
  if (dtype == DType::kFloat) return store_floats(values, static_cast<float*>(to) + first, 0, left, whole);
  if (dtype == DType::kHalf) return store_floats(values, static_cast<half*>(to) + first, 0, left, whole);
  store_floats(values, static_cast<bf16*>(to) + first, 0, left, whole);
}

// `seed` is read where kRandom, which is for P = bf16; `copy_dtype` counts where the table has copies.
template <typename P, bool kRandom>
__global__ void __launch_bounds__(kAdamwThreads)
    adamw_kernel(const AdamwTensor* __restrict__ tensors, const AdamwChunk* __restrict__ chunks,
                 const AdamwCoefficients* __restrict__ coefficients, const float* __restrict__ found_inf,
                 const int64_t* __restrict__ seed, DType grad_dtype, DType copy_dtype) {
  constexpr int kSize = kAdamwElements;
  if (found_inf != nullptr && *found_inf != 0.0f) return;
  const AdamwChunk chunk = chunks[blockIdx.x];
  const AdamwTensor tensor = tensors[chunk.tensor];
  const AdamwCoefficients c = coefficients[chunk.tensor];
  P* const param = static_cast<P*>(tensor.param);
#pragma unroll 1
  for (int part = 0; part < kAdamwParts; ++part) {
    const int place = part * kAdamwThreads + threadIdx.x;
    const int64_t first = chunk.index * kAdamwChunk + place * kSize;
    if (first >= tensor.numel) return;
    const int left = static_cast<int>(min(tensor.numel - first, static_cast<int64_t>(kSize)));
    const bool whole = tensor.aligned && left == kSize;
    float p[kSize], m[kSize], v[kSize], g[kSize];
    load_floats(m, tensor.exp_avg + first, 0, left, whole);
    load_floats(v, tensor.exp_avg_sq + first, 0, left, whole);
    load_floats(p, param + first, 0, left, whole);
    load_as(g, tensor.grad, grad_dtype, first, left, whole);
#pragma unroll
    for (int i = 0; i < kSize; ++i) adamw_element(p[i], m[i], v[i], g[i], c);
    store_floats(m, tensor.exp_avg + first, 0, left, whole);
    store_floats(v, tensor.exp_avg_sq + first, 0, left, whole);
    if constexpr (kRandom) {
      const Random random = philox(static_cast<uint64_t>(*seed), place, blockIdx.x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) p[i] = round_randomly(p[i], random.words[i / 2] >> i % 2 * 16 & 0xffff);
    }
    store_floats(p, param + first, 0, left, whole);
    if (tensor.copy != nullptr) store_as(p, tensor.copy, copy_dtype, first, left, whole);
  }
}

// partials[chunk] = the sum of its squares.
template <typename G>
__global__ void __launch_bounds__(kAdamwThreads)
    sum_squares_kernel(const AdamwTensor* __restrict__ tensors, const AdamwChunk* __restrict__ chunks,
                       float* __restrict__ partials) {
  constexpr int kSize = kAdamwElements;
  FASTGPT_SHARED(float, scratch, kWarpSize);
  const AdamwChunk chunk = chunks[blockIdx.x];
  const AdamwTensor tensor = tensors[chunk.tensor];
  const G* const grad = static_cast<const G*>(tensor.grad);
  float sum = 0.0f;
#pragma unroll
  for (int part = 0; part < kAdamwParts; ++part) {
    const int64_t first = chunk.index * kAdamwChunk + (part * kAdamwThreads + threadIdx.x) * kSize;
    const int64_t rest = tensor.numel - first;
    const int left = static_cast<int>(min(max(rest, int64_t{0}), static_cast<int64_t>(kSize)));
    float g[kSize];
    load_floats(g, grad + first, 0, left, tensor.aligned && left == kSize);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += g[i] * g[i];
  }
  sum = row_sum(sum, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// *out = sqrt(sum of partials), in fp64: there are thousands of them, of thousands of elements each.
__global__ void __launch_bounds__(kRootThreads)
    root_of_sum_kernel(const float* __restrict__ partials, float* __restrict__ out, int64_t count) {
  FASTGPT_SHARED(double, sums, kRootThreads / kWarpSize);
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kRootThreads) sum += partials[i];
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();  // the sums of all warps are there
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kRootThreads / kWarpSize; ++warp) sum += sums[warp];
  *out = static_cast<float>(sqrt(sum));
}

}  // namespace fastgpt::cuda
