// Derivative of dropout_add.
#include "autograd/common.h"

namespace fastgpt {
namespace {

struct DropoutAdd : torch::autograd::Function<DropoutAdd> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual, const Tensor& seed,
                        double p) {
    static const auto op =
        native_op<Tensor(const Tensor&, const Tensor&, const Tensor&, double)>("dropout_add_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({seed});
    ctx->saved_data["p"] = p;
    ctx->saved_data["x_dtype"] = x.scalar_type();
    ctx->saved_data["residual_dtype"] = residual.scalar_type();
    return op.call(x, residual, seed, p);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("dropout_add");
    static const auto op =
        native_op<Tensor(const Tensor&, const Tensor&, double, at::ScalarType)>("dropout_add_backward");
    const Tensor& dy = grads[0];
    auto& data = ctx->saved_data;
    const Tensor dx =
        op.call(dy, ctx->get_saved_variables()[0], data["p"].toDouble(), data["x_dtype"].toScalarType());
    return {dx, dy.to(data["residual_dtype"].toScalarType()), Tensor(), Tensor()};
  }
};

Tensor dropout_add(const Tensor& x, const Tensor& residual, const Tensor& seed, double p) {
  return DropoutAdd::apply(x, residual, seed, p);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) { m.impl("dropout_add_forward", &dropout_add); }

}  // namespace fastgpt
