// PyTorch multiplies fp32 by MKL, which uses AVX-512 on Intel's processors alone; its products of bf16 are by
// oneDNN, which uses what there is. On others with AVX-512 oneDNN multiplies fp32 more than twice as fast as
// MKL (docs/cpu.md), by the function that PyTorch uses for bf16. That is exported, but not declared in a
// public header: where a build of PyTorch lacks it the symbol is null, and PyTorch chooses.
#include "cpu/product.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/record_function.h>

#include "cpu/isa.h"

#if defined(FASTGPT_X86) && defined(__linux__)
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta,
                                         float alpha);
}  // namespace at::native
#endif

namespace fastgpt {
namespace {

// oneDNN adds up long dot products one by one; MKL adds sums of a few hundred, which rounds less. With so
// many at a time the error is about MKL's; all at once it is 2.4 times that for 3072.
constexpr int64_t kDepth = 256;
constexpr int64_t kMostSlices = 16;  // each passes over the result once more

// A call of oneDNN costs 11 us more than one of MKL, and slices of the operands are copied. With fewer flops
// in a slice that is too much, and with fewer rows or columns, where a value that was copied is used a few
// times.
constexpr double kLeastFlops = 8e6;
constexpr int64_t kLeastRows = 8;

// How many of the products of one sum are added at once.
int64_t slice_depth(const Tensor& a) { return std::max(kDepth, (a.size(1) + kMostSlices - 1) / kMostSlices); }

bool dense(const Tensor& x) { return x.stride(0) == 1 || x.stride(1) == 1; }

// As PyTorch takes it without a copy of its own, which goes value by value where x lies transposed.
Tensor contiguous_either_way(const Tensor& x) {
  return x.stride(1) == 1 ? x.contiguous() : x.t().contiguous().t();
}

// Whether a b is a product that oneDNN makes, called here; elsewhere PyTorch's choice is as good.
bool onednn_is_faster(const Tensor& a, const Tensor& b) {
#if defined(FASTGPT_X86) && defined(__linux__)
  static const bool here = at::native::mkldnn_matmul != nullptr && at::hasMKL() && isa() >= Isa::kAvx512 &&
                           !__builtin_cpu_is("intel");
  if (!here || a.scalar_type() != at::kFloat || !at::globalContext().userEnabledMkldnn()) return false;
  const int64_t rows = a.size(0), columns = b.size(1);
  return 2.0 * rows * columns * std::min(slice_depth(a), a.size(1)) >= kLeastFlops &&
         std::min(rows, columns) >= kLeastRows && dense(a) && dense(b);
#else
  return false;
#endif
}

// out = a b, or out += a b.
void by_onednn(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
#if defined(FASTGPT_X86) && defined(__linux__)
  RECORD_FUNCTION("fastgpt::multiply", c10::ArrayRef<const c10::IValue>());  // for the profiler
  const int64_t depth = slice_depth(a);
  for (int64_t begin = 0; begin < a.size(1); begin += depth) {
    const int64_t end = std::min(begin + depth, a.size(1));
    at::native::mkldnn_matmul(contiguous_either_way(a.slice(1, begin, end)),
                              contiguous_either_way(b.slice(0, begin, end)), out,
                              add || begin > 0 ? 1.0f : 0.0f, 1.0f);
  }
#endif
}

Tensor multiply(const Tensor& a, const Tensor& b) {
  const Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type());
  multiply_into(out, a, b);
  return out;
}

}  // namespace

void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (onednn_is_faster(a, b) && dense(out)) return by_onednn(out, a, b, add);
  Tensor result = out;
  if (add)
    at::addmm_out(result, out, a, b);
  else
    at::mm_out(result, a, b);
}

Tensor linear_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor matrix = as_matrix(x);
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  if (!onednn_is_faster(matrix, weight.t())) return at::linear(matrix, weight, bias).view(shape);
  const Tensor y = empty(shape, x.scalar_type()), rows = as_matrix(y);
  if (bias.has_value()) rows.copy_(bias->expand_as(rows));
  by_onednn(rows, matrix, weight.t(), bias.has_value());
  return y;
}

std::tuple<Tensor, Tensor> product_gradients(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             bool need_dx, bool need_dw) {
  Tensor dx = empty({0}, x.scalar_type()), dw = empty({0}, x.scalar_type());
  if (need_dx) dx = multiply(dy, weight).view(x.sizes());
  if (need_dw) dw = multiply(dy.t(), as_matrix(x));
  return {dx, dw};
}

}  // namespace fastgpt
