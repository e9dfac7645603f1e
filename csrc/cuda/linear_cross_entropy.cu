#include "cuda/launch.cuh"
#include "cuda/linear_cross_entropy.cuh"
#include "cuda/linear_cross_entropy.h"

namespace fastgpt::cuda {

void scale(const void* x, DType x_dtype, const float* dloss, const float* count, void* y, DType y_dtype,
           int64_t n, int64_t size, cudaStream_t stream) {
  Launch launch("scale", {size}, stream);
  launch.grid(ceil_div(size, kScaleThreads * kScaleElements)).block(kScaleThreads);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
  dispatch(x_dtype, [&](auto from) {
    dispatch(y_dtype, [&](auto to) {
      using T = typename decltype(from)::type;
      using U = typename decltype(to)::type;
      launch(scale_kernel<T, U>, static_cast<const T*>(x), dloss, count, static_cast<U*>(y), n, size,
             aligned);
    });
  });
}

}  // namespace fastgpt::cuda
