// What adamw_ asks of its tensors, on the CPU and on a GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

namespace fastgpt {

// Whether the elements fill one block of memory, in whatever order.
inline bool dense(const at::Tensor& tensor) { return tensor.is_non_overlapping_and_dense(); }

inline bool same_order(const at::Tensor& tensor, const at::Tensor& param) {
  return tensor.strides() == param.strides() || (tensor.is_contiguous() && param.is_contiguous());
}

// The gradient in the order of its parameter.
inline at::Tensor in_order(const at::Tensor& grad, const at::Tensor& param) {
  return same_order(grad, param) ? grad : at::empty_like(param, grad.options()).copy_(grad);
}

inline void check_order(at::TensorList params, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                        at::TensorList copies) {
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = params[i];
    const bool alike = same_order(exp_avgs[i], param) && same_order(exp_avg_sqs[i], param) &&
                       (copies.empty() || same_order(copies[i], param));
    TORCH_CHECK_VALUE(dense(param) && alike, "params[", i, "] has strides ", param.strides(),
                      ": it must fill one block of memory, and its moments and copy must have the same "
                      "strides");
  }
}

}  // namespace fastgpt
