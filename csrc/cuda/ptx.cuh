// Instructions that CUDA C++ has no name for. Under the emulator the same functions come from emulator_ptx.h,
// written from the fragment tables of the PTX documentation; tests read the compiled code of these.
//
// Fragments of mma_m16n8k16, lane = 4 g + t; two 16-bit elements a register, the lower column or row in the
// lower half (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"):
//
//     a[0] = A[g    ][2t, 2t+1]      a[1] = A[g + 8][2t, 2t+1]
//     a[2] = A[g    ][2t+8, 2t+9]    a[3] = A[g + 8][2t+8, 2t+9]
//     b[0] = B[2t, 2t+1][g]          b[1] = B[2t+8, 2t+9][g]
//     d[0], d[1] = D[g][2t, 2t+1]    d[2], d[3] = D[g + 8][2t, 2t+1]
//
// ldmatrix: lane 8 i + r holds the address of row r (16 bytes) of the i-th 8 x 8 matrix; out[i] of lane 4 g +
// t is elements 2t and 2t+1 of row g, or with _trans of column g. For x2 the addresses of lanes 0 to 15
// count.
#pragma once

#include <cstdint>

#include "cuda/types.cuh"

#ifdef FASTGPT_EMULATED

#include "emulator_ptx.h"

#else

namespace fastgpt::cuda::ptx {

// d = a b + d; T is half or bf16. All 32 lanes together, as in every instruction here with `aligned`.
template <typename T>
FASTGPT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
FASTGPT_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
FASTGPT_DEVICE void mma_m16n8k16<half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FASTGPT_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

FASTGPT_DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
}

FASTGPT_DEVICE void ldmatrix_x4_trans(uint32_t (&out)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
}

FASTGPT_DEVICE void ldmatrix_x2(uint32_t (&out)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(shared))
               : "memory");
}

FASTGPT_DEVICE void ldmatrix_x2_trans(uint32_t (&out)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(shared))
               : "memory");
}

// Copies 16 bytes past the registers, or writes 16 zero bytes (and reads nothing) when not `valid`.
FASTGPT_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

FASTGPT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most N of this thread's committed groups are under way. Other threads see what this one
// copied after a barrier.
template <int N>
FASTGPT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

// 2^x, relative error 2^-22, subnormal results are 0.
FASTGPT_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x), relative error 2^-22.9.
FASTGPT_DEVICE float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(x), relative error 2^-11: for results that are rounded to 16 bits at once.
FASTGPT_DEVICE float tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastgpt::cuda::ptx

#endif
