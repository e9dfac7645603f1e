// What the CPU implementations share: element types, plain arrays, and sums in a fixed order.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
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

// f(begin, end) for the pieces of a range, in parallel where it is longer than `grain`. A thread takes the
// next piece when it is done with one, so that nobody waits for one whose processor is busy with something
// else.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr int64_t kPiecesOfThread = 4;
  const int64_t count = end - begin, most = (count + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), most);
  if (count <= 0) return;
  if (threads <= 1) return f(begin, end);
  const int64_t pieces = std::min(most, threads * kPiecesOfThread), size = (count + pieces - 1) / pieces;
  std::atomic<int64_t> next{begin};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first = next.fetch_add(size); first < end; first = next.fetch_add(size))
      f(first, std::min(first + size, end));
  });
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
