// The launcher of linear_cross_entropy's backward pass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

// y (size elements) = x (n of them) * *dloss / *count, 0 from n on, and where *count is 0. Null: 1.
void scale(const void* x, DType x_dtype, const float* dloss, const float* count, void* y, DType y_dtype,
           int64_t n, int64_t size, cudaStream_t stream);

}  // namespace fastgpt::cuda
