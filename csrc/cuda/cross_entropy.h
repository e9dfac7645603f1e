// Launchers of cross_entropy, which linear_cross_entropy uses too.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

// Rows of logits (rows, width), neighbouring columns side by side, of which the first `size` count.
struct CrossEntropyRows {
  const void* logits;
  const int64_t* targets;        // (rows,)
  const float* dloss = nullptr;  // one for every dloss_stride-th row; null: 1
  const float* count = nullptr;  // a number that the gradient is divided by; null: 1
  float* losses = nullptr;       // (rows,); null: not asked for
  void* dlogits = nullptr;       // (rows, width), may be `logits`; null: not asked for
  int64_t rows, width, size;
  int64_t logits_stride, dlogits_stride, dloss_stride = 0;  // elements from row to row
  int64_t ignore_index;
  double label_smoothing, z_loss;
  DType dtype;          // of logits and dlogits
  bool filled = false;  // dlogits holds the gradient for a dloss of 1: rows with that are left alone
};

void cross_entropy_rows(const CrossEntropyRows& rows, cudaStream_t stream);

// *count = how many targets are not ignored, in fp32 as the mean divides by it.
void count_rows(const int64_t* targets, float* count, int64_t rows, int64_t ignore_index,
                cudaStream_t stream);

// *loss = the sum of the losses, divided by *count where that is not null.
void sum_losses(const float* losses, const float* count, float* loss, int64_t rows, cudaStream_t stream);

}  // namespace fastgpt::cuda
