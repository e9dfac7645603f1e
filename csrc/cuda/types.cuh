// Elements in memory (float, half, bf16) and in registers (float), and 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/platform.cuh"

namespace fastgpt::cuda {

using bf16 = __nv_bfloat16;

FASTGPT_DEVICE float to_float(float x) { return x; }
FASTGPT_DEVICE float to_float(half x) { return __half2float(x); }
FASTGPT_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }

// Rounds to nearest even; from_float<T>(to_float(x)) is x.
template <typename T>
FASTGPT_DEVICE T from_float(float x);
template <>
FASTGPT_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FASTGPT_DEVICE half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
FASTGPT_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// Elements that move in one access: 16 bytes, unless told otherwise.
template <typename T, int N = 16 / sizeof(T)>
struct alignas(sizeof(T) * N) Vec {
  static constexpr int kSize = N;
  T values[N];

  FASTGPT_DEVICE T& operator[](int i) { return values[i]; }
  FASTGPT_DEVICE const T& operator[](int i) const { return values[i]; }
};

// `from` and `to` are multiples of the vector's size in bytes.
template <typename V, typename T>
FASTGPT_DEVICE V load_vec(const T* from) {
  FASTGPT_CHECK_ALIGNED(from, sizeof(V));
  return *reinterpret_cast<const V*>(from);
}
template <typename V, typename T>
FASTGPT_DEVICE void store_vec(T* to, const V& values) {
  FASTGPT_CHECK_ALIGNED(to, sizeof(V));
  *reinterpret_cast<V*>(to) = values;
}

// row[column], ..., row[column + N - 1] in fp32, and zeros from `width` on. `aligned`: the row begins at a
// multiple of 16 bytes, as `column` and `width` are multiples of N; then it is read 16 bytes at a time.
template <int N, typename T>
FASTGPT_DEVICE void load_floats(float (&out)[N], const T* row, int column, int width, bool aligned) {
  using V = Vec<T>;
  static_assert(N % V::kSize == 0);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < N; i += V::kSize) {
      const V values = column < width ? load_vec<V>(row + column + i) : V{};
#pragma unroll
      for (int j = 0; j < V::kSize; ++j) out[i + j] = to_float(values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
  }
}

// Rounds and writes those that are before `width`.
template <int N, typename T>
FASTGPT_DEVICE void store_floats(const float (&values)[N], T* row, int column, int width, bool aligned) {
  using V = Vec<T>;
  if (aligned) {
    if (column >= width) return;
#pragma unroll
    for (int i = 0; i < N; i += V::kSize) {
      V rounded;
#pragma unroll
      for (int j = 0; j < V::kSize; ++j) rounded[j] = from_float<T>(values[i + j]);
      store_vec(row + column + i, rounded);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column + i < width) row[column + i] = from_float<T>(values[i]);
    }
  }
}

}  // namespace fastgpt::cuda
