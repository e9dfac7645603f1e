// Derivative of attention, whose q without k and v is packed qkv.
#include "autograd/common.h"

namespace fastgpt {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using MaybeTensor = std::optional<Tensor>;

MaybeTensor maybe(const Tensor& x) { return x.defined() ? MaybeTensor(x) : std::nullopt; }

struct Attention : torch::autograd::Function<Attention> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const MaybeTensor& k,
                               const MaybeTensor& v, const MaybeTensor& seed, double dropout_p,
                               std::optional<double> scale, std::optional<c10::SymInt> window) {
    static const auto op =
        native_op<Two(const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, double,
                      std::optional<double>, std::optional<c10::SymInt>)>("attention_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [o, lse] = op.call(q, k, v, seed, dropout_p, scale, window);
    const Tensor none;
    ctx->save_for_backward({q, k.value_or(none), v.value_or(none), o, lse, seed.value_or(none)});
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = window;
    ctx->mark_non_differentiable({lse});
    ctx->set_materialize_grads(false);  // no zeros for lse
    return {o, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("attention");
    static const auto op = native_op<Three(
        const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const Tensor&, const Tensor&,
        const MaybeTensor&, double, std::optional<double>, std::optional<c10::SymInt>)>("attention_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &o = saved[3], &lse = saved[4];
    auto [dq, dk, dv] = op.call(
        grads[0], q, maybe(k), maybe(v), o, lse, maybe(saved[5]), ctx->saved_data["dropout_p"].toDouble(),
        ctx->saved_data["scale"].toOptional<double>(), ctx->saved_data["window"].toOptional<c10::SymInt>());
    const bool packed = !k.defined();
    return {dq, packed ? Tensor() : dk, packed ? Tensor() : dv, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Two attention(const Tensor& q, const MaybeTensor& k, const MaybeTensor& v, const MaybeTensor& seed,
              double dropout_p, std::optional<double> scale, std::optional<c10::SymInt> window) {
  const auto out = Attention::apply(q, k, v, seed, dropout_p, scale, window);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) { m.impl("attention_forward", &attention); }

}  // namespace fastgpt
