// cross_entropy on CUDA tensors.
#include <limits>
#include <string_view>
#include <tuple>

#include "cuda/cross_entropy.h"
#include "cuda/tensors.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;

// (rows, V) with neighbouring columns side by side; a copy only where strides allow no view.
Tensor rows_of(const Tensor& logits, int64_t rows) {
  const Tensor flat = logits.reshape({rows, logits.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

CrossEntropyRows describe(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                          double label_smoothing, double z_loss, int64_t vocab_size) {
  TORCH_CHECK_VALUE(logits.size(1) < std::numeric_limits<int>::max() / 2, "rows of ", logits.size(1),
                    " logits");
  CrossEntropyRows rows{};
  rows.logits = logits.const_data_ptr();
  rows.targets = targets.const_data_ptr<int64_t>();
  rows.rows = logits.size(0);
  rows.width = rows.dlogits_stride = logits.size(1);
  rows.logits_stride = logits.stride(0);
  rows.size = vocab_size;
  rows.ignore_index = ignore_index;
  rows.label_smoothing = label_smoothing;
  rows.z_loss = z_loss;
  rows.dtype = dtype_of(logits);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                           double label_smoothing, double z_loss, std::string_view reduction,
                                           int64_t vocab_size, bool with_gradient) {
  const DeviceGuard guard(logits);
  const auto stream = current_stream();
  const Tensor aims = targets.reshape(-1).contiguous(), values = rows_of(logits, aims.numel());
  const auto fp32 = logits.options().dtype(at::kFloat);
  const bool mean = reduction == "mean", none = reduction == "none";
  const Tensor losses = at::empty(targets.sizes(), fp32);
  const Tensor count = mean ? at::empty({}, fp32) : at::empty({0}, fp32);
  const Tensor dlogits =
      with_gradient ? at::empty(logits.sizes(), logits.options()) : at::empty({0}, logits.options());
  CrossEntropyRows rows = describe(values, aims, ignore_index, label_smoothing, z_loss, vocab_size);
  rows.losses = losses.mutable_data_ptr<float>();
  if (with_gradient) rows.dlogits = dlogits.mutable_data_ptr();
  if (mean) {
    rows.count = count.mutable_data_ptr<float>();
    count_rows(rows.targets, count.mutable_data_ptr<float>(), rows.rows, ignore_index, stream);
  }
  cross_entropy_rows(rows, stream);
  if (none) return {losses, count, dlogits};
  const Tensor loss = at::empty({}, fp32);
  sum_losses(rows.losses, rows.count, loss.mutable_data_ptr<float>(), rows.rows, stream);
  return {loss, count, dlogits};
}

void backward(const Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Tensor& targets,
              const Tensor& count, int64_t ignore_index, double label_smoothing, double z_loss,
              int64_t vocab_size, bool filled) {
  TORCH_CHECK_VALUE(dlogits.is_contiguous() && dlogits.scalar_type() == logits.scalar_type(),
                    "dlogits must be contiguous and have the dtype of logits");
  const DeviceGuard guard(logits);
  const Tensor aims = targets.reshape(-1).contiguous(), values = rows_of(logits, aims.numel());
  const Tensor g = dloss.to(at::kFloat).reshape(-1);
  CrossEntropyRows rows = describe(values, aims, ignore_index, label_smoothing, z_loss, vocab_size);
  rows.dlogits = dlogits.mutable_data_ptr();
  rows.dloss = g.const_data_ptr<float>();
  rows.dloss_stride = dloss.dim() == 0 ? 0 : g.stride(0);  // 0 too for an expanded one
  if (count.dim() == 0) rows.count = count.const_data_ptr<float>();
  rows.filled = filled;
  cross_entropy_rows(rows, current_stream());
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("cross_entropy_forward", &forward);
  m.impl("cross_entropy_backward", &backward);
}

}  // namespace fastgpt::cuda
