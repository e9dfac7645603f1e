// GELU, and GELU with the bias addition before it.
//
//     h    = x + b                                         or x, without a bias
//     tanh form:  y = h s,  s = 1 / (1 + exp(-2 u)),  u = k (h + a h^3),  k = sqrt(2 / pi),  a = 0.044715
//     erf form:   y = h s,  s = (1 + erf(h / sqrt 2)) / 2
//
//     dx = dy (s + h s'),  db = sum_rows dx
//     tanh form:  s' = 2 k (1 + 3 a h^2) s (1 - s)
//     erf form:   s' = exp(-h^2 / 2) / sqrt(2 pi)
//
// (1 + tanh u) / 2 is the logistic function of 2 u: one exponential, which may overflow to infinity and then
// gives s = 0, and no cancellation where tanh u is near -1.
//
// Bytes, e an element's: forward 2 R C e (x, y), backward 3 R C e (x, dy, dx).
//
// Launch: without a bias a thread has 32 bytes of the tensor. With one, a warp is 32 pieces of 16 bytes of a
// row wide and a block 8 rows high. Forward goes through 4 rows a thread, so the bias is loaded once for 32
// rows; backward keeps its columns and goes through all rows with a stride, sums of db in registers, which
// the 8 warps add up through shared memory: a row of partial sums a block (partials.cuh).
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/types.cuh"

namespace fastgpt::cuda {

constexpr int kGeluThreads = 256;
template <typename T>
constexpr int kGeluElements = 2 * Vec<T>::kSize;  // of a thread

constexpr int kBiasWarps = 8;
constexpr int kBiasRows = 2;         // of a thread, forward
constexpr int kBiasBlocksPerSm = 4;  // backward: with 64 registers a thread, 32 KB in flight

// 2 u / ln 2, for exp2: three instructions, of which a multiply-add.
FASTGPT_DEVICE float twice_u(float h) {
  constexpr double k = 2 * 0.7978845608028654 * 1.4426950408889634;  // 2 sqrt(2 / pi) / ln 2
  return h * fmaf(h * h, static_cast<float>(k * 0.044715), static_cast<float>(k));
}

// s, by which gelu multiplies h.
template <bool kTanh>
FASTGPT_DEVICE float gelu_gate(float h) {
  if constexpr (kTanh) {
    return __fdividef(1.0f, 1.0f + ptx::exp2(-twice_u(h)));
  } else {
    return fmaf(0.5f, erff(h * 0.7071067811865476f), 0.5f);
  }
}

// dy times the derivative of gelu at h. Two products and a sum: the derivative is not rounded on its own.
template <bool kTanh>
FASTGPT_DEVICE float gelu_gradient(float dy, float h) {
  if constexpr (kTanh) {
    constexpr double k = 2 * 0.7978845608028654;  // 2 sqrt(2 / pi)
    const float u = twice_u(h);
    const float e = ptx::exp2(-fabsf(u));
    const float r = __fdividef(1.0f, 1.0f + e);
    const float s = u >= 0.0f ? r : e * r;
    // Beyond 20, e is 0, which h^2 = inf would spoil; a NaN stays one in s.
    const float near = fminf(fmaxf(h, -20.0f), 20.0f);
    const float du = near * fmaf(near * near, static_cast<float>(3 * 0.044715 * k), static_cast<float>(k));
    return fmaf(dy, s, dy * du * (e * r * r));  // s (1 - s) without 1 - s
  } else {
    const float slope = h * (ptx::exp2(h * h * -0.7213475204444817f) * 0.3989422804014327f);
    return fmaf(dy, gelu_gate<false>(h), dy * slope);
  }
}

// `aligned`: tensors begin at multiples of 16 bytes.
template <typename T, bool kTanh>
__global__ void __launch_bounds__(kGeluThreads)
    gelu_forward_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t n, bool aligned) {
  constexpr int kSize = kGeluElements<T>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kGeluThreads + threadIdx.x) * kSize;
  if (first >= n) return;
  const int left = static_cast<int>(min(n - first, static_cast<int64_t>(kSize)));
  const bool whole = aligned && left == kSize;
  float h[kSize];
  load_floats(h, x + first, 0, left, whole);
#pragma unroll
  for (int i = 0; i < kSize; ++i) h[i] *= gelu_gate<kTanh>(h[i]);
  store_floats(h, y + first, 0, left, whole);
}

template <typename T, bool kTanh>
__global__ void __launch_bounds__(kGeluThreads)
    gelu_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx, int64_t n,
                         bool aligned) {
  constexpr int kSize = kGeluElements<T>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kGeluThreads + threadIdx.x) * kSize;
  if (first >= n) return;
  const int left = static_cast<int>(min(n - first, static_cast<int64_t>(kSize)));
  const bool whole = aligned && left == kSize;
  float h[kSize], d[kSize];
  load_floats(h, x + first, 0, left, whole);
  load_floats(d, dy + first, 0, left, whole);
#pragma unroll
  for (int i = 0; i < kSize; ++i) d[i] = gelu_gradient<kTanh>(d[i], h[i]);
  store_floats(d, dx + first, 0, left, whole);
}

// A row has `tiles` tiles of 32 pieces. `aligned`: tensors and their rows begin at multiples of 16 bytes.
template <typename T, bool kTanh>
__global__ void __launch_bounds__(kWarpSize* kBiasWarps)
    bias_gelu_forward_kernel(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y,
                             int64_t rows, int width, unsigned tiles, bool aligned) {
  constexpr int kSize = Vec<T>::kSize;
  const int column = static_cast<int>(blockIdx.x % tiles * kWarpSize + threadIdx.x) * kSize;
  const int64_t first = static_cast<int64_t>(blockIdx.x / tiles) * (kBiasWarps * kBiasRows) + threadIdx.y;
  float h[kBiasRows][kSize], b[kSize];
  load_floats(b, bias, column, width, aligned);
#pragma unroll
  for (int k = 0; k < kBiasRows; ++k) {
    const int64_t row = first + k * kBiasWarps;
    if (row < rows) load_floats(h[k], x + row * width, column, width, aligned);
  }
#pragma unroll
  for (int k = 0; k < kBiasRows; ++k) {
    const int64_t row = first + k * kBiasWarps;
    if (row >= rows) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      h[k][i] += b[i];
      h[k][i] *= gelu_gate<kTanh>(h[k][i]);
    }
    store_floats(h[k], y + row * width, column, width, aligned);
  }
}

// `bias` may be null; `partials` (gridDim.y, width) gets the sums of each block's rows.
template <typename T, bool kTanh>
__global__ void __launch_bounds__(kWarpSize* kBiasWarps)
    bias_gelu_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ bias,
                              T* __restrict__ dx, float* __restrict__ partials, int64_t rows, int width,
                              bool aligned) {
  constexpr int kSize = Vec<T>::kSize;
  FASTGPT_SHARED(float, sums, kWarpSize * kBiasWarps * kSize);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int first_column = blockIdx.x * kWarpSize * kSize, column = first_column + lane * kSize;
  float b[kSize] = {}, db[kSize] = {};
  if (bias != nullptr) load_floats(b, bias, column, width, aligned);
  for (int64_t row = blockIdx.y * kBiasWarps + warp; row < rows; row += gridDim.y * kBiasWarps) {
    float h[kSize], d[kSize];
    load_floats(h, x + row * width, column, width, aligned);
    load_floats(d, dy + row * width, column, width, aligned);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      d[i] = gelu_gradient<kTanh>(d[i], h[i] + b[i]);
      db[i] += d[i];
    }
    store_floats(d, dx + row * width, column, width, aligned);
  }
  // Element i of lane l in place 32 i + l: neighbouring lanes, neighbouring banks.
#pragma unroll
  for (int i = 0; i < kSize; ++i) sums[(warp * kSize + i) * kWarpSize + lane] = db[i];
  __syncthreads();  // the sums of all warps are there
  const int place = warp * kWarpSize + lane,
            at = first_column + place % kWarpSize * kSize + place / kWarpSize;
  if (place >= kWarpSize * kSize || at >= width) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kBiasWarps; ++i) sum += sums[i * kWarpSize * kSize + place];
  partials[static_cast<int64_t>(blockIdx.y) * width + at] = sum;
}

}  // namespace fastgpt::cuda
