// gelu and bias_gelu on CPU tensors. The equations are in fastgpt/ops/gelu.py.
#include "cpu/gelu.h"

#include <torch/library.h>

#define FASTGPT_LOOPS "cpu/loops/gelu.h"
#include "cpu/each_isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

// f(T{}, form) for the element type and the form of GELU; decltype(form)::value is whether it is the tanh
// one.
template <typename F>
void with_form(at::ScalarType dtype, std::string_view approximate, F f) {
  with_type(dtype, [&](auto type) {
    if (approximate == "tanh") return f(type, std::true_type{});
    f(type, std::false_type{});
  });
}

Tensor gelu_forward(const Tensor& x, std::string_view approximate) {
  const Tensor values = x.contiguous(), y = empty(x.sizes(), x.scalar_type());
  with_form(x.scalar_type(), approximate, [&](auto type, auto form) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(gelu_forward<T, decltype(form)::value>);
    parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      loop(const_data<T>(values) + begin, nullptr, nullptr, data<T>(y) + begin, 1, end - begin);
    });
  });
  return y;
}

Tensor bias_gelu_forward(const Tensor& x, const Tensor& bias, std::string_view approximate) {
  const auto dtype = c10::promoteTypes(x.scalar_type(), bias.scalar_type());
  const Tensor y = empty(x.sizes(), dtype);
  bias_gelu_into(plain(x, dtype), plain(bias, at::kFloat), Tensor(), y, approximate);
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& dy, const Tensor& x, const Tensor& bias,
                                              std::string_view approximate) {
  return bias_gelu_gradients(dy, x, bias, approximate, x.scalar_type(), bias.scalar_type());
}

}  // namespace

void bias_gelu_into(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& h, const Tensor& y,
                    std::string_view approximate) {
  const int64_t width = x.size(-1), rows = width == 0 ? 0 : x.numel() / width;
  with_form(x.scalar_type(), approximate, [&](auto type, auto form) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(gelu_forward<T, decltype(form)::value>);
    parallel_for(0, rows, kGrain / std::max<int64_t>(width, 1) + 1, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * width;
      loop(const_data<T>(x) + at, const_data<float>(bias), h.defined() ? data<T>(h) + at : nullptr,
           data<T>(y) + at, end - begin, width);
    });
  });
}

std::tuple<Tensor, Tensor> bias_gelu_gradients(const Tensor& dy, const Tensor& x,
                                               const std::optional<Tensor>& bias,
                                               std::string_view approximate, at::ScalarType dx_dtype,
                                               at::ScalarType db_dtype) {
  const auto dtype = c10::promoteTypes(dy.scalar_type(), x.scalar_type());
  const Tensor dout = plain(dy, dtype), values = plain(x, dtype), dx = empty(x.sizes(), dtype);
  const std::optional<Tensor> b = plain(bias, at::kFloat);
  const int64_t width = x.size(-1);
  const RowBlocks blocks(width == 0 ? 0 : x.numel() / width);
  const Tensor db = empty({blocks.count, width}, at::kFloat);
  with_form(dtype, approximate, [&](auto type, auto form) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(gelu_backward<T, decltype(form)::value>);
    const int64_t grain = kGrain / std::max<int64_t>(width * blocks.size, 1) + 1;
    parallel_for(0, blocks.count, grain, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t at = blocks.begin(block) * width;
        loop(const_data<T>(dout) + at, const_data<T>(values) + at, const_data<float>(b), data<T>(dx) + at,
             data<float>(db) + block * width, blocks.end(block) - blocks.begin(block), width);
      }
    });
  });
  return {dx.to(dx_dtype), sum_blocks(db, db_dtype)};
}

Tensor gelu_gradient(const Tensor& dy, const Tensor& x, std::string_view approximate) {
  const auto dtype = x.scalar_type();
  const Tensor dout = plain(dy, dtype), values = x.contiguous(), dx = empty(x.sizes(), dtype);
  with_form(dtype, approximate, [&](auto type, auto form) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(gelu_backward<T, decltype(form)::value>);
    parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      loop(const_data<T>(dout) + begin, const_data<T>(values) + begin, nullptr, data<T>(dx) + begin, nullptr,
           1, end - begin);
    });
  });
  return dx;
}

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("gelu_forward", &gelu_forward);
  m.impl("gelu_backward", &gelu_gradient);
  m.impl("bias_gelu_forward", &bias_gelu_forward);
  m.impl("bias_gelu_backward", &bias_gelu_backward);
}

}  // namespace fastgpt
