// What device code is written in: CUDA C++, or its emulation on the CPU (tests/cuda/emulator).
//
// Shared memory is the one declaration whose spelling differs from CUDA's:
//
//     FASTGPT_SHARED(float, sums, 32);     __shared__ float sums[32]
//     FASTGPT_DYNAMIC_SHARED(bytes);       unsigned char* bytes: as many as the launch asked for, 128-byte
//     aligned
#pragma once

#ifdef FASTGPT_EMULATED

#include "emulator.h"

#else

#include <cuda_runtime.h>

#define FASTGPT_CHECK_ALIGNED(pointer, bytes)
#define FASTGPT_SHARED(T, name, count) __shared__ alignas(16) T name[count]
#define FASTGPT_DYNAMIC_SHARED(name)                                       \
  extern __shared__ __align__(128) unsigned char fastgpt_dynamic_shared[]; \
  unsigned char* const name = fastgpt_dynamic_shared

#endif

#define FASTGPT_DEVICE __device__ __forceinline__

namespace fastgpt::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace fastgpt::cuda
