// layer_norm, add_layer_norm and rms_norm are one forward and one backward pass, with parts left out.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace fastgpt {

struct NormForward {
  at::Tensor y, summed, mean, rstd;  // `summed` and `mean` are undefined where they are not asked for
};

// forward(x, residual, weight, bias, eps, centred) -> NormForward
// backward(dy, dsummed, x, weight, mean, rstd, has_bias) -> (dx, dw, db)
template <auto forward, auto backward>
void implement_norms(torch::Library& m) {
  using at::Tensor;
  using Maybe = std::optional<Tensor>;
  m.impl(
      "layer_norm_forward", +[](const Tensor& x, const Tensor& weight, const Maybe& bias, double eps) {
        const NormForward out = forward(x, std::nullopt, weight, bias, eps, true);
        return std::make_tuple(out.y, out.mean, out.rstd);
      });
  m.impl(
      "layer_norm_backward",
      +[](const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
          bool has_bias) { return backward(dy, std::nullopt, x, weight, mean, rstd, has_bias); });
  m.impl(
      "add_layer_norm_forward",
      +[](const Tensor& x, const Tensor& residual, const Tensor& weight, const Maybe& bias, double eps) {
        const NormForward out = forward(x, residual, weight, bias, eps, true);
        return std::make_tuple(out.y, out.summed, out.mean, out.rstd);
      });
  m.impl(
      "add_layer_norm_backward",
      +[](const Tensor& dy, const Maybe& dsummed, const Tensor& summed, const Tensor& weight,
          const Tensor& mean, const Tensor& rstd,
          bool has_bias) { return backward(dy, dsummed, summed, weight, mean, rstd, has_bias); });
  m.impl(
      "rms_norm_forward", +[](const Tensor& x, const Tensor& weight, double eps) {
        const NormForward out = forward(x, std::nullopt, weight, std::nullopt, eps, false);
        return std::make_tuple(out.y, out.rstd);
      });
  m.impl(
      "rms_norm_backward", +[](const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
        const auto [dx, dw, db] = backward(dy, std::nullopt, x, weight, std::nullopt, rstd, false);
        return std::make_tuple(dx, dw);
      });
}

}  // namespace fastgpt
