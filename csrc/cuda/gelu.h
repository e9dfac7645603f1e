// Launches of gelu.cuh. Tensors are contiguous and of one dtype; `tanh` chooses the form.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

void gelu_forward(const void* x, void* y, DType dtype, bool tanh, int64_t n, cudaStream_t stream);
void gelu_backward(const void* dy, const void* x, void* dx, DType dtype, bool tanh, int64_t n,
                   cudaStream_t stream);

void bias_gelu_forward(const void* x, const void* bias, void* y, DType dtype, bool tanh, int64_t rows,
                       int64_t width, cudaStream_t stream);

// Rows of `partials` that bias_gelu_backward writes, on a chip with this many multiprocessors.
int64_t bias_gelu_partials(DType dtype, int64_t rows, int64_t width, int sm_count);

// `bias` may be null: x is then what the bias has been added to. `partials` (count, width) fp32 is scratch.
void bias_gelu_backward(const void* dy, const void* x, const void* bias, void* dx, void* db, float* partials,
                        int64_t count, DType dtype, bool tanh, int64_t rows, int64_t width,
                        cudaStream_t stream);

}  // namespace fastgpt::cuda
