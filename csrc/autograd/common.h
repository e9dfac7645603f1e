// What the derivatives share. Each calls the operators through PyTorch's dispatcher, so that one derivative
// serves CPU and CUDA tensors and `torch.compile` sees the operators; none looks at sizes or values.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

namespace fastgpt {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operator fastgpt_native::<name>, whose C++ signature is `Signature`. Keep it in a static variable.
template <typename Signature>
c10::TypedOperatorHandle<Signature> native_op(const std::string& name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(("fastgpt_native::" + name).c_str(), "")
      .typed<Signature>();
}

// Kernels have no second derivative; gradients are recorded in a backward pass under create_graph=True alone.
inline void refuse_second_derivative(const char* operation) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), operation,
                              " has no second derivative in its kernels: use backend='eager' where "
                              "create_graph=True is needed");
}

}  // namespace fastgpt
