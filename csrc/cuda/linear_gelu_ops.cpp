// linear_gelu on CUDA tensors: cuBLASLt's product with GELU in its epilogue, or PyTorch's product and gelu
// after it. The equations are in fastgpt/ops/gelu.py.
#include <ATen/Context.h>

#include <algorithm>
#include <string_view>
#include <tuple>

#include "cuda/cublaslt.h"
#include "cuda/gelu.h"
#include "cuda/tensors.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;

#ifdef FASTGPT_EMULATED
void* blas_handle() { return nullptr; }
Workspace workspace() {
  static char bytes[64];
  return {bytes, sizeof(bytes)};
}
#else
// PyTorch's own, of the current device and stream: its products use the same memory one after another, and it
// lives as long as the graphs that were captured with it.
void* blas_handle() { return at::cuda::getCurrentCUDABlasLtHandle(); }
Workspace workspace() {
  return {at::cuda::getCUDABlasLtWorkspace(), static_cast<int64_t>(at::cuda::getCUDABlasLtWorkspaceSize())};
}
#endif

bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// Rows of one length, and whether they are those of the transpose: views with gaps between rows, and
// transposed ones, are read as they are.
struct Rows {
  Tensor tensor;
  int64_t stride;
  bool transposed;

  explicit Rows(const Tensor& w) {
    const auto holds = [&](int64_t row, int64_t column) {
      return w.stride(column) == 1 && w.stride(row) >= std::max<int64_t>(w.size(column), 1);
    };
    transposed = !holds(0, 1) && holds(1, 0);
    tensor = transposed || holds(0, 1) ? w : w.contiguous();
    stride = tensor.stride(transposed ? 1 : 0);
  }
};

std::tuple<Tensor, Tensor> linear_gelu_forward_op(const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  std::string_view approximate, bool save) {
  const DeviceGuard guard(x);
  const PlainProducts products;
  const Tensor values = x.contiguous();
  const std::optional<Tensor> b = bias.has_value() ? std::optional(bias->contiguous()) : std::nullopt;
  const int64_t n = weight.size(0), k = weight.size(1);
  auto shape = x.sizes().vec();
  shape.back() = n;
  const Tensor y = at::empty(shape, values.options());
  if (y.numel() == 0) return {y, at::empty(save ? shape : std::vector<int64_t>{0}, values.options())};
  const bool tanh = approximate == "tanh";
  if (tanh && k > 0) {
    const Tensor h = at::empty(save ? shape : std::vector<int64_t>{0}, values.options());
    const Rows w(weight);
    GeluProduct product;
    product.m = y.numel() / n;
    product.n = n;
    product.k = k;
    product.x = values.const_data_ptr();
    product.w = w.tensor.const_data_ptr();
    product.bias = b.has_value() ? b->const_data_ptr() : nullptr;
    product.y = y.mutable_data_ptr();
    product.h = save ? h.mutable_data_ptr() : nullptr;
    product.w_stride = w.stride;
    product.w_transposed = w.transposed;
    product.tf32 = tf32_allowed();
    product.dtype = dtype_of(values);
    if (gelu_product(blas_handle(), x.device().index(), product, workspace(), current_stream()))
      return {y, h};
  }
  const Tensor h = at::linear(values, weight, b).contiguous();
  gelu_forward(h.const_data_ptr(), y.mutable_data_ptr(), dtype_of(y), tanh, y.numel(), current_stream());
  return {y, save ? h : at::empty({0}, values.options())};
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward_op(const Tensor& dy, const Tensor& x,
                                                           const Tensor& weight, const Tensor& h,
                                                           std::string_view approximate, bool has_bias,
                                                           bool need_dx, bool need_dw) {
  const DeviceGuard guard(x);
  const PlainProducts products;
  const int64_t n = weight.size(0), k = weight.size(1);
  const Tensor dout = plain(dy, h.scalar_type()), saved = h.contiguous();
  const int64_t m = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  const Tensor dh = at::empty({m, n}, saved.options());
  const Tensor db = at::empty({has_bias ? n : 0}, saved.options());
  const DType dtype = dtype_of(saved);
  const bool tanh = approximate == "tanh";
  if (has_bias) {
    const int64_t count = bias_gelu_partials(dtype, m, n, sm_count());
    const Tensor partials = at::empty({count, n}, saved.options().dtype(at::kFloat));
    bias_gelu_backward(dout.const_data_ptr(), saved.const_data_ptr(), nullptr, dh.mutable_data_ptr(),
                       db.mutable_data_ptr(), partials.mutable_data_ptr<float>(), count, dtype, tanh, m, n,
                       current_stream());
  } else {
    gelu_backward(dout.const_data_ptr(), saved.const_data_ptr(), dh.mutable_data_ptr(), dtype, tanh, m * n,
                  current_stream());
  }
  Tensor dx = at::empty({0}, x.options()), dw = at::empty({0}, x.options());
  if (need_dx) dx = at::mm(dh, weight).view(x.sizes());
  if (need_dw) dw = at::mm(dh.t(), x.reshape({m, k}));
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("linear_gelu_forward", &linear_gelu_forward_op);
  m.impl("linear_gelu_backward", &linear_gelu_backward_op);
}

}  // namespace fastgpt::cuda
