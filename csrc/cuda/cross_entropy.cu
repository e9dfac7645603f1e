#include <algorithm>

#include "cuda/cross_entropy.cuh"
#include "cuda/cross_entropy.h"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {

void cross_entropy_rows(const CrossEntropyRows& rows, cudaStream_t stream) {
  Launch launch("cross_entropy", {rows.rows, rows.width}, stream);
  dispatch(rows.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto aligned = [](const void* data, int64_t stride) {
      return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % Piece<T>::kSize == 0;
    };
    const int64_t pieces = ceil_div(rows.width, Piece<T>::kSize);
    launch.grid(rows.rows);
    launch.block(static_cast<int>(std::min<int64_t>(ceil_div(pieces, kWarpSize) * kWarpSize, kMostThreads)));
    const LossRows<T> p{static_cast<const T*>(rows.logits),
                        rows.targets,
                        rows.dloss,
                        rows.count,
                        rows.losses,
                        static_cast<T*>(rows.dlogits),
                        rows.logits_stride,
                        rows.dlogits_stride,
                        rows.dloss_stride,
                        rows.ignore_index,
                        static_cast<int>(rows.width),
                        static_cast<int>(rows.size),
                        static_cast<float>(rows.label_smoothing),
                        static_cast<float>(rows.z_loss),
                        rows.filled,
                        aligned(rows.logits, rows.logits_stride),
                        aligned(rows.dlogits, rows.dlogits_stride)};
    if constexpr (sizeof(T) == 2) {
      const int64_t bytes = pieces * static_cast<int64_t>(sizeof(Piece<T>));
      if (rows.dlogits != nullptr && bytes <= kMostKept) {
        launch.shared(bytes);
        return launch(cross_entropy_kernel<T, true>, p);
      }
    }
    launch(cross_entropy_kernel<T, false>, p);
  });
}

void count_rows(const int64_t* targets, float* count, int64_t rows, int64_t ignore_index,
                cudaStream_t stream) {
  Launch launch("count_rows", {rows}, stream);
  launch.block(kSumThreads);
  launch(count_rows_kernel, targets, count, rows, ignore_index);
}

void sum_losses(const float* losses, const float* count, float* loss, int64_t rows, cudaStream_t stream) {
  Launch launch("sum_losses", {rows}, stream);
  launch.block(kSumThreads);
  launch(sum_losses_kernel, losses, count, loss, rows);
}

}  // namespace fastgpt::cuda
