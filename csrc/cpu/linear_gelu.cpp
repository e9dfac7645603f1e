// linear_gelu on CPU tensors: the libraries' matrix products around the loops of bias_gelu. The
// equations are in fastgpt/ops/gelu.py.
#include <torch/library.h>

#include "cpu/gelu.h"
#include "cpu/product.h"

namespace fastgpt {
namespace {

std::tuple<Tensor, Tensor> linear_gelu_forward(const Tensor& x, const Tensor& weight,
                                               const std::optional<Tensor>& bias,
                                               std::string_view approximate, bool save) {
  const PlainProducts guard;
  const Tensor h = linear_product(x, weight);
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
  Tensor dh, db = empty({0}, dtype);
  if (has_bias)
    std::tie(dh, db) = bias_gelu_gradients(dy, h, std::nullopt, approximate, dtype, dtype);
  else
    dh = gelu_gradient(dy, h, approximate);
  auto [dx, dw] = product_gradients(as_matrix(dh), x, weight, need_dx, need_dw);
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("linear_gelu_forward", &linear_gelu_forward);
  m.impl("linear_gelu_backward", &linear_gelu_backward);
}

}  // namespace fastgpt
