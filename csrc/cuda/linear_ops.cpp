// linear on CUDA tensors: PyTorch's products, whose epilogues add the bias. The equations are in
// fastgpt/ops/linear.py.
#include "cuda/tensors.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;

Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DeviceGuard guard(x);
  const PlainProducts plain;
  return at::linear(x, weight, bias).contiguous();
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   bool need_dx, bool need_dw, bool need_db) {
  const DeviceGuard guard(x);
  const PlainProducts plain;
  const Tensor g = as_matrix(dy);
  const auto absent = [&] { return at::empty({0}, x.options()); };  // one each: outputs share no memory
  return {need_dx ? at::mm(g, weight).view(x.sizes()) : absent(),
          need_dw ? at::mm(g.t(), as_matrix(x)) : absent(), need_db ? at::sum(g, 0) : absent()};
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("linear_forward", &linear_forward);
  m.impl("linear_backward", &linear_backward);
}

}  // namespace fastgpt::cuda
