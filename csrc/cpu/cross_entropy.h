// What cross_entropy and linear_cross_entropy share on the CPU.
#pragma once

#include <string_view>
#include <tuple>

#include "cpu/common.h"

namespace fastgpt {

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss;
  int64_t vocab_size;
};

// Rows of logits for the loops; what is not asked for, or not given, is null.
template <typename T>
struct LossRows {
  const T* logits;
  const int64_t* targets;
  const float* dloss;
  float* losses;
  T* dlogits;  // may be `logits`
  int64_t logits_stride, dloss_stride, dlogits_stride;
  int64_t width, size, ignore_index;  // columns, and how many of them count
  float label_smoothing, z_loss;
  float count;  // which the gradient is divided by
  bool filled;  // dlogits already holds the gradient for a dloss of 1
};

// Of the targets, how many are not ignored. IndexError for one that is out of range.
int64_t count_rows(const Tensor& targets, const LossOptions& options);

// Losses and gradients of the logits (rows, V), neighbouring columns side by side: `losses` (rows,) and
// `dlogits` (rows, V) may be undefined. `dloss` is one number, one for each row, or 1 where absent.
void loss_rows(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& dloss, float count,
               const Tensor& losses, const Tensor& dlogits, bool filled, const LossOptions& options);

// (loss, count): what forward returns for the losses of the rows.
std::tuple<Tensor, Tensor> reduce(const Tensor& losses, int64_t counted, std::string_view reduction);

}  // namespace fastgpt
