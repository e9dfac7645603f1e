// dropout_add on CPU tensors. The equations are in fastgpt/ops/dropout.py.
//
// The mask is a function of the seed and of an element's number alone, and the same as that of the other
// kernels: see kernels/dropout.py. Backward computes it again.
#include "shared/dropout.h"

#include <torch/library.h>

#include "cpu/common.h"

namespace fastgpt {
constexpr int64_t kDropoutBlock = 4096;  // elements, a quarter of them for each word of a counter
}

#define FASTGPT_LOOPS "cpu/loops/dropout.h"
#include "cpu/each_isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 4;  // blocks that are worth a thread

Tensor dropout_add(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double p) {
  const Tensor y = empty(x.sizes(), x.scalar_type());
  const int64_t key = *seed.const_data_ptr<int64_t>(), count = x.numel();
  const uint32_t threshold = dropout_threshold_of(p);
  const auto scale = static_cast<float>(1.0 / (1.0 - p));
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(dropout_add<T>);
    const int64_t blocks = (count + kDropoutBlock - 1) / kDropoutBlock;
    parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
      loop(const_data<T>(x), const_data<T>(residual), data<T>(y), key, threshold, scale, begin, end, count);
    });
  });
  return y;
}

Tensor dropout_add_forward(const Tensor& x, const Tensor& residual, const Tensor& seed, double p) {
  const auto dtype = c10::promoteTypes(x.scalar_type(), residual.scalar_type());
  return dropout_add(plain(x, dtype), plain(residual, dtype), seed, p);
}

Tensor dropout_add_backward(const Tensor& dy, const Tensor& seed, double p, at::ScalarType dtype) {
  return dropout_add(dy.contiguous(), std::nullopt, seed, p).to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("dropout_add_forward", &dropout_add_forward);
  m.impl("dropout_add_backward", &dropout_add_backward);
}

}  // namespace fastgpt
