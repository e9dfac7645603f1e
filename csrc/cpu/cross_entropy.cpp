// cross_entropy on CPU tensors. The equations are in fastgpt/ops/cross_entropy.py.
#include "cpu/cross_entropy.h"

#include <torch/library.h>

#define FASTGPT_LOOPS "cpu/loops/cross_entropy.h"
#include "cpu/each_isa.h"

namespace fastgpt {

namespace {

constexpr int64_t kGrain = 1 << 13;  // elements that are worth a thread: each takes two exponentials

// (rows, V) with neighbouring columns side by side; a copy only where strides allow no view.
Tensor rows_of(const Tensor& logits, int64_t rows) {
  const Tensor flat = logits.reshape({rows, logits.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

Tensor flat_targets(const Tensor& targets) { return targets.reshape(-1).contiguous(); }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                           double label_smoothing, double z_loss, std::string_view reduction,
                                           int64_t vocab_size, bool with_gradient) {
  const LossOptions options{ignore_index, label_smoothing, z_loss, vocab_size};
  const Tensor aims = flat_targets(targets);
  const int64_t counted = count_rows(aims, options);
  const Tensor losses = empty(targets.sizes(), at::kFloat);
  const Tensor dlogits = with_gradient ? empty(logits.sizes(), logits.scalar_type()) : Tensor();
  loss_rows(rows_of(logits, aims.numel()), aims, std::nullopt, reduction == "mean" ? counted : 1, losses,
            with_gradient ? rows_of(dlogits, aims.numel()) : Tensor(), false, options);
  const auto [loss, count] = reduce(losses, counted, reduction);
  return {loss, count, with_gradient ? dlogits : empty({0}, logits.scalar_type())};
}

void backward(const Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Tensor& targets,
              const Tensor& count, int64_t ignore_index, double label_smoothing, double z_loss,
              int64_t vocab_size, bool filled) {
  TORCH_CHECK_VALUE(dlogits.is_contiguous() && dlogits.scalar_type() == logits.scalar_type(),
                    "dlogits must be contiguous and have the dtype of logits");
  const Tensor aims = flat_targets(targets);
  loss_rows(rows_of(logits, aims.numel()), aims, dloss, count.dim() == 0 ? *const_data<float>(count) : 1.0f,
            Tensor(), rows_of(dlogits, aims.numel()), filled,
            {ignore_index, label_smoothing, z_loss, vocab_size});
}

}  // namespace

int64_t count_rows(const Tensor& targets, const LossOptions& options) {
  const int64_t* y = const_data<int64_t>(targets);
  int64_t counted = 0;
  for (int64_t row = 0; row < targets.numel(); ++row) {
    if (y[row] == options.ignore_index) continue;
    TORCH_CHECK_INDEX(y[row] >= 0 && y[row] < options.vocab_size, "target ", y[row], " is out of range");
    ++counted;
  }
  return counted;
}

void loss_rows(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& dloss, float count,
               const Tensor& losses, const Tensor& dlogits, bool filled, const LossOptions& options) {
  const Tensor g = dloss.has_value() ? dloss->to(at::kFloat).reshape(-1) : Tensor();
  with_type(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    LossRows<T> rows{};
    rows.logits = const_data<T>(logits);
    rows.logits_stride = logits.stride(0);
    rows.targets = const_data<int64_t>(targets);
    if (g.defined()) {
      rows.dloss = const_data<float>(g);
      rows.dloss_stride = dloss->dim() == 0 ? 0 : g.stride(0);
    }
    rows.losses = losses.defined() ? data<float>(losses) : nullptr;
    if (dlogits.defined()) {
      rows.dlogits = data<T>(dlogits);
      rows.dlogits_stride = dlogits.stride(0);
    }
    rows.width = logits.size(1);
    rows.size = options.vocab_size;
    rows.ignore_index = options.ignore_index;
    rows.label_smoothing = static_cast<float>(options.label_smoothing);
    rows.z_loss = static_cast<float>(options.z_loss);
    rows.count = count;
    rows.filled = filled;
    const auto loop = FASTGPT_CHOOSE(cross_entropy_rows<T>);
    parallel_for(0, logits.size(0), kGrain / rows.width + 1,
                 [&](int64_t begin, int64_t end) { loop(rows, begin, end); });
  });
}

std::tuple<Tensor, Tensor> reduce(const Tensor& losses, int64_t counted, std::string_view reduction) {
  if (reduction == "none") return {losses, empty({0}, at::kFloat)};
  const bool mean = reduction == "mean";
  const Tensor loss = empty({}, at::kFloat), count = mean ? empty({}, at::kFloat) : empty({0}, at::kFloat);
  double total = 0;  // one thread, in order: microseconds beside the rows
  for (int64_t row = 0; row < losses.numel(); ++row) total += const_data<float>(losses)[row];
  if (mean) {
    total /= static_cast<double>(counted);  // 0 / 0: NaN when no row counts
    *data<float>(count) = static_cast<float>(counted);
  }
  *data<float>(loss) = static_cast<float>(total);
  return {loss, count};
}

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("cross_entropy_forward", &forward);
  m.impl("cross_entropy_backward", &backward);
}

}  // namespace fastgpt
