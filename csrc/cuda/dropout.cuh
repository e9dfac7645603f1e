// Dropout with the residual addition after it.
//
//     y  = z x + residual,  z = 0 with probability p, else 1 / (1 - p)
//     dx = z dy                                  (the gradient of residual is dy itself)
//
// z is not stored: it is a function of the seed and of the element's number, and backward computes it again.
// Philox with the seed as key gives four words for a counter. Element n is in block b = n div 4 Q; there,
// element k Q + j takes word k of counter (j, b), and z = 0 where the word is below p 2^32. These are the
// masks of kernels/dropout.py: a seed means the same on every chip, for every dtype, in both implementations.
//
// Bytes, e an element's: forward 3 N e (x, residual, y), backward 2 N e (dy, dx).
//
// Launch: a block of 128 threads per 4 Q elements. A thread holds 8 neighbouring places j of the four
// quarters, so it uses all four words of its eight counters, and accesses are 16 bytes.
#pragma once

#include "cuda/philox.cuh"
#include "cuda/types.cuh"

namespace fastgpt::cuda {

constexpr int kQuarter = 1024, kPlaces = 8;
constexpr int kDropoutThreads = kQuarter / kPlaces;

// Bit i of kept[k]: whether element k Q + j + i of this block stays.
FASTGPT_DEVICE void kept_bits(uint32_t (&kept)[4], uint64_t seed, int j, uint32_t threshold) {
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    const Random random = philox(seed, j + i, blockIdx.x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t bit = random.words[k] >= threshold ? 1u << i : 0;
      kept[k] = i == 0 ? bit : kept[k] | bit;
    }
  }
}

// y = z x, plus the residual if kAdd. `threshold` is p 2^32; `aligned`: tensors begin at multiples of 16
// bytes.
template <typename X, typename Y, bool kAdd>
__global__ void __launch_bounds__(kDropoutThreads)
    dropout_add_kernel(const X* __restrict__ x, const Y* __restrict__ residual, Y* __restrict__ y,
                       const int64_t* __restrict__ seed, uint32_t threshold, float scale, int64_t n,
                       bool aligned) {
  const int j = threadIdx.x * kPlaces;
  uint32_t kept[4];
  kept_bits(kept, static_cast<uint64_t>(*seed), j, threshold);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * 4 + k) * kQuarter + j;
    if (first >= n) return;
    const int left = static_cast<int>(min(n - first, static_cast<int64_t>(kPlaces)));
    const bool whole = aligned && left == kPlaces;
    float values[kPlaces], added[kPlaces];
    load_floats(values, x + first, 0, left, whole);
    if constexpr (kAdd) load_floats(added, residual + first, 0, left, whole);
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const float z = kept[k] >> i & 1 ? scale : 0.0f;  // a factor, which keeps a NaN that is dropped
      values[i] = kAdd ? fmaf(z, values[i], added[i]) : z * values[i];
    }
    store_floats(values, y + first, 0, left, whole);
  }
}

}  // namespace fastgpt::cuda
