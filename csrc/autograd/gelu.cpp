// Derivatives of gelu and bias_gelu.
#include <string_view>

#include "autograd/common.h"

namespace fastgpt {
namespace {

struct Gelu : torch::autograd::Function<Gelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, std::string_view approximate) {
    static const auto op = native_op<Tensor(const Tensor&, std::string_view)>("gelu_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x});
    ctx->saved_data["approximate"] = std::string(approximate);
    return op.call(x, approximate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("gelu");
    static const auto op = native_op<Tensor(const Tensor&, const Tensor&, std::string_view)>("gelu_backward");
    const auto saved = ctx->get_saved_variables();
    return {op.call(grads[0], saved[0], ctx->saved_data["approximate"].toStringView()), Tensor()};
  }
};

struct BiasGelu : torch::autograd::Function<BiasGelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& bias,
                        std::string_view approximate) {
    static const auto op =
        native_op<Tensor(const Tensor&, const Tensor&, std::string_view)>("bias_gelu_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, bias});
    ctx->saved_data["approximate"] = std::string(approximate);
    return op.call(x, bias, approximate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("bias_gelu");
    static const auto op =
        native_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, std::string_view)>(
            "bias_gelu_backward");
    const auto saved = ctx->get_saved_variables();
    auto [dx, db] = op.call(grads[0], saved[0], saved[1], ctx->saved_data["approximate"].toStringView());
    return {dx, db, Tensor()};
  }
};

Tensor gelu(const Tensor& x, std::string_view approximate) { return Gelu::apply(x, approximate); }

Tensor bias_gelu(const Tensor& x, const Tensor& bias, std::string_view approximate) {
  return BiasGelu::apply(x, bias, approximate);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) {
  m.impl("gelu_forward", &gelu);
  m.impl("bias_gelu_forward", &bias_gelu);
}

}  // namespace fastgpt
