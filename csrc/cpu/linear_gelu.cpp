// linear_gelu on CPU tensors: PyTorch's matrix products (oneDNN, MKL) around the loops of bias_gelu. The
// equations are in fastgpt/ops/gelu.py.
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "cpu/gelu.h"

namespace fastgpt {
namespace {

std::tuple<Tensor, Tensor> linear_gelu_forward(const Tensor& x, const Tensor& weight,
                                               const std::optional<Tensor>& bias,
                                               std::string_view approximate, bool save) {
  const PlainProducts guard;
  const Tensor h = at::linear(x, weight).contiguous();
  const Tensor y = save ? empty(h.sizes(), h.scalar_type()) : h;
  const bool write = save && bias.has_value();
  bias_gelu_into(h, plain(bias, at::kFloat), write ? h : Tensor(), y, approximate);
  return {y, save ? h : empty({0}, h.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward(const Tensor& dy, const Tensor& x,
                                                        const Tensor& weight, const Tensor& h,
                                                        std::string_view approximate, bool has_bias,
                                                        bool need_dx, bool need_dw) {
  const PlainProducts guard;
  const auto dtype = x.scalar_type();
  Tensor dh, db = empty({0}, dtype), dx = empty({0}, dtype), dw = empty({0}, dtype);
  if (has_bias)
    std::tie(dh, db) = bias_gelu_gradients(dy, h, std::nullopt, approximate, dtype, dtype);
  else
    dh = gelu_gradient(dy, h, approximate);
  const int64_t width = x.size(-1), rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const Tensor matrix = dh.view({rows, weight.size(0)});
  if (need_dx) dx = at::mm(matrix, weight).view(x.sizes());
  if (need_dw) dw = at::mm(matrix.t(), x.reshape({rows, width}));
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("linear_gelu_forward", &linear_gelu_forward);
  m.impl("linear_gelu_backward", &linear_gelu_backward);
}

}  // namespace fastgpt
