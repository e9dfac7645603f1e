// layer_norm, add_layer_norm and rms_norm on CPU tensors. The equations are in fastgpt/ops/layer_norm.py.
#include <tuple>

#include "cpu/common.h"
#include "shared/norm.h"

#define FASTGPT_LOOPS "cpu/loops/layer_norm.h"
#include "cpu/each_isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

NormForward forward(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                    const std::optional<Tensor>& bias, double eps, bool centred) {
  const auto dtype =
      residual.has_value() ? c10::promoteTypes(x.scalar_type(), residual->scalar_type()) : x.scalar_type();
  const Tensor values = plain(x, dtype), w = plain(weight, at::kFloat);
  const std::optional<Tensor> added = plain(residual, dtype), b = plain(bias, at::kFloat);
  const auto statistics = x.sizes().slice(0, x.dim() - 1);
  NormForward out;
  out.y = empty(x.sizes(), dtype);
  if (residual.has_value()) out.summed = empty(x.sizes(), dtype);
  if (centred) out.mean = empty(statistics, at::kFloat);
  out.rstd = empty(statistics, at::kFloat);
  const int64_t width = weight.size(0), rows = out.rstd.numel();
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(layer_norm_forward<T>);
    parallel_for(0, rows, kGrain / std::max<int64_t>(width, 1) + 1, [&](int64_t begin, int64_t end) {
      loop(const_data<T>(values), const_data<T>(added), const_data<float>(w), const_data<float>(b),
           data<T>(out.y), residual.has_value() ? data<T>(out.summed) : nullptr,
           centred ? data<float>(out.mean) : nullptr, data<float>(out.rstd), begin, end, width,
           static_cast<float>(eps));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const std::optional<Tensor>& dsummed,
                                            const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& mean, const Tensor& rstd,
                                            bool has_bias) {
  const auto dtype = x.scalar_type();
  const Tensor dout = plain(dy, dtype), values = plain(x, dtype), w = plain(weight, at::kFloat);
  const Tensor scale = rstd.contiguous();
  const std::optional<Tensor> added = plain(dsummed, dtype), centre = plain(mean, at::kFloat);
  const Tensor dx = empty(x.sizes(), dtype);
  const int64_t width = weight.size(0);
  const RowBlocks blocks(scale.numel());
  const Tensor dw = empty({blocks.count, width}, at::kFloat);
  const Tensor db = empty({has_bias ? blocks.count : 0, width}, at::kFloat);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(layer_norm_backward<T>);
    const int64_t grain = kGrain / std::max<int64_t>(width * blocks.size, 1) + 1;
    parallel_for(0, blocks.count, grain, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block)
        loop(const_data<T>(dout), const_data<T>(added), const_data<T>(values), const_data<float>(w),
             const_data<float>(centre), const_data<float>(scale), data<T>(dx),
             data<float>(dw) + block * width, has_bias ? data<float>(db) + block * width : nullptr,
             blocks.begin(block), blocks.end(block), width);
    });
  });
  return {dx, sum_blocks(dw, weight.scalar_type()),
          has_bias ? sum_blocks(db, weight.scalar_type()) : empty({0}, weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) { implement_norms<forward, backward>(m); }

}  // namespace fastgpt
