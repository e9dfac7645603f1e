// The second stage of deterministic sums over rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

// out (width,) of `dtype` = the sum of the rows of partials (programs, width); zeros without any.
void sum_partials(const float* partials, void* out, DType dtype, int64_t programs, int64_t width,
                  cudaStream_t stream);

}  // namespace fastgpt::cuda
