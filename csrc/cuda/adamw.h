// Launchers of adamw_ and grad_norm. Tables of tensors, filled by the caller, lie on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

struct AdamwTensor {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  float* step;
  void* copy;  // or null
  int64_t numel;
  int32_t group;    // its row of hyper
  int32_t aligned;  // whether all of them but the step begin at multiples of 16 bytes
};

// Elements kChunk * index, ... of a tensor, for one block.
struct AdamwChunk {
  int32_t tensor, index;
};
constexpr int64_t kAdamwChunk = 4096;

// What the elements of a tensor share.
struct AdamwCoefficients {
  float decay, step_size, root, weight1, beta2, weight2, eps, scale;
};

struct AdamwTable {
  const AdamwTensor* tensors;
  const AdamwChunk* chunks;
  int64_t tensor_count, chunk_count;
};

struct AdamwStep {
  const double* hyper;                              // (groups, 5): lr, beta1, beta2, eps, weight decay
  const float *grad_norm, *grad_scale, *found_inf;  // each may be null
  float max_grad_norm;
  const int64_t* seed;  // null: parameters are rounded to nearest; otherwise they are bf16, rounded at random
  DType param_dtype, grad_dtype;
  std::optional<DType> copy_dtype;
};

// `coefficients` is scratch, one for each tensor.
void adamw(const AdamwTable& table, const AdamwStep& step, AdamwCoefficients* coefficients,
           cudaStream_t stream);

// Of the gradients of the table; `partials` is scratch, a float for each chunk.
void grad_norm(const AdamwTable& table, DType grad_dtype, float* partials, float* out, cudaStream_t stream);

}  // namespace fastgpt::cuda
