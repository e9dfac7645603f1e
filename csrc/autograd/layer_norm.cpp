// Derivatives of layer_norm, add_layer_norm and rms_norm.
#include "autograd/common.h"

namespace fastgpt {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor if_bias(const Tensor& db, bool has_bias) { return has_bias ? db : Tensor(); }

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, double eps) {
    static const auto op =
        native_op<Three(const Tensor&, const Tensor&, const std::optional<Tensor>&, double)>(
            "layer_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, rstd] = op.call(x, weight, bias, eps);
    ctx->save_for_backward({x, weight, mean, rstd});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->mark_non_differentiable({mean, rstd});
    return {y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("layer_norm");
    static const auto op =
        native_op<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool)>(
            "layer_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    auto [dx, dw, db] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3], has_bias);
    return {dx, dw, if_bias(db, has_bias), Tensor()};
  }
};

struct AddLayerNorm : torch::autograd::Function<AddLayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual,
                               const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
    static const auto op =
        native_op<Four(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double)>(
            "add_layer_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, summed, mean, rstd] = op.call(x, residual, weight, bias, eps);
    ctx->save_for_backward({summed, weight, mean, rstd});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->mark_non_differentiable({mean, rstd});
    ctx->set_materialize_grads(false);  // an output that nothing uses costs no pass over zeros
    return {y, summed, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("add_layer_norm");
    static const auto op =
        native_op<Three(const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&, bool)>("add_layer_norm_backward");
    const Tensor &dy = grads[0], &dsummed = grads[1];
    if (!dy.defined()) return {dsummed, dsummed, Tensor(), Tensor(), Tensor()};  // only the sum was used
    const auto saved = ctx->get_saved_variables();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const auto other = dsummed.defined() ? std::optional(dsummed) : std::nullopt;
    auto [dx, dw, db] = op.call(dy, other, saved[0], saved[1], saved[2], saved[3], has_bias);
    return {dx, dx, dw, if_bias(db, has_bias), Tensor()};
  }
};

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    static const auto op = native_op<Two(const Tensor&, const Tensor&, double)>("rms_norm_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, rstd] = op.call(x, weight, eps);
    ctx->save_for_backward({x, weight, rstd});
    ctx->mark_non_differentiable({rstd});
    return {y, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("rms_norm");
    static const auto op =
        native_op<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("rms_norm_backward");
    const auto saved = ctx->get_saved_variables();
    auto [dx, dw] = op.call(grads[0], saved[0], saved[1], saved[2]);
    return {dx, dw, Tensor()};
  }
};

Three layer_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  const auto out = LayerNorm::apply(x, weight, bias, eps);
  return {out[0], out[1], out[2]};
}

Four add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                    const std::optional<Tensor>& bias, double eps) {
  const auto out = AddLayerNorm::apply(x, residual, weight, bias, eps);
  return {out[0], out[1], out[2], out[3]};
}

Two rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const auto out = RmsNorm::apply(x, weight, eps);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) {
  m.impl("layer_norm_forward", &layer_norm);
  m.impl("add_layer_norm_forward", &add_layer_norm);
  m.impl("rms_norm_forward", &rms_norm);
}

}  // namespace fastgpt
