// embedding on CUDA tensors. The equations are in fastgpt/ops/embedding.py.
#include <tuple>

#include "cuda/embedding.h"
#include "cuda/tensors.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;

Tensor embedding_forward_op(const Tensor& idx, const Tensor& token_weight, const Tensor& position_weight,
                            int64_t start) {
  const DeviceGuard guard(idx);
  const int64_t vocab_size = token_weight.size(0), width = token_weight.size(1);
  // On a GPU nobody waits to look, and such a token gives NaN.
  TORCH_CHECK_INDEX(!idx.is_cpu() || !idx.lt(0).logical_or_(idx.ge(vocab_size)).any().item<bool>(),
                    "idx is out of range");
  const auto dtype = c10::promoteTypes(token_weight.scalar_type(), position_weight.scalar_type());
  const Tensor tokens = idx.contiguous(), wt = plain(token_weight, dtype), wp = plain(position_weight, dtype);
  const Tensor y = at::empty({idx.size(0), idx.size(1), width}, wt.options());
  const EmbeddingShape shape{idx.size(0), idx.size(1), width, vocab_size, start, dtype_of(y)};
  embedding_forward(shape, tokens.const_data_ptr<int64_t>(), wt.const_data_ptr(), wp.const_data_ptr(),
                    y.mutable_data_ptr(), current_stream());
  return y;
}

std::tuple<Tensor, Tensor> embedding_backward_op(const Tensor& dy, const Tensor& idx, int64_t vocab_size,
                                                 int64_t block_size, int64_t start,
                                                 at::ScalarType token_dtype, at::ScalarType position_dtype) {
  const DeviceGuard guard(dy);
  // Two tables of different dtypes get their gradients in fp32 first.
  const bool same = dy.scalar_type() == token_dtype && dy.scalar_type() == position_dtype;
  const Tensor dout = plain(dy, same ? token_dtype : at::kFloat);
  const EmbeddingShape shape{dy.size(0), dy.size(1), dy.size(2), vocab_size, start, dtype_of(dout)};
  // Sorting 32-bit keys takes half the passes of 64-bit ones; a token out of range stays one.
  const auto [tokens, order] =
      at::sort(idx.flatten().clamp(-1, vocab_size).to(at::kInt), std::optional(true), 0, false);  // stable
  const Tensor dwt = at::zeros({vocab_size, shape.width}, dout.options());
  const Tensor dwp = at::zeros({block_size, shape.width}, dout.options());
  const Tensor partials =
      at::empty({embedding_partials(shape), shape.width}, dout.options().dtype(at::kFloat));
  embedding_backward(shape, dout.const_data_ptr(), tokens.const_data_ptr<int>(),
                     order.const_data_ptr<int64_t>(), dwt.mutable_data_ptr(), dwp.mutable_data_ptr(),
                     partials.mutable_data_ptr<float>(), current_stream());
  return {dwt.to(token_dtype), dwp.to(position_dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("embedding_forward", &embedding_forward_op);
  m.impl("embedding_backward", &embedding_backward_op);
}

}  // namespace fastgpt::cuda
