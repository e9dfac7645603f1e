// Sums over the threads of a warp and of a row, in an order that does not change.
#pragma once

#include "cuda/types.cuh"

namespace fastgpt::cuda {

// In all lanes.
FASTGPT_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
  return value;
}

// Each of K values over the blockDim.x threads of a row, in all of them: a warp, or the whole block, whose
// threads then all come here. `scratch` is shared memory for K * kWarpSize floats.
template <int K>
FASTGPT_DEVICE void row_sum(float (&values)[K], float* scratch) {
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = warp_sum(values[k]);
  if (blockDim.x == kWarpSize) return;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  __syncthreads();  // the sums before these have been read
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) scratch[k * kWarpSize + warp] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = warp_sum(lane < warps ? scratch[k * kWarpSize + lane] : 0.0f);
}

FASTGPT_DEVICE float row_sum(float value, float* scratch) {
  float values[1] = {value};
  row_sum(values, scratch);
  return values[0];
}

}  // namespace fastgpt::cuda
