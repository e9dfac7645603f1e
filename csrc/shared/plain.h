// Tensors and matrix products as the CPU and the CUDA kernels both want them.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>

#include <optional>

namespace fastgpt {

// Contiguous and of `dtype`: the tensor itself where it is so already.
inline at::Tensor plain(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.to(dtype).contiguous();
}
inline std::optional<at::Tensor> plain(const std::optional<at::Tensor>& tensor, at::ScalarType dtype) {
  return tensor.has_value() ? std::optional(plain(*tensor, dtype)) : std::nullopt;
}

// (..., width) as (rows, width), a view where strides allow it.
inline at::Tensor as_matrix(const at::Tensor& x) {
  return x.reshape({c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), x.size(-1)});
}

// While it lives, products are of the operands as they are, also in a backward pass under autocast.
struct PlainProducts {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace fastgpt
