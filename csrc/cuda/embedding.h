// Launchers of embedding; all tensors contiguous, weights and y or dy of one dtype, rows of `width` elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

struct EmbeddingShape {
  int64_t batch, length, width;  // of y
  int64_t vocab_size, start;
  DType dtype;
};

void embedding_forward(const EmbeddingShape& shape, const int64_t* idx, const void* token_weight,
                       const void* position_weight, void* y, cudaStream_t stream);

// Rows of the partial sums that embedding_backward writes.
int64_t embedding_partials(const EmbeddingShape& shape);

// Adds nothing to dwt and dwp, which hold zeros: writes the rows of tokens and positions that occur.
// `tokens`, sorted, have batch * length elements, as has `order`, the place in dy of each; `partials` are
// scratch.
void embedding_backward(const EmbeddingShape& shape, const void* dy, const int* tokens, const int64_t* order,
                        void* dwt, void* dwp, float* partials, cudaStream_t stream);

}  // namespace fastgpt::cuda
