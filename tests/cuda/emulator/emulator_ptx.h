// The functions of csrc/cuda/ptx.cuh on the CPU, from the PTX documentation: "Matrix Fragments for
// mma.m16n8k16 with floating point type", "ldmatrix", "cp.async".
#pragma once

#include "cuda/types.cuh"

namespace fastgpt::cuda::ptx {

using emulator::Site;
using emulator::Words;

// Words of a lane: a[0] and a[1], a[2] and a[3], b[0] and b[1], the first in the lower half. In their place
// come the lane's four sums, d[0] and d[1], d[2] and d[3].
// One lane does this for all, which is no race.
template <typename T>
__attribute__((no_sanitize_thread)) void multiply(Words* words) {
  const auto element = [words](int lane, int index) {  // of the 12 that the lane has: 8 of A, 4 of B
    return to_float(emulator::from_word<T>(words[lane][index / 4] >> 16 * (index % 4)));
  };
  float a[16][16], b[16][8], d[16][8] = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) {
      a[group + (i / 2 % 2) * 8][column + i % 2 + (i / 4) * 8] = element(lane, i);
    }
    for (int i = 0; i < 4; ++i) b[column + i % 2 + (i / 2) * 8][group] = element(lane, 8 + i);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      const float* const pair = &d[group + i * 8][column];
      words[lane][i] = emulator::to_word(pair[0]) | emulator::to_word(pair[1]) << 32;
    }
  }
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = EMULATOR_HERE) {
  const auto pair = [](uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; };
  const uint64_t own[3] = {pair(a[0], a[1]), pair(a[2], a[3]), pair(b[0], b[1])};
  const Words* sums = emulator::exchange(kFullWarp, own, 3, multiply<T>, "mma_m16n8k16", site);
  float added[4];
  std::memcpy(added, sums[emulator::current->lane], sizeof(added));
  for (int i = 0; i < 4; ++i) d[i] += added[i];
}

// Each of the first 8 * count lanes reads its row; matrix i has rows 8 i to 8 i + 7.
template <int kCount>
void ldmatrix(uint32_t (&out)[kCount], const void* shared, bool transposed, const char* name, Site site) {
  uint64_t row[2] = {0, 0};
  const int lane = emulator::current->lane;
  if (lane < 8 * kCount) {
    emulator::check_aligned(shared, 16, site);
    emulator::check_shared(shared, 16, name, site);
    for (int i = 0; i < 2; ++i) row[i] = static_cast<const uint64_t*>(shared)[i];
  }
  const Words* rows = emulator::exchange(kFullWarp, row, 2, nullptr, name, site);
  const auto element = [rows](int row, int column) {
    return static_cast<uint32_t>(rows[row][column / 4] >> 16 * (column % 4) & 0xffff);
  };
  const int group = lane / 4, pair = lane % 4 * 2;
  for (int i = 0; i < kCount; ++i) {
    out[i] = transposed ? element(8 * i + pair, group) | element(8 * i + pair + 1, group) << 16
                        : element(8 * i + group, pair) | element(8 * i + group, pair + 1) << 16;
  }
}

inline void ldmatrix_x4(uint32_t (&out)[4], const void* shared, Site site = EMULATOR_HERE) {
  ldmatrix(out, shared, false, "ldmatrix_x4", site);
}
inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* shared, Site site = EMULATOR_HERE) {
  ldmatrix(out, shared, true, "ldmatrix_x4_trans", site);
}
inline void ldmatrix_x2(uint32_t (&out)[2], const void* shared, Site site = EMULATOR_HERE) {
  ldmatrix(out, shared, false, "ldmatrix_x2", site);
}
inline void ldmatrix_x2_trans(uint32_t (&out)[2], const void* shared, Site site = EMULATOR_HERE) {
  ldmatrix(out, shared, true, "ldmatrix_x2_trans", site);
}

inline void cp_async_16(void* shared, const void* global, bool valid, Site site = EMULATOR_HERE) {
  emulator::check_aligned(shared, 16, site);
  emulator::check_aligned(global, 16, site);
  emulator::check_shared(shared, 16, "cp_async_16", site);
  emulator::cp_async(shared, global, valid, site);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int N>
void cp_async_wait() {
  emulator::cp_async_wait(N);
}

inline float exp2(float x) {
  const float y = std::exp2(x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
// As inexact as the instruction: 11 bits, so that a kernel that needs more shows it.
inline float tanh(float x) {
  const float y = std::tanh(x);
  return std::isnan(y) ? y : __uint_as_float((__float_as_uint(y) + 0x800) & ~0xfffu);
}

}  // namespace fastgpt::cuda::ptx
