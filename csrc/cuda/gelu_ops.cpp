// gelu and bias_gelu on CUDA tensors. The equations are in fastgpt/ops/gelu.py.
#include <string_view>
#include <tuple>

#include "cuda/gelu.h"
#include "cuda/tensors.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;

Tensor gelu_forward_op(const Tensor& x, std::string_view approximate) {
  const DeviceGuard guard(x);
  const Tensor values = x.contiguous();
  const Tensor y = at::empty(x.sizes(), x.options());
  gelu_forward(values.const_data_ptr(), y.mutable_data_ptr(), dtype_of(x), approximate == "tanh", x.numel(),
               current_stream());
  return y;
}

Tensor gelu_backward_op(const Tensor& dy, const Tensor& x, std::string_view approximate) {
  const DeviceGuard guard(x);
  const Tensor dout = plain(dy, x.scalar_type()), values = x.contiguous();
  const Tensor dx = at::empty(x.sizes(), x.options());
  gelu_backward(dout.const_data_ptr(), values.const_data_ptr(), dx.mutable_data_ptr(), dtype_of(x),
                approximate == "tanh", x.numel(), current_stream());
  return dx;
}

Tensor bias_gelu_forward_op(const Tensor& x, const Tensor& bias, std::string_view approximate) {
  const DeviceGuard guard(x);
  const auto dtype = c10::promoteTypes(x.scalar_type(), bias.scalar_type());
  const Tensor values = plain(x, dtype), b = plain(bias, dtype);
  const Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
  const int64_t width = bias.numel(), rows = width == 0 ? 0 : x.numel() / width;
  bias_gelu_forward(values.const_data_ptr(), b.const_data_ptr(), y.mutable_data_ptr(), dtype_of(y),
                    approximate == "tanh", rows, width, current_stream());
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_op(const Tensor& dy, const Tensor& x, const Tensor& bias,
                                                 std::string_view approximate) {
  const DeviceGuard guard(x);
  const auto dtype = c10::promoteTypes(x.scalar_type(), bias.scalar_type());
  const Tensor dout = plain(dy, dtype), values = plain(x, dtype), b = plain(bias, dtype);
  const Tensor dx = at::empty(x.sizes(), values.options()), db = at::empty(bias.sizes(), values.options());
  const int64_t width = bias.numel(), rows = width == 0 ? 0 : x.numel() / width;
  const int64_t count = bias_gelu_partials(dtype_of(dx), rows, width, sm_count());
  const Tensor partials = at::empty({count, width}, x.options().dtype(at::kFloat));
  bias_gelu_backward(dout.const_data_ptr(), values.const_data_ptr(), b.const_data_ptr(),
                     dx.mutable_data_ptr(), db.mutable_data_ptr(), partials.mutable_data_ptr<float>(), count,
                     dtype_of(dx), approximate == "tanh", rows, width, current_stream());
  return {dx.to(x.scalar_type()), db.to(bias.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("gelu_forward", &gelu_forward_op);
  m.impl("gelu_backward", &gelu_backward_op);
  m.impl("bias_gelu_forward", &bias_gelu_forward_op);
  m.impl("bias_gelu_backward", &bias_gelu_backward_op);
}

}  // namespace fastgpt::cuda
