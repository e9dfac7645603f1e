// dropout_add on CUDA tensors. The equations are in fastgpt/ops/dropout.py.
#include "cuda/dropout.h"
#include "cuda/tensors.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;

Tensor dropout_add_forward_op(const Tensor& x, const Tensor& residual, const Tensor& seed, double p) {
  const DeviceGuard guard(x);
  const auto dtype = c10::promoteTypes(x.scalar_type(), residual.scalar_type());
  // 16-bit x beside an fp32 residual is read as it is; other mixtures are fp32 first.
  const Tensor values = plain(x, residual.scalar_type() == dtype ? x.scalar_type() : dtype);
  const Tensor added = plain(residual, dtype);
  const Tensor y = at::empty(x.sizes(), added.options());
  dropout_add_forward(values.const_data_ptr(), dtype_of(values), added.const_data_ptr(), y.mutable_data_ptr(),
                      dtype_of(y), seed.const_data_ptr<int64_t>(), p, x.numel(), current_stream());
  return y;
}

Tensor dropout_add_backward_op(const Tensor& dy, const Tensor& seed, double p, at::ScalarType dtype) {
  const DeviceGuard guard(dy);
  const Tensor dout = plain(dy, dy.scalar_type() == dtype ? dtype : at::kFloat);
  const Tensor dx = at::empty(dy.sizes(), dy.options().dtype(dtype));
  dropout_add_backward(dout.const_data_ptr(), dtype_of(dout), dx.mutable_data_ptr(), dtype_of(dx),
                       seed.const_data_ptr<int64_t>(), p, dy.numel(), current_stream());
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("dropout_add_forward", &dropout_add_forward_op);
  m.impl("dropout_add_backward", &dropout_add_backward_op);
}

}  // namespace fastgpt::cuda
