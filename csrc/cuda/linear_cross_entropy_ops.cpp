// linear_cross_entropy on CUDA tensors, a chunk of rows at a time:
//
//   l = x W^T,  l -> dl in place,  dx = dl W,  dW += dl^T x in fp32
//
// with gradients for a dloss of 1, or for the dloss of each row, not yet divided by the count. cuBLAS
// multiplies.
#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>

#include "cuda/cross_entropy.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/tensors.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;

constexpr int64_t kPadding = 64;  // columns: rows of logits then begin at a cache line's start

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The rows of `weight` that count, and rows of zeros up to a multiple of kPadding. The rows of padding that
// `weight` itself has may hold NaN, which 0 * NaN would carry to dx.
Tensor padded(const Tensor& weight, int64_t vocab_size) {
  const int64_t rows = round_up(vocab_size, kPadding);
  if (rows == vocab_size) return weight.slice(0, 0, rows).contiguous();
  const Tensor out = at::empty({rows, weight.size(1)}, weight.options());
  out.slice(0, 0, vocab_size).copy_(weight.slice(0, 0, vocab_size));
  out.slice(0, vocab_size).zero_();
  return out;
}

// total += a b in fp32, or total = a b for the first.
void add_product(Tensor total, const Tensor& a, const Tensor& b, bool first) {
  const int beta = first ? 0 : 1;
  if (a.scalar_type() == at::kFloat) {
    at::addmm_out(total, total, a, b, beta);
  } else if (a.is_cuda()) {
    at::addmm_out(total, total, a, b, at::kFloat, beta);
  } else {  // the emulator's tensors, which have no such product
    at::addmm_out(total, total, a.to(at::kFloat), b.to(at::kFloat), beta);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight,
                                                   const Tensor& targets, const std::optional<Tensor>& dloss,
                                                   int64_t chunk_rows, int64_t ignore_index,
                                                   double label_smoothing, double z_loss,
                                                   std::string_view reduction, int64_t vocab_size,
                                                   bool x_gradient, bool weight_gradient) {
  const DeviceGuard guard(x);
  const auto stream = current_stream();
  const auto fp32 = x.options().dtype(at::kFloat);
  const int64_t rows = targets.numel(), width = x.size(-1);
  const Tensor aims = targets.reshape(-1).contiguous(), flat = x.reshape({rows, width}).contiguous();
  const Tensor w = padded(weight, vocab_size);
  const Tensor losses = at::empty(targets.sizes(), fp32);
  const Tensor dx = x_gradient ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const Tensor flat_dx = x_gradient ? dx.view({rows, width}) : dx;
  const Tensor total = at::empty({weight_gradient ? w.size(0) : 0, width}, fp32);
  if (rows == 0) total.zero_();
  const Tensor g = dloss.has_value() ? dloss->to(at::kFloat).reshape(-1) : Tensor();

  CrossEntropyRows part{};
  part.width = part.logits_stride = part.dlogits_stride = w.size(0);
  part.size = vocab_size;
  part.ignore_index = ignore_index;
  part.label_smoothing = label_smoothing;
  part.z_loss = z_loss;
  part.dtype = dtype_of(x);
  const int64_t chunks = std::max<int64_t>((rows + chunk_rows - 1) / chunk_rows, 1);
  const int64_t size =
      (rows + chunks - 1) / chunks;  // all about as long: a short last one costs what a long one does
  const Tensor buffer = at::empty({size, w.size(0)}, x.options());
  for (int64_t begin = 0; begin < rows; begin += size) {
    const int64_t end = std::min(begin + size, rows);
    const Tensor chunk = flat.slice(0, begin, end);   // (n, C)
    Tensor logits = buffer.slice(0, 0, end - begin);  // (n, V), soon dl
    at::mm_out(logits, chunk, w.t());
    part.rows = end - begin;
    part.logits = logits.const_data_ptr();
    part.targets = aims.const_data_ptr<int64_t>() + begin;
    part.losses = losses.mutable_data_ptr<float>() + begin;
    part.dlogits = x_gradient || weight_gradient ? logits.mutable_data_ptr() : nullptr;
    if (g.defined()) {
      part.dloss_stride = g.stride(0);
      part.dloss = g.const_data_ptr<float>() + begin * g.stride(0);
    }
    cross_entropy_rows(part, stream);
    if (x_gradient) {
      Tensor out = flat_dx.slice(0, begin, end);
      at::mm_out(out, logits, w);
    }
    if (weight_gradient) add_product(total, logits.t(), chunk, begin == 0);
  }

  const bool mean = reduction == "mean";
  const Tensor count = mean ? at::empty({}, fp32) : at::empty({0}, fp32);
  const Tensor dw = total.slice(0, 0, vocab_size);
  if (mean)
    count_rows(aims.const_data_ptr<int64_t>(), count.mutable_data_ptr<float>(), rows, ignore_index, stream);
  if (reduction == "none") return {losses, count, dx, dw};
  const Tensor loss = at::empty({}, fp32);
  sum_losses(losses.const_data_ptr<float>(), mean ? count.const_data_ptr<float>() : nullptr,
             loss.mutable_data_ptr<float>(), rows, stream);
  return {loss, count, dx, dw};
}

// gradient * dloss / count in `dtype`, with zeros below it up to `rows` rows.
Tensor backward(const Tensor& gradient, const std::optional<Tensor>& dloss, const Tensor& count, int64_t rows,
                at::ScalarType dtype) {
  const DeviceGuard guard(gradient);
  const Tensor x = gradient.contiguous(), y = at::empty({rows, x.size(-1)}, x.options().dtype(dtype));
  const Tensor g = dloss.has_value() ? dloss->to(at::kFloat) : Tensor();
  scale(x.const_data_ptr(), dtype_of(x), g.defined() ? g.const_data_ptr<float>() : nullptr,
        count.dim() == 0 ? count.const_data_ptr<float>() : nullptr, y.mutable_data_ptr(), dtype_of(y),
        x.numel(), y.numel(), current_stream());
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("linear_cross_entropy_forward", &forward);
  m.impl("linear_cross_entropy_backward", &backward);
}

}  // namespace fastgpt::cuda
