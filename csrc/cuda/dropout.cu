#include "cuda/aligned.h"
#include "cuda/dropout.cuh"
#include "cuda/dropout.h"
#include "cuda/launch.cuh"
#include "shared/dropout.h"

namespace fastgpt::cuda {
namespace {

// function(Type<Narrow>(), Type<Wide>()), where Wide is Narrow or float.
template <typename Function>
void dispatch_pair(DType narrow, DType wide, Function&& function) {
  dispatch(narrow, [&](auto type) {
    if (narrow == wide) {
      function(type, type);
    } else {
      function(type, Type<float>());
    }
  });
}

Launch prepared(const char* name, int64_t n, cudaStream_t stream) {
  Launch launch(name, {n}, stream);
  launch.grid(ceil_div(n, 4 * kQuarter)).block(kDropoutThreads);
  return launch;
}

}  // namespace

void dropout_add_forward(const void* x, DType x_dtype, const void* residual, void* y, DType y_dtype,
                         const int64_t* seed, double p, int64_t n, cudaStream_t stream) {
  Launch launch = prepared("dropout_add_forward", n, stream);
  dispatch_pair(x_dtype, y_dtype, [&](auto narrow, auto wide) {
    using X = typename decltype(narrow)::type;
    using Y = typename decltype(wide)::type;
    launch(dropout_add_kernel<X, Y, true>, static_cast<const X*>(x), static_cast<const Y*>(residual),
           static_cast<Y*>(y), seed, dropout_threshold_of(p), 1 / (1 - p), n, aligned(x, residual, y));
  });
}

void dropout_add_backward(const void* dy, DType dy_dtype, void* dx, DType dx_dtype, const int64_t* seed,
                          double p, int64_t n, cudaStream_t stream) {
  Launch launch = prepared("dropout_add_backward", n, stream);
  dispatch_pair(dx_dtype, dy_dtype, [&](auto narrow, auto wide) {
    using X = typename decltype(narrow)::type;
    using Y = typename decltype(wide)::type;
    launch(dropout_add_kernel<Y, X, false>, static_cast<const Y*>(dy), nullptr, static_cast<X*>(dx), seed,
           dropout_threshold_of(p), 1 / (1 - p), n, aligned(dy, dx));
  });
}

}  // namespace fastgpt::cuda
