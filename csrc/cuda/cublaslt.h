// A matrix product with GELU in its epilogue, by cuBLASLt.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

// y (m, n) = gelu(x w^T + bias) in the tanh form, the only one that cuBLASLt has; rows of x and y have no
// gaps.
struct GeluProduct {
  int64_t m, n, k;
  const void* x;     // (m, k)
  const void* w;     // (n, k), rows `w_stride` apart; or, where `w_transposed`, (k, n), rows `w_stride` apart
  const void* bias;  // (n,), or null
  void* y;
  void* h;  // (m, n), gets the argument of gelu; or null
  int64_t w_stride;
  bool w_transposed;
  bool tf32;  // whether fp32 may be multiplied as tf32
  DType dtype;
};

struct Workspace {
  void* data;
  int64_t bytes;
};

// Whether it was started: false where cuBLASLt has no algorithm for it, such as an n that is no multiple of 8
// with h. `handle` is a cublasLtHandle_t of `device`. Throws std::runtime_error where cuBLASLt reports an
// error. The choice of an algorithm is made once for each kind of product (sizes, types, alignments); nothing
// is allocated on the device and nothing waits for it, so that a CUDA graph can capture it.
bool gelu_product(void* handle, int device, const GeluProduct& product, const Workspace& workspace,
                  cudaStream_t stream);

}  // namespace fastgpt::cuda
