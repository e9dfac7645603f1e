// Derivative of linear_gelu.
#include <string_view>

#include "autograd/common.h"

namespace fastgpt {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

struct LinearGelu : torch::autograd::Function<LinearGelu> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, std::string_view approximate, bool save) {
    static const auto op =
        native_op<Two(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view, bool)>(
            "linear_gelu_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, h] = op.call(x, weight, bias, approximate, save);
    ctx->save_for_backward({x, weight, h});
    ctx->saved_data["approximate"] = std::string(approximate);
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->mark_non_differentiable({h});
    ctx->set_materialize_grads(false);  // no zeros for h
    return {y, h};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("linear_gelu");
    static const auto op = native_op<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                           std::string_view, bool, bool, bool)>("linear_gelu_backward");
    const auto saved = ctx->get_saved_variables();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const bool need_dx = ctx->needs_input_grad(0), need_dw = ctx->needs_input_grad(1);
    auto [dx, dw, db] = op.call(grads[0], saved[0], saved[1], saved[2],
                                ctx->saved_data["approximate"].toStringView(), has_bias, need_dx, need_dw);
    return {need_dx ? dx : Tensor(), need_dw ? dw : Tensor(), has_bias ? db : Tensor(), Tensor(), Tensor()};
  }
};

Two linear_gelu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                std::string_view approximate, bool save) {
  const auto out = LinearGelu::apply(x, weight, bias, approximate, save);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) { m.impl("linear_gelu_forward", &linear_gelu); }

}  // namespace fastgpt
