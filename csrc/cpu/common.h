// What the CPU implementations share: element types, plain arrays, and sums in a fixed order.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

#include "cpu/number.h"
#include "shared/plain.h"

namespace fastgpt {

using at::Tensor;

// f(T{}) for the T that is stored in tensors of `dtype`.
template <typename F>
void with_type(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(BFloat16{});
    case at::kHalf:
      return f(Half{});
    default:
      TORCH_CHECK_TYPE(false, "native kernels take float32, float16 and bfloat16, not ", dtype);
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
// Null for a tensor that is absent.
template <typename T>
const T* const_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? const_data<T>(*tensor) : nullptr;
}

// An uninitialised, contiguous tensor on the CPU.
inline Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::empty(shape, at::TensorOptions().dtype(dtype));
}

// Sums over rows are made of sums over blocks of rows, added in order. The blocks depend on the number of
// rows alone, so that the result does not depend on the number of threads.
struct RowBlocks {
  int64_t rows, count, size;

  explicit RowBlocks(int64_t rows)
      : rows(rows), count(std::clamp<int64_t>(rows / 8, 1, 64)), size((rows + count - 1) / count) {}
  int64_t begin(int64_t block) const { return std::min(rows, block * size); }
  int64_t end(int64_t block) const { return std::min(rows, (block + 1) * size); }
};

// partials (blocks, width) -> (width,), of `dtype`.
Tensor sum_blocks(const Tensor& partials, at::ScalarType dtype);

}  // namespace fastgpt
