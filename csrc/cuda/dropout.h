// Launchers of dropout_add; all tensors contiguous, of n elements. `seed` is one int64 on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

// The residual has the dtype of x, or fp32, as y then has too.
void dropout_add_forward(const void* x, DType x_dtype, const void* residual, void* y, DType y_dtype,
                         const int64_t* seed, double p, int64_t n, cudaStream_t stream);

// dy has the dtype of dx, or fp32.
void dropout_add_backward(const void* dy, DType dy_dtype, void* dx, DType dx_dtype, const int64_t* seed,
                          double p, int64_t n, cudaStream_t stream);

}  // namespace fastgpt::cuda
