// Derivative of linear.
#include "autograd/common.h"

namespace fastgpt {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
    static const auto op =
        native_op<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&)>("linear_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["has_bias"] = bias.has_value();
    return op.call(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("linear");
    static const auto op =
        native_op<Three(const Tensor&, const Tensor&, const Tensor&, bool, bool, bool)>("linear_backward");
    const auto saved = ctx->get_saved_variables();
    const bool need_dx = ctx->needs_input_grad(0), need_dw = ctx->needs_input_grad(1),
               need_db = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
    auto [dx, dw, db] = op.call(grads[0], saved[0], saved[1], need_dx, need_dw, need_db);
    return {need_dx ? dx : Tensor(), need_dw ? dw : Tensor(), need_db ? db : Tensor()};
  }
};

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return Linear::apply(x, weight, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) { m.impl("linear_forward", &linear); }

}  // namespace fastgpt
