#include <algorithm>
#include <cmath>

#include "cuda/aligned.h"
#include "cuda/dropout.cuh"
#include "cuda/dropout.h"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {
namespace {

// p 2^32, to the nearest: p is then met to 2^-33.
uint32_t threshold_of(double p) {
  return static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
}

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
    launch(dropout_add_forward_kernel<X, Y>, static_cast<const X*>(x), static_cast<const Y*>(residual),
           static_cast<Y*>(y), seed, threshold_of(p), 1 / (1 - p), n, aligned(x, residual, y));
  });
}

void dropout_add_backward(const void* dy, DType dy_dtype, void* dx, DType dx_dtype, const int64_t* seed,
                          double p, int64_t n, cudaStream_t stream) {
  Launch launch = prepared("dropout_add_backward", n, stream);
  dispatch_pair(dx_dtype, dy_dtype, [&](auto narrow, auto wide) {
    using X = typename decltype(narrow)::type;
    using Y = typename decltype(wide)::type;
    launch(dropout_add_backward_kernel<Y, X>, static_cast<const Y*>(dy), static_cast<X*>(dx), seed,
           threshold_of(p), 1 / (1 - p), n, aligned(dy, dx));
  });
}

}  // namespace fastgpt::cuda
