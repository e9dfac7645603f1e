#include "cuda/launch.cuh"
#include "cuda/partials.cuh"
#include "cuda/partials.h"

namespace fastgpt::cuda {

void sum_partials(const float* partials, void* out, DType dtype, int64_t programs, int64_t width,
                  cudaStream_t stream) {
  Launch launch("sum_partials", {programs, width}, stream);
  launch.grid(ceil_div(width, kWarpSize)).block(kWarpSize, kPartialWarps);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(sum_partials_kernel<T>, partials, static_cast<T*>(out), programs, width);
  });
}

}  // namespace fastgpt::cuda
