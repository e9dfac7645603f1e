// What all attention kernels share: where a head lies, which pairs of a query and a key are seen, which are
// dropped.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attention.h"
#include "cuda/types.cuh"

namespace fastgpt::cuda {

constexpr float kLog2e = 1.4426950408889634f;

template <typename T>
FASTGPT_DEVICE T* head_of(const Heads& tensor, int b, int h) {
  return static_cast<T*>(tensor.data) + (b * tensor.batch + h * tensor.head);
}

// Pairs of positions of queries and keys.
struct Span {
  int first_position, last_position, first_key, last_key;

  FASTGPT_DEVICE bool any_seen(int window) const {
    return first_key <= last_position && last_key > first_position - window;
  }
  FASTGPT_DEVICE bool all_seen(int window) const {
    return last_key <= first_position && first_key > last_position - window;
  }
};

FASTGPT_DEVICE bool seen(int position, int key, int window) {
  return static_cast<unsigned>(position - key) < static_cast<unsigned>(window);
}

// A block's `rows` queries of one head, from `first` on: the last of a head come first, which see the most
// keys. Those that they see lie in [start, stop), start being a multiple of `step`.
struct QueryBlock {
  int bh, b, h, first, start, stop;
};

FASTGPT_DEVICE QueryBlock query_block(const Attention& a, int rows, int step) {
  const int blocks = (a.Tq + rows - 1) / rows, bh = blockIdx.x / blocks;
  const int first = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * rows,
            position = a.Tk - a.Tq + first;
  return {bh,
          bh / a.H,
          bh % a.H,
          first,
          max(position - a.window + 1, 0) / step * step,
          min(position + rows, a.Tk)};
}

// Philox 4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in which
// of the four numbers of 31 bits that it gives are kept: a bit each. Key number 4 * four + i is that of bit
// i.
FASTGPT_DEVICE uint32_t keep_four(const Attention& a, int query, int four, int head) {
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
  uint32_t x0 = query, x1 = four, x2 = head, x3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = __umulhi(x0, 0xd2511f53u), high2 = __umulhi(x2, 0xcd9e8d57u);
    const uint32_t low0 = x0 * 0xd2511f53u, low2 = x2 * 0xcd9e8d57u;
    x0 = high2 ^ x1 ^ key0;
    x1 = low2;
    x2 = high0 ^ x3 ^ key1;
    x3 = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  const uint32_t words[4] = {x0, x1, x2, x3};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t number = words[i] >> 31 ? ~words[i] : words[i];
    bits |= static_cast<uint32_t>(number >= a.threshold) << i;
  }
  return bits;
}

}  // namespace fastgpt::cuda
