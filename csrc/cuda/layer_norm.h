// Launchers of layer_norm, add_layer_norm and rms_norm; all tensors contiguous, rows of `width` elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

struct NormShape {
  int64_t rows, width;
  DType dtype;            // of x, residual, y, dy, dx
  DType parameter_dtype;  // of w and b
};

// y and the statistics; with `residual` of x + residual, which goes to `summed`. Null: residual and summed
// (none), b (none), mean (RMSNorm).
void norm_forward(const NormShape& shape, const void* x, const void* residual, const void* w, const void* b,
                  void* y, void* summed, float* mean, float* rstd, float eps, cudaStream_t stream);

// Rows of the partial sums that norm_backward writes.
int64_t norm_programs(const NormShape& shape, int sms);

// dx and partial sums of dw and db, (programs, width). Null: dsummed (none), mean (RMSNorm), db (not wanted).
void norm_backward(const NormShape& shape, const void* dy, const void* dsummed, const void* x, const void* w,
                   const float* mean, const float* rstd, void* dx, float* dw, float* db, int64_t programs,
                   cudaStream_t stream);

}  // namespace fastgpt::cuda
