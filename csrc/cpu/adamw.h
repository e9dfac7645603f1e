// What the loops of AdamW need to know of a tensor.
#pragma once

#include <cstdint>

namespace fastgpt {

// Tensors are cut into chunks, which are shared out among threads. A chunk is also what random numbers are
// counted by, a quarter of it for each word of a counter.
constexpr int64_t kChunk = 4096;

enum class Type { kNone, kFloat, kBFloat16, kHalf };

struct AdamwTensor {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;
  Type param_type, grad_type, copy_type;  // kNone: there is no copy
  int64_t numel;
  // 1 - lr wd, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - beta1, beta2, 1 - beta2, eps, clip / grad_scale
  float decay, step_size, inverse_root, weight1, beta2, weight2, eps, scale;
};

struct NormTensor {
  const void* grad;
  Type type;
  int64_t numel;
};

}  // namespace fastgpt
