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
  return linear_product(x, weight, bias);
}

// The sum over the rows of x (rows, width), contiguous: (width,).
Tensor column_sums(const Tensor& x) {
  const int64_t width = x.size(1);
  const RowBlocks blocks(x.size(0));
  const Tensor sums = empty({blocks.count, width}, at::kFloat);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(sum_rows<T, float>);
    const int64_t grain = kGrain / std::max<int64_t>(width * blocks.size, 1) + 1;
    parallel_for(0, blocks.count, grain, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block)
        loop(const_data<T>(x) + blocks.begin(block) * width, nullptr, 1,
             blocks.end(block) - blocks.begin(block), data<float>(sums) + block * width, width);
    });
  });
  return sum_blocks(sums, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   bool need_dx, bool need_dw, bool need_db) {
  const PlainProducts guard;
  const auto dtype = x.scalar_type();
  const Tensor g = as_matrix(plain(dy, dtype));
  auto [dx, dw] = product_gradients(g, x, weight, need_dx, need_dw);
  return {dx, dw, need_db ? column_sums(g) : empty({0}, dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("linear_forward", &linear_forward);
  m.impl("linear_backward", &linear_backward);
}

}  // namespace fastgpt
