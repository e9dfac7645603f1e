// What linear_cross_entropy needs besides ATen's products and cross_entropy.cuh: its backward pass.
//
//     y = x dloss / count      in the dtype of y, for the first N elements; 0 for the others
//
// Bytes: each element read and written once. Launch: 8 elements a thread, 16 bytes at a time.
#pragma once

#include "cuda/types.cuh"

namespace fastgpt::cuda {

constexpr int kScaleThreads = 256, kScaleElements = 8;

// x has n elements, y `size`, at least as many. `aligned`: x and y begin at multiples of 16 bytes.
template <typename T, typename U>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const T* x, const float* dloss, const float* count, U* y, int64_t n, int64_t size,
                 bool aligned) {
  constexpr int N = kScaleElements;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * N;
  if (at >= size) return;
  float factor = dloss != nullptr ? *dloss : 1.0f;
  if (count != nullptr) factor = *count > 0.0f ? factor / *count : 0.0f;  // x is 0 without rows, 0 / 0 is not
  const int there = n <= at ? 0 : n - at < N ? static_cast<int>(n - at) : N;
  const int wanted = size - at < N ? static_cast<int>(size - at) : N;
  float values[N] = {};
  if (there > 0) load_floats(values, x + at, 0, there, aligned && there == N);
#pragma unroll
  for (int i = 0; i < N; ++i)
    values[i] = i < there ? values[i] * factor : 0.0f;  // even where factor is not finite
  store_floats(values, y + at, 0, wanted, aligned && wanted == N);
}

}  // namespace fastgpt::cuda
