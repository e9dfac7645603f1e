#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/layer_norm.cuh"
#include "cuda/layer_norm.h"

namespace fastgpt::cuda {
namespace {

constexpr int kProgramsPerSm = 2;

template <typename... Pointers>
bool are_aligned(int64_t width, Pointers... pointers) {
  return width % kColumns == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Threads of a row that is kept in registers.
int row_threads(int64_t width) {
  return width <= kNarrow ? kWarpSize
                          : static_cast<int>(ceil_div(ceil_div(width, kColumns), kWarpSize)) * kWarpSize;
}

int block_rows(int64_t width) { return width <= kNarrow ? kRowWarps : 1; }

// Calls function(chunks) with as many chunks as a thread keeps of a row, a constant.
template <typename Function>
void with_chunks(int64_t width, Function&& function) {
  constexpr int kWarpColumns = kWarpSize * kColumns;
  if (width <= kWarpColumns || width > kNarrow) return function(std::integral_constant<int, 1>());
  if (width <= 3 * kWarpColumns) return function(std::integral_constant<int, 3>());
  return function(std::integral_constant<int, 4>());
}

}  // namespace

void norm_forward(const NormShape& shape, const void* x, const void* residual, const void* w, const void* b,
                  void* y, void* summed, float* mean, float* rstd, float eps, cudaStream_t stream) {
  const auto [rows, width, dtype, parameter_dtype] = shape;
  Launch launch("norm_forward", {rows, width}, stream);
  const bool aligned = are_aligned(width, x, residual, w, b, y, summed);
  const Parameter weight{w, parameter_dtype}, bias{b, parameter_dtype};
  dispatch(dtype, [&, rows = rows, width = width](auto type) {
    using T = typename decltype(type)::type;
    const NormForward<T> p{static_cast<const T*>(x),
                           static_cast<const T*>(residual),
                           weight,
                           bias,
                           static_cast<T*>(y),
                           static_cast<T*>(summed),
                           mean,
                           rstd,
                           rows,
                           static_cast<int>(width),
                           eps,
                           aligned};
    if (width > kWidest) {
      launch.grid(rows).block(kWideThreads);
      return launch(norm_forward_wide<T>, p);
    }
    const int rows_of_block = block_rows(width);
    launch.grid(ceil_div(rows, rows_of_block)).block(row_threads(width), rows_of_block);
    with_chunks(width, [&](auto chunks) { launch(norm_forward<T, chunks()>, p); });
  });
}

int64_t norm_programs(const NormShape& shape, int sms) {
  const int64_t most = static_cast<int64_t>(kProgramsPerSm) * sms;
  if (shape.width <= kWidest) return std::min(ceil_div(shape.rows, block_rows(shape.width)), most);
  const int64_t blocks = ceil_div(shape.width, kWarpSize * kColumns);
  return std::min(ceil_div(shape.rows, kSumWarps), ceil_div(most, blocks));
}

void norm_backward(const NormShape& shape, const void* dy, const void* dsummed, const void* x, const void* w,
                   const float* mean, const float* rstd, void* dx, float* dw, float* db, int64_t programs,
                   cudaStream_t stream) {
  const auto [rows, width, dtype, parameter_dtype] = shape;
  Launch launch("norm_backward", {rows, width}, stream);
  const bool aligned = are_aligned(width, dy, dsummed, x, w, dx);
  const Parameter weight{w, parameter_dtype};
  dispatch(dtype, [&, rows = rows, width = width](auto type) {
    using T = typename decltype(type)::type;
    const NormBackward<T> p{static_cast<const T*>(dy),
                            static_cast<const T*>(dsummed),
                            static_cast<const T*>(x),
                            weight,
                            mean,
                            rstd,
                            static_cast<T*>(dx),
                            dw,
                            db,
                            rows,
                            static_cast<int>(width),
                            aligned};
    if (width > kWidest) {
      launch.grid(rows).block(kWideThreads);
      launch(norm_backward_wide<T>, p);
      launch.grid(ceil_div(width, kWarpSize * kColumns), programs).block(kWarpSize, kSumWarps);
      return launch(norm_sums_wide<T>, p);
    }
    const int rows_of_block = block_rows(width);
    launch.grid(programs).block(row_threads(width), rows_of_block);
    with_chunks(width, [&](auto chunks) {
      constexpr int64_t kRow = chunks() * kColumns * kWarpSize * sizeof(float);
      launch.shared(rows_of_block == 1 ? 0 : rows_of_block * kRow);
      launch(norm_backward<T, chunks()>, p);
    });
  });
}

}  // namespace fastgpt::cuda
