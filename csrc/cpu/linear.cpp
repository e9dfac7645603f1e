// linear on CPU tensors. The equations are in fastgpt/ops/linear.py.
#include <torch/library.h>

#include "cpu/product.h"

#define FASTGPT_LOOPS "cpu/loops/sum_rows.h"
#include "cpu/each_isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const PlainProducts guard;
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return multiply(as_matrix(x), weight.t(), bias).view(shape);
}

// The sum over the rows of x (rows, width), contiguous: (width,).
Tensor column_sums(const Tensor& x) {
  const int64_t width = x.size(1);
  const RowBlocks blocks(x.size(0));
  const Tensor sums = empty({blocks.count, width}, at::kFloat);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(sum_rows<T>);
    const int64_t grain = kGrain / std::max<int64_t>(width * blocks.size, 1) + 1;
    parallel_for(0, blocks.count, grain, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block)
        loop(const_data<T>(x) + blocks.begin(block) * width, data<float>(sums) + block * width,
             blocks.end(block) - blocks.begin(block), width);
    });
  });
  return sum_blocks(sums, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   bool need_dx, bool need_dw, bool need_db) {
  const PlainProducts guard;
  const auto dtype = x.scalar_type();
  const Tensor g = as_matrix(plain(dy, dtype));
  Tensor dx = empty({0}, dtype), dw = empty({0}, dtype), db = empty({0}, dtype);
  if (need_dx) dx = multiply(g, weight).view(x.sizes());
  if (need_dw) dw = multiply(g.t(), as_matrix(x));
  if (need_db) db = column_sums(g);
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("linear_forward", &linear_forward);
  m.impl("linear_backward", &linear_backward);
}

}  // namespace fastgpt
