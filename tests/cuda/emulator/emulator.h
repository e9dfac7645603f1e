// CUDA C++ on the CPU: what csrc/cuda/platform.cuh includes in place of nvcc's built-in names.
//
// The threads of a block are fibers that take turns: each runs until it waits for others, at a barrier or at
// a collective of its warp. The runtime (runtime.cpp) decides who goes on, and stops at what CUDA leaves
// undefined. This file is compiled into the kernels, and so with the sanitizers; the runtime is not.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "emulator_runtime.h"

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block)
#define blockDim (::emulator::current->block_size)
#define gridDim (::emulator::current->grid_size)

#define FASTGPT_SHARED(T, name, count)      \
  static const char name##_declaration = 0; \
  T(&name)                                  \
  [count] = *static_cast<T(*)[count]>(::emulator::shared(&name##_declaration, #name, sizeof(T[count])))
#define FASTGPT_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::dynamic_shared()
#define FASTGPT_CHECK_ALIGNED(pointer, bytes) ::emulator::check_aligned(pointer, bytes, EMULATOR_HERE)

// Where the code is; as the default of a parameter, where the caller is.
#define EMULATOR_HERE ::emulator::Site::here()
#define __launch_bounds__(...)

constexpr int warpSize = 32;
using std::max;
using std::min;

namespace emulator {

inline void check_aligned(const void* pointer, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) misaligned(pointer, bytes, site);
}

template <typename T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(static_cast<void*>(&value), &word, sizeof(T));
  return value;
}

// What lane `source` brought.
template <typename T>
T shuffle(uint32_t mask, T value, int source, const char* name, Site site) {
  const uint64_t word = to_word(value);
  const Words* words = exchange(mask, &word, 1, nullptr, name, site);
  if ((mask >> source & 1) == 0)
    fail(site, "%s reads lane %d, which is not in mask %08x", name, source, mask);
  return from_word<T>(words[source][0]);
}

inline int first_lane(int width) { return current->lane & ~(width - 1); }

inline uint32_t ballot(uint32_t mask, bool predicate, const char* name, Site site) {
  const uint64_t word = predicate;
  const Words* words = exchange(mask, &word, 1, nullptr, name, site);
  uint32_t set = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    if (mask >> lane & 1) set |= static_cast<uint32_t>(words[lane][0]) << lane;
  }
  return set;
}

// Atomically *address = change(*address); what was there before.
template <typename T, typename Change>
T update(T* address, Site site, Change change) {
  check_aligned(address, sizeof(T), site);
  before_atomic();
  T old, changed;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    changed = change(old);
  } while (!__atomic_compare_exchange(address, &old, &changed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace emulator

inline void __syncthreads(emulator::Site site = EMULATOR_HERE) {
  emulator::barrier(0, "__syncthreads", site);
}
inline int __syncthreads_count(int predicate, emulator::Site site = EMULATOR_HERE) {
  return emulator::barrier(predicate != 0, "__syncthreads_count", site);
}
inline int __syncthreads_or(int predicate, emulator::Site site = EMULATOR_HERE) {
  return emulator::barrier(predicate != 0, "__syncthreads_or", site) != 0;
}
inline int __syncthreads_and(int predicate, emulator::Site site = EMULATOR_HERE) {
  return emulator::barrier(predicate == 0, "__syncthreads_and", site) == 0;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, emulator::Site site = EMULATOR_HERE) {
  emulator::warp_barrier(mask, site);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = warpSize, emulator::Site site = EMULATOR_HERE) {
  const int lane = emulator::first_lane(width) + (source & (width - 1));
  return emulator::shuffle(mask, value, lane, "__shfl_sync", site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = warpSize,
                  emulator::Site site = EMULATOR_HERE) {
  const int own = emulator::current->lane, lane = own ^ bits;
  const bool outside = lane >= emulator::first_lane(width) + width;
  return emulator::shuffle(mask, value, outside ? own : lane, "__shfl_xor_sync", site);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = warpSize,
                   emulator::Site site = EMULATOR_HERE) {
  const int own = emulator::current->lane, lane = own + static_cast<int>(delta);
  const bool outside = lane >= emulator::first_lane(width) + width;
  return emulator::shuffle(mask, value, outside ? own : lane, "__shfl_down_sync", site);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = warpSize,
                 emulator::Site site = EMULATOR_HERE) {
  const int own = emulator::current->lane, lane = own - static_cast<int>(delta);
  const bool outside = lane < emulator::first_lane(width);
  return emulator::shuffle(mask, value, outside ? own : lane, "__shfl_up_sync", site);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Site site = EMULATOR_HERE) {
  return emulator::ballot(mask, predicate != 0, "__ballot_sync", site);
}
inline int __any_sync(uint32_t mask, int predicate, emulator::Site site = EMULATOR_HERE) {
  return emulator::ballot(mask, predicate != 0, "__any_sync", site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, emulator::Site site = EMULATOR_HERE) {
  return emulator::ballot(mask, predicate != 0, "__all_sync", site) == mask;
}

template <typename T>
T atomicAdd(T* address, T value, emulator::Site site = EMULATOR_HERE) {
  return emulator::update(address, site, [value](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* address, T value, emulator::Site site = EMULATOR_HERE) {
  return emulator::update(address, site, [value](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* address, T value, emulator::Site site = EMULATOR_HERE) {
  return emulator::update(address, site, [value](T old) { return std::min(old, value); });
}
template <typename T>
T atomicExch(T* address, T value, emulator::Site site = EMULATOR_HERE) {
  return emulator::update(address, site, [value](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T expected, T value, emulator::Site site = EMULATOR_HERE) {
  return emulator::update(address, site, [=](T old) { return old == expected ? value : old; });
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Cache hints change no value.
#define EMULATOR_LOAD(name)                                    \
  template <typename T>                                        \
  T name(const T* from, emulator::Site site = EMULATOR_HERE) { \
    emulator::check_aligned(from, alignof(T), site);           \
    return *from;                                              \
  }
#define EMULATOR_STORE(name)                                       \
  template <typename T>                                            \
  void name(T* to, T value, emulator::Site site = EMULATOR_HERE) { \
    emulator::check_aligned(to, alignof(T), site);                 \
    *to = value;                                                   \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_LOAD
#undef EMULATOR_STORE

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return static_cast<uint32_t>(uint64_t{x} * y >> 32); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline float __uint_as_float(uint32_t x) { return emulator::from_word<float>(x); }
inline uint32_t __float_as_uint(float x) { return static_cast<uint32_t>(emulator::to_word(x)); }
inline float __int_as_float(int x) { return emulator::from_word<float>(static_cast<uint32_t>(x)); }
inline int __float_as_int(float x) { return static_cast<int>(emulator::to_word(x)); }
