// linear_cross_entropy on CPU tensors, a chunk of rows at a time:
//
//   l = x W^T,  l -> dl in place,  dx = dl W,  dW += dl^T x in fp32
//
// with gradients for a dloss of 1, or for the dloss of each row, not yet divided by the count. Products
// of bf16 accumulate in fp32 and round once, so that dW is a sum, in fp32, of one rounded product for each
// chunk. Half precision, which few CPUs multiply, is computed in fp32.
#include <torch/library.h>

#include "cpu/cross_entropy.h"
#include "cpu/product.h"

#define FASTGPT_LOOPS "cpu/loops/scale.h"
#include "cpu/each_isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 1 << 15;     // elements that are worth a thread
constexpr int64_t kPadding = 64;        // columns: rows of logits then begin at a cache line's start
constexpr int64_t kProductRows = 4096;  // of dW at a time in bf16

// total (V, C) += dl^T x, or total = dl^T x for the first chunk; `product` (kProductRows, C) is for bf16.
void add_product(const Tensor& total, const Tensor& dl, const Tensor& x, const Tensor& product, bool first) {
  if (dl.scalar_type() == at::kFloat) {
    return multiply_into(total, dl.t(), x, !first);
  }
  const int64_t width = x.size(1);
  const auto loop = FASTGPT_CHOOSE(accumulate<BFloat16>);
  for (int64_t v = 0; v < total.size(0); v += kProductRows) {
    const int64_t end = std::min(v + kProductRows, total.size(0));
    const Tensor part = product.slice(0, 0, end - v);
    multiply_into(part, dl.slice(1, v, end).t(), x);
    parallel_for(0, part.numel(), kGrain, [&](int64_t begin, int64_t stop) {
      loop(const_data<BFloat16>(part), data<float>(total) + v * width, first, begin, stop);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight,
                                                   const Tensor& targets, const std::optional<Tensor>& dloss,
                                                   int64_t chunk_rows, int64_t ignore_index,
                                                   double label_smoothing, double z_loss,
                                                   std::string_view reduction, int64_t vocab_size,
                                                   bool x_gradient, bool weight_gradient) {
  const LossOptions options{ignore_index, label_smoothing, z_loss, vocab_size};
  const Tensor aims = targets.reshape(-1).contiguous();
  const int64_t counted = count_rows(aims, options), rows = aims.numel(), width = x.size(-1);
  const Tensor losses = empty(targets.sizes(), at::kFloat), flat_losses = losses.view(-1);
  const Tensor total = empty({weight_gradient ? vocab_size : 0, width}, at::kFloat);
  if (rows == 0) total.zero_();
  // Rows of padding may hold NaN, which 0 * NaN would carry to dx.
  const auto dtype = x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
  const Tensor w = plain(weight.slice(0, 0, vocab_size), dtype),
               flat = plain(x.reshape({rows, width}), dtype);
  const Tensor dx = empty({x_gradient ? rows : 0, width}, dtype);
  const auto g = dloss.has_value() ? std::optional(dloss->reshape(-1)) : std::nullopt;

  const int64_t chunks = std::max<int64_t>((rows + chunk_rows - 1) / chunk_rows, 1);
  const int64_t size = (rows + chunks - 1) / chunks;  // all about as long
  const int64_t padded = (vocab_size + kPadding - 1) / kPadding * kPadding;
  const Tensor buffer = empty({size, padded}, dtype).slice(1, 0, vocab_size);
  const Tensor product = empty({weight_gradient ? std::min(kProductRows, vocab_size) : 0, width}, dtype);
  for (int64_t begin = 0; begin < rows; begin += size) {
    const int64_t end = std::min(begin + size, rows);
    const Tensor chunk = flat.slice(0, begin, end);         // (n, C)
    const Tensor logits = buffer.slice(0, 0, end - begin);  // (n, V), soon dl
    multiply_into(logits, chunk, w.t());
    loss_rows(logits, aims.slice(0, begin, end), g.has_value() ? std::optional(g->slice(0, begin, end)) : g,
              1.0f, flat_losses.slice(0, begin, end), x_gradient || weight_gradient ? logits : Tensor(),
              false, options);
    if (x_gradient) multiply_into(dx.slice(0, begin, end), logits, w);
    if (weight_gradient) add_product(total, logits, chunk, product, begin == 0);
  }
  const auto [loss, count] = reduce(losses, counted, reduction);
  return {loss, count, x_gradient ? dx.to(x.scalar_type()).view(x.sizes()) : empty({0}, x.scalar_type()),
          total};
}

// gradient * dloss / count in `dtype`, with zeros below it up to `rows` rows.
Tensor backward(const Tensor& gradient, const std::optional<Tensor>& dloss, const Tensor& count, int64_t rows,
                at::ScalarType dtype) {
  const Tensor x = gradient.contiguous();
  const Tensor y = empty({rows, x.size(-1)}, dtype);
  float factor = dloss.has_value() ? dloss->to(at::kFloat).item<float>() : 1.0f;
  if (count.dim() == 0) {
    const float n = *const_data<float>(count);
    factor = n > 0 ? factor / n : 0.0f;  // x is 0 where no row counts, and 0 / 0 is not
  }
  with_type(x.scalar_type(), [&](auto from) {
    with_type(dtype, [&](auto to) {
      using T = decltype(from);
      using U = decltype(to);
      const auto loop = FASTGPT_CHOOSE(scale<T, U>);
      parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
        loop(const_data<T>(x), data<U>(y), factor, begin, end);
      });
    });
  });
  y.slice(0, x.size(0)).zero_();
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("linear_cross_entropy_forward", &forward);
  m.impl("linear_cross_entropy_backward", &backward);
}

}  // namespace fastgpt
