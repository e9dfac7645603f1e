// The second stage of sums over rows: partial sums, one per program, added in a fixed order.
//
//     out_c = sum_p partial_pc            partials (P, C) fp32 -> out (C,)
//
// Bytes: 4 P C read, mostly from L2, where the first stage has just written them.
// Launch: a block per 32 columns (a 128-byte line), 8 warps that take every eighth program.
#pragma once

#include "cuda/types.cuh"

namespace fastgpt::cuda {

constexpr int kPartialWarps = 8;

template <typename T>
__global__ void __launch_bounds__(kWarpSize* kPartialWarps)
    sum_partials_kernel(const float* partials, T* out, int64_t programs, int64_t width) {
  FASTGPT_SHARED(float, sums, kPartialWarps* kWarpSize);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  float sum = 0.0f;
  if (column < width) {
    for (int64_t p = warp; p < programs; p += kPartialWarps) sum += partials[p * width + column];
  }
  sums[warp * kWarpSize + lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= width) return;
#pragma unroll
  for (int i = 1; i < kPartialWarps; ++i) sum += sums[i * kWarpSize + lane];
  out[column] = from_float<T>(sum);
}

}  // namespace fastgpt::cuda
