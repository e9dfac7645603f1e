// Derivatives of cross_entropy and linear_cross_entropy.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty_like.h>

#include <string_view>

#include "autograd/common.h"

namespace fastgpt {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Maybe = std::optional<Tensor>;

// Whether there is memory behind it to write into: tracers and transforms put stand-ins for tensors.
bool is_plain(const Tensor& tensor) { return (tensor.key_set() & at::kTensorSubclassLike).empty(); }

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& targets,
                               int64_t ignore_index, double label_smoothing, double z_loss,
                               std::string_view reduction, const c10::SymInt& vocab_size,
                               bool with_gradient) {
    static const auto op = native_op<Three(const Tensor&, const Tensor&, int64_t, double, double,
                                           std::string_view, c10::SymInt, bool)>("cross_entropy_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, count, dlogits] =
        op.call(logits, targets, ignore_index, label_smoothing, z_loss, reduction, vocab_size, with_gradient);
    ctx->save_for_backward({logits, targets, count});
    // Handed out once, to the first backward, which may write into it; a second one allocates its own.
    if (with_gradient && is_plain(dlogits)) ctx->saved_data["dlogits"] = dlogits;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["z_loss"] = z_loss;
    ctx->saved_data["vocab_size"] = vocab_size;
    ctx->mark_non_differentiable({count, dlogits});
    ctx->set_materialize_grads(false);  // no zeros for the gradients of dlogits
    return {loss, count, dlogits};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("cross_entropy");
    static const auto op =
        native_op<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                       double, double, c10::SymInt, bool)>("cross_entropy_backward");
    variable_list out(8);
    if (!grads[0].defined()) return out;
    auto& data = ctx->saved_data;
    const auto saved = ctx->get_saved_variables();
    const bool filled = data.count("dlogits") != 0;
    out[0] = filled ? data["dlogits"].toTensor() : at::empty_like(saved[0], at::MemoryFormat::Contiguous);
    data.erase("dlogits");
    op.call(out[0], grads[0], saved[0], saved[1], saved[2], data["ignore_index"].toInt(),
            data["label_smoothing"].toDouble(), data["z_loss"].toDouble(), data["vocab_size"].toSymInt(),
            filled);
    return out;
  }
};

const auto& linear_forward() {
  static const auto op =
      native_op<Four(const Tensor&, const Tensor&, const Tensor&, const Maybe&, c10::SymInt, int64_t, double,
                     double, std::string_view, c10::SymInt, bool, bool)>("linear_cross_entropy_forward");
  return op;
}

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const Tensor& targets, const Maybe& dloss, const c10::SymInt& chunk_rows,
                               int64_t ignore_index, double label_smoothing, double z_loss,
                               std::string_view reduction, const c10::SymInt& vocab_size, bool x_gradient,
                               bool weight_gradient) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, count, dx, dw] =
        linear_forward().call(x, weight, targets, dloss, chunk_rows, ignore_index, label_smoothing, z_loss,
                              reduction, vocab_size, x_gradient, weight_gradient);
    auto& data = ctx->saved_data;
    const bool none = reduction == "none";
    ctx->save_for_backward(none ? variable_list{x, weight, targets} : variable_list{count, dx, dw});
    data["none"] = none;
    data["chunk_rows"] = chunk_rows;
    data["ignore_index"] = ignore_index;
    data["label_smoothing"] = label_smoothing;
    data["z_loss"] = z_loss;
    data["vocab_size"] = vocab_size;
    data["weight_rows"] = weight.sym_size(0);
    data["weight_dtype"] = static_cast<int64_t>(weight.scalar_type());
    ctx->mark_non_differentiable({count, dx, dw});
    ctx->set_materialize_grads(false);
    return {loss, count, dx, dw};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_second_derivative("linear_cross_entropy");
    static const auto scaled =
        native_op<Tensor(const Tensor&, const Maybe&, const Tensor&, c10::SymInt, at::ScalarType)>(
            "linear_cross_entropy_backward");
    variable_list out(12);
    if (!grads[0].defined()) return out;
    auto& data = ctx->saved_data;
    const auto saved = ctx->get_saved_variables();
    const bool for_x = ctx->needs_input_grad(0), for_weight = ctx->needs_input_grad(1);
    const auto dtype = static_cast<at::ScalarType>(data["weight_dtype"].toInt());
    if (data["none"].toBool()) {
      // dW needs each row's dloss before the sum over rows: the gradients were not made in forward.
      auto [loss, count, dx, dw] = linear_forward().call(
          saved[0], saved[1], saved[2], grads[0], data["chunk_rows"].toSymInt(), data["ignore_index"].toInt(),
          data["label_smoothing"].toDouble(), data["z_loss"].toDouble(), "none",
          data["vocab_size"].toSymInt(), for_x, for_weight);
      if (for_x) out[0] = dx;
      if (for_weight) out[1] = scaled.call(dw, std::nullopt, count, data["weight_rows"].toSymInt(), dtype);
      return out;
    }
    const Tensor &count = saved[0], &dx = saved[1], &dw = saved[2];
    if (for_x) {
      const Tensor flat = dx.view_symint({-1, dx.sym_size(-1)});
      out[0] =
          scaled.call(flat, grads[0], count, flat.sym_size(0), dx.scalar_type()).view_symint(dx.sym_sizes());
    }
    if (for_weight) out[1] = scaled.call(dw, grads[0], count, data["weight_rows"].toSymInt(), dtype);
    return out;
  }
};

Three cross_entropy(const Tensor& logits, const Tensor& targets, int64_t ignore_index, double label_smoothing,
                    double z_loss, std::string_view reduction, c10::SymInt vocab_size, bool with_gradient) {
  const auto out = CrossEntropy::apply(logits, targets, ignore_index, label_smoothing, z_loss, reduction,
                                       vocab_size, with_gradient);
  return {out[0], out[1], out[2]};
}

Four linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets, const Maybe& dloss,
                          c10::SymInt chunk_rows, int64_t ignore_index, double label_smoothing, double z_loss,
                          std::string_view reduction, c10::SymInt vocab_size, bool x_gradient,
                          bool weight_gradient) {
  const auto out =
      LinearCrossEntropy::apply(x, weight, targets, dloss, chunk_rows, ignore_index, label_smoothing, z_loss,
                                reduction, vocab_size, x_gradient, weight_gradient);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) {
  m.impl("cross_entropy_forward", &cross_entropy);
  m.impl("linear_cross_entropy_forward", &linear_cross_entropy);
}

}  // namespace fastgpt
