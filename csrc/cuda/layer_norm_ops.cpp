// layer_norm, add_layer_norm and rms_norm on CUDA tensors.
#include <optional>
#include <tuple>

#include "cuda/layer_norm.h"
#include "cuda/partials.h"
#include "cuda/tensors.h"
#include "shared/norm.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;

const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

NormForward forward(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                    const std::optional<Tensor>& bias, double eps, bool centred) {
  const DeviceGuard guard(x);
  const auto dtype =
      residual.has_value() ? c10::promoteTypes(x.scalar_type(), residual->scalar_type()) : x.scalar_type();
  const Tensor values = plain(x, dtype), w = weight.contiguous();
  const std::optional<Tensor> added = plain(residual, dtype), b = plain(bias, w.scalar_type());
  const auto statistics = x.sizes().slice(0, x.dim() - 1);
  NormForward out;
  out.y = at::empty(x.sizes(), values.options());
  out.rstd = at::empty(statistics, x.options().dtype(at::kFloat));
  if (residual.has_value()) out.summed = at::empty(x.sizes(), values.options());
  if (centred) out.mean = at::empty_like(out.rstd);
  const NormShape shape{out.rstd.numel(), w.size(0), dtype_of(values), dtype_of(w)};
  norm_forward(shape, values.const_data_ptr(), pointer(added), w.const_data_ptr(), pointer(b),
               out.y.mutable_data_ptr(), residual.has_value() ? out.summed.mutable_data_ptr() : nullptr,
               centred ? out.mean.mutable_data_ptr<float>() : nullptr, out.rstd.mutable_data_ptr<float>(),
               static_cast<float>(eps), current_stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const std::optional<Tensor>& dsummed,
                                            const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& mean, const Tensor& rstd,
                                            bool has_bias) {
  const DeviceGuard guard(x);
  const auto dtype = x.scalar_type();
  const Tensor dout = plain(dy, dtype), values = x.contiguous(), w = weight.contiguous();
  const Tensor scale = rstd.contiguous();
  const std::optional<Tensor> added = plain(dsummed, dtype), centre = plain(mean, at::kFloat);
  const NormShape shape{scale.numel(), w.size(0), dtype_of(values), dtype_of(w)};
  const int64_t programs = norm_programs(shape, sm_count());
  const Tensor partials = at::empty({1 + has_bias, programs, shape.width}, scale.options());
  const Tensor dx = at::empty(x.sizes(), values.options());
  const Tensor dw = at::empty_like(w), db = at::empty({has_bias ? shape.width : 0}, w.options());
  float* const dw_partials = partials.mutable_data_ptr<float>();
  float* const db_partials = has_bias ? dw_partials + programs * shape.width : nullptr;
  const auto stream = current_stream();
  norm_backward(shape, dout.const_data_ptr(), pointer(added), values.const_data_ptr(), w.const_data_ptr(),
                static_cast<const float*>(pointer(centre)), scale.const_data_ptr<float>(),
                dx.mutable_data_ptr(), dw_partials, db_partials, programs, stream);
  sum_partials(dw_partials, dw.mutable_data_ptr(), shape.parameter_dtype, programs, shape.width, stream);
  if (has_bias) {
    sum_partials(db_partials, db.mutable_data_ptr(), shape.parameter_dtype, programs, shape.width, stream);
  }
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) { implement_norms<forward, backward>(m); }

}  // namespace fastgpt::cuda
