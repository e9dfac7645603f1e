// Derivative of the embeddings.
#include "autograd/common.h"

namespace fastgpt {
namespace {

struct Embedding : torch::autograd::Function<Embedding> {
  static Tensor forward(AutogradContext* ctx, const Tensor& idx, const Tensor& token_weight,
                        const Tensor& position_weight, const c10::SymInt& start) {
    static const auto op =
        native_op<Tensor(const Tensor&, const Tensor&, const Tensor&, c10::SymInt)>("embedding_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({idx});
    ctx->saved_data["vocab_size"] = token_weight.sym_size(0);
    ctx->saved_data["block_size"] = position_weight.sym_size(0);
    ctx->saved_data["start"] = start;
    ctx->saved_data["token_dtype"] = token_weight.scalar_type();
    ctx->saved_data["position_dtype"] = position_weight.scalar_type();
    return op.call(idx, token_weight, position_weight, start);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("embedding");
    static const auto op = native_op<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, c10::SymInt, at::ScalarType, at::ScalarType)>(
        "embedding_backward");
    auto& data = ctx->saved_data;
    auto [dwt, dwp] = op.call(grads[0], ctx->get_saved_variables()[0], data["vocab_size"].toSymInt(),
                              data["block_size"].toSymInt(), data["start"].toSymInt(),
                              data["token_dtype"].toScalarType(), data["position_dtype"].toScalarType());
    return {Tensor(), dwt, dwp, Tensor()};
  }
};

Tensor embedding(const Tensor& idx, const Tensor& token_weight, const Tensor& position_weight,
                 c10::SymInt start) {
  return Embedding::apply(idx, token_weight, position_weight, start);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) { m.impl("embedding_forward", &embedding); }

}  // namespace fastgpt
