// One kernel for each function of ptx.cuh. Operands are loaded from, and results stored to, words whose
// offsets tell which they are: test_wrappers.py reads the compiled code.
#include "cuda/ptx.cuh"

using namespace fastgpt::cuda;

template <int N>
__device__ void load(uint32_t (&to)[N], const uint32_t* from) {
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

template <typename T>
__device__ void mma(const uint32_t* in, float* out) {
  uint32_t a[4], b[2];
  float d[4];
  load(a, in);
  load(b, in + 4);
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[6 + i]);
  ptx::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[i] = d[i];
}

template <int N>
__device__ void store(const uint32_t (&from)[N], uint32_t* to) {
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

extern "C" {

__global__ void mma_bf16(const uint32_t* in, float* out) { mma<bf16>(in, out); }

__global__ void mma_half(const uint32_t* in, float* out) { mma<half>(in, out); }

__global__ void ldmatrix_x4(uint32_t* out) {
  FASTGPT_DYNAMIC_SHARED(bytes);
  uint32_t matrix[4];
  ptx::ldmatrix_x4(matrix, bytes);
  store(matrix, out);
}

__global__ void ldmatrix_x4_trans(uint32_t* out) {
  FASTGPT_DYNAMIC_SHARED(bytes);
  uint32_t matrix[4];
  ptx::ldmatrix_x4_trans(matrix, bytes);
  store(matrix, out);
}

__global__ void ldmatrix_x2(uint32_t* out) {
  FASTGPT_DYNAMIC_SHARED(bytes);
  uint32_t matrix[2];
  ptx::ldmatrix_x2(matrix, bytes);
  store(matrix, out);
}

__global__ void ldmatrix_x2_trans(uint32_t* out) {
  FASTGPT_DYNAMIC_SHARED(bytes);
  uint32_t matrix[2];
  ptx::ldmatrix_x2_trans(matrix, bytes);
  store(matrix, out);
}

__global__ void cp_async_16(const void* from, bool valid) {
  FASTGPT_DYNAMIC_SHARED(bytes);
  ptx::cp_async_16(bytes, from, valid);
}

__global__ void cp_async_commit() { ptx::cp_async_commit(); }

__global__ void cp_async_wait() {
  ptx::cp_async_wait<0>();
  ptx::cp_async_wait<1>();
}

__global__ void approximate_exp2(float* x) { *x = ptx::exp2(*x); }

__global__ void approximate_rsqrt(float* x) { *x = ptx::rsqrt(*x); }

__global__ void approximate_tanh(float* x) { *x = ptx::tanh(*x); }

}  // extern "C"
