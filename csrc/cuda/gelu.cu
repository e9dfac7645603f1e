#include <algorithm>

#include "cuda/aligned.h"
#include "cuda/gelu.cuh"
#include "cuda/gelu.h"
#include "cuda/launch.cuh"
#include "cuda/partials.h"

namespace fastgpt::cuda {
namespace {

// function(Type<T>(), std::bool_constant<kTanh>())
template <typename Function>
void dispatch_form(DType dtype, bool tanh, Function&& function) {
  dispatch(dtype, [&](auto type) {
    if (tanh) {
      function(type, std::true_type());
    } else {
      function(type, std::false_type());
    }
  });
}

int piece(DType dtype) { return dtype == DType::kFloat ? Vec<float>::kSize : Vec<half>::kSize; }

int64_t tiles_of(DType dtype, int64_t width) { return ceil_div(width, kWarpSize * piece(dtype)); }

}  // namespace

void gelu_forward(const void* x, void* y, DType dtype, bool tanh, int64_t n, cudaStream_t stream) {
  Launch launch("gelu_forward", {n}, stream);
  dispatch_form(dtype, tanh, [&](auto type, auto form) {
    using T = typename decltype(type)::type;
    launch.grid(ceil_div(n, kGeluThreads * kGeluElements<T>)).block(kGeluThreads);
    launch(gelu_forward_kernel<T, form()>, static_cast<const T*>(x), static_cast<T*>(y), n, aligned(x, y));
  });
}

void gelu_backward(const void* dy, const void* x, void* dx, DType dtype, bool tanh, int64_t n,
                   cudaStream_t stream) {
  Launch launch("gelu_backward", {n}, stream);
  dispatch_form(dtype, tanh, [&](auto type, auto form) {
    using T = typename decltype(type)::type;
    launch.grid(ceil_div(n, kGeluThreads * kGeluElements<T>)).block(kGeluThreads);
    launch(gelu_backward_kernel<T, form()>, static_cast<const T*>(dy), static_cast<const T*>(x),
           static_cast<T*>(dx), n, aligned(dy, x, dx));
  });
}

void bias_gelu_forward(const void* x, const void* bias, void* y, DType dtype, bool tanh, int64_t rows,
                       int64_t width, cudaStream_t stream) {
  const bool whole = aligned(x, bias, y) && width % piece(dtype) == 0;
  const int64_t tiles = tiles_of(dtype, width);
  Launch launch("bias_gelu_forward", {rows, width}, stream);
  launch.grid(tiles * ceil_div(rows, kBiasWarps * kBiasRows)).block(kWarpSize, kBiasWarps);
  dispatch_form(dtype, tanh, [&](auto type, auto form) {
    using T = typename decltype(type)::type;
    launch(bias_gelu_forward_kernel<T, form()>, static_cast<const T*>(x), static_cast<const T*>(bias),
           static_cast<T*>(y), rows, width, tiles, whole);
  });
}

int64_t bias_gelu_partials(DType dtype, int64_t rows, int64_t width, int sm_count) {
  const int64_t tiles = std::max<int64_t>(tiles_of(dtype, width), 1);
  return std::min(ceil_div(rows, kBiasWarps), ceil_div(kBiasBlocksPerSm * sm_count, tiles));
}

void bias_gelu_backward(const void* dy, const void* x, const void* bias, void* dx, void* db, float* partials,
                        int64_t count, DType dtype, bool tanh, int64_t rows, int64_t width,
                        cudaStream_t stream) {
  const bool whole = aligned(dy, x, bias, dx) && width % piece(dtype) == 0;
  Launch launch("bias_gelu_backward", {rows, width}, stream);
  launch.grid(tiles_of(dtype, width), count).block(kWarpSize, kBiasWarps);
  dispatch_form(dtype, tanh, [&](auto type, auto form) {
    using T = typename decltype(type)::type;
    launch(bias_gelu_backward_kernel<T, form()>, static_cast<const T*>(dy), static_cast<const T*>(x),
           static_cast<const T*>(bias), static_cast<T*>(dx), partials, rows, width, whole);
  });
  sum_partials(partials, db, dtype, count, width, stream);
}

}  // namespace fastgpt::cuda
