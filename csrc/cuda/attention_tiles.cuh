// What the attention kernels on tensor cores share: tiles in shared memory, products of tiles, and dropout of
// tiles.
//
// All products are of two kinds, with c in registers as mma_m16n8k16 has it (ptx.cuh):
//
//     c (16 R, N) += a b^T    a: 16 R rows of a tile, a warp's own; b: a tile of N rows      `multiply_rows`
//     c (16 R, W) += p b      p: (16 R, N), such a c, rounded; b: the same tile `multiply_columns`
//
// The fragments of a c of the first kind are those of a left operand of the second: p never leaves registers.
// Element e of c[r][n] is in row 16 r + g + 8 (e / 2) and column 8 n + 2 t + e % 2, where lane = 4 g + t.
#pragma once

#include <cstring>

#include "cuda/attention_pairs.cuh"
#include "cuda/ptx.cuh"
#include "cuda/types.cuh"

namespace fastgpt::cuda {

constexpr int kChunk = 8;  // elements of 16 bits in 16 bytes

// kRows rows of kD elements in shared memory. The chunks of a row are permuted by its number, so that the
// eight rows of a matrix that ldmatrix reads, at the same column, lie in different banks.
template <typename T, int kRows, int kD>
struct Tile {
  static constexpr int kChunks = kD / kChunk;
  static constexpr int kBytes = kRows * kD * static_cast<int>(sizeof(T));
  static_assert(kChunks % 8 == 0);

  unsigned char* bytes;

  FASTGPT_DEVICE T* at(int row, int chunk) const {
    return reinterpret_cast<T*>(bytes) + row * kD + (chunk ^ (row & 7)) * kChunk;
  }
};

// Starts to copy rows first, first + 1, ... of a (limit, D) matrix; zeros past `limit` and past D.
template <int kThreads, typename T, int kRows, int kD>
FASTGPT_DEVICE void copy_rows(const Tile<T, kRows, kD>& tile, const T* from, int64_t stride, int first,
                              int limit, int D) {
  constexpr int kChunks = kD / kChunk, kStep = kThreads / kChunks;  // a step: one chunk of each thread
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  const int own = static_cast<int>(threadIdx.x) / kChunks, chunk = threadIdx.x % kChunks;
  const T* source = from + static_cast<int64_t>(first + own) * stride + chunk * kChunk;
  const int rows = chunk * kChunk < D ? limit - first : 0;
#pragma unroll
  for (int row = own; row < own + kRows; row += kStep) {
    ptx::cp_async_16(tile.at(row, chunk), source, row < rows);
    source += kStep * stride;
  }
}

FASTGPT_DEVICE uint32_t pack(float low, float high, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}
FASTGPT_DEVICE uint32_t pack(float low, float high, half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

// The 16 R rows from `first` of a tile, as left operands: kept in registers or, where kHeld is false, read
// from the tile again for each product.
template <typename T, int kRows, int kD, int R, bool kHeld>
struct LeftRows {
  Tile<T, kRows, kD> tile;
  int first;
  uint32_t held[R][kHeld ? kD / 16 : 1][4];

  FASTGPT_DEVICE void read(uint32_t (&a)[4], int r, int k) const {
    const int lane = threadIdx.x % kWarpSize;
    ptx::ldmatrix_x4(a, tile.at(first + 16 * r + lane % 16, 2 * k + lane / 16));
  }

  FASTGPT_DEVICE void hold() {
    if constexpr (kHeld) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int k = 0; k < kD / 16; ++k) read(held[r][k], r, k);
      }
    }
  }

  FASTGPT_DEVICE void fragment(uint32_t (&a)[4], int r, int k) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[r][k][i];
    } else {
      read(a, r, k);
    }
  }
};

// c += a b for the two n8 columns that one ldmatrix_x4 brings.
template <typename T>
FASTGPT_DEVICE void multiply_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  ptx::mma_m16n8k16<T>(left, a, first);
  ptx::mma_m16n8k16<T>(right, a, second);
}

// c = a b^T. (16 R, kD) (N, kD)^T
template <typename T, int kRows, int kD, int R, bool kHeld, int N>
FASTGPT_DEVICE void multiply_rows(float (&c)[R][N / 8][4], const LeftRows<T, kRows, kD, R, kHeld>& a,
                                  const Tile<T, N, kD>& b) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[r][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t left[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r) a.fragment(left[r], r, k);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, b.at(16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int r = 0; r < R; ++r) multiply_pair<T>(c[r][2 * n], c[r][2 * n + 1], left[r], right);
    }
  }
}

// c += p b, for the columns of b from chunk `chunk` on. (16 R, N) (N, W)
template <typename T, int kD, int R, int N, int W8>
FASTGPT_DEVICE void multiply_columns(float (&c)[R][W8][4], const float (&p)[R][N / 8][4],
                                     const Tile<T, N, kD>& b, int chunk = 0) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    uint32_t left[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &p[r][2 * k + i / 2][i % 2 * 2];
        left[r][i] = pack(pair[0], pair[1], T());
      }
    }
#pragma unroll
    for (int n = 0; n < W8 / 2; ++n) {
      uint32_t right[4];
      ptx::ldmatrix_x4_trans(right, b.at(16 * k + lane % 16, chunk + 2 * n + lane / 16));
#pragma unroll
      for (int r = 0; r < R; ++r) multiply_pair<T>(c[r][2 * n], c[r][2 * n + 1], left[r], right);
    }
  }
}

// Writes c to rows first + row0, ... of a (limit, D) matrix, from column 8 `chunk` on, 16 bytes at a time, by
// way of rows row0, ... of a tile: those of this warp alone, which it has read before the last barrier or not
// at all.
template <typename T, int kRows, int kD, int R, int W8>
FASTGPT_DEVICE void store_rows(const float (&c)[R][W8][4], const Tile<T, kRows, kD>& tile, int row0, T* to,
                               int64_t stride, int first, int limit, int D, int chunk = 0) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int n = 0; n < W8; ++n) {
#pragma unroll
      for (int half_tile = 0; half_tile < 2; ++half_tile) {
        const uint32_t word = pack(c[r][n][2 * half_tile], c[r][n][2 * half_tile + 1], T());
        Vec<T, 2> pair;
        memcpy(&pair, &word, sizeof(word));
        store_vec(tile.at(row0 + 16 * r + 8 * half_tile + lane / 4, n) + lane % 4 * 2, pair);
      }
    }
  }
  __syncwarp();  // the rows are complete
  for (int i = lane; i < 16 * R * W8; i += kWarpSize) {
    const int row = row0 + i / W8, column = chunk + i % W8;
    if (first + row < limit && column * kChunk < D) {
      store_vec(to + (first + row) * stride + column * kChunk, load_vec<Vec<T>>(tile.at(row, i % W8)));
    }
  }
}

// What dropout keeps of a (16, N) piece of scores: bit 4 n of words[e] is that of element e of c[n]. A
// function of seed, head, query and key alone: the same in every kernel, whatever its tiles.
struct Kept {
  uint32_t words[4];
  FASTGPT_DEVICE bool operator()(int n, int e) const { return words[e] >> (4 * n) & 1; }
};

// Rows are queries, columns keys from a multiple of 4 on. A number of Philox's is for four keys of one query,
// which two neighbouring lanes hold, each with the queries g and g + 8: one draws for either, then they
// exchange.
template <int N>
FASTGPT_DEVICE Kept keep_queries(const Attention& a, int bh, int first_query, int first_key) {
  static_assert(N <= 64);  // bits of a word
  const int lane = threadIdx.x % kWarpSize, odd = lane % 2;
  uint32_t own = 0;
#pragma unroll 1
  for (int n = 0; n < N / 8; ++n) {
    const int query = first_query + lane / 4 + 8 * odd, four = first_key / 4 + 2 * n + lane % 4 / 2;
    own |= keep_four(a, query, four, bh) << (4 * n);
  }
  const uint32_t other = __shfl_xor_sync(kFullWarp, own, 1);
  const uint32_t low = (odd ? other : own) >> (2 * odd), high = (odd ? own : other) >> (2 * odd);
  return {{low, low >> 1, high, high >> 1}};
}

// Rows are keys, columns queries: each lane draws for one query and four keys, and takes from four others.
template <int N>
FASTGPT_DEVICE Kept keep_keys(const Attention& a, int bh, int first_query, int first_key) {
  static_assert(N <= 64);
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  uint32_t own = 0;
#pragma unroll 1
  for (int n = 0; n < N / 8; ++n) {
    const int query = first_query + 8 * n + lane % 8, four = first_key / 4 + lane / 8;
    own |= keep_four(a, query, four, bh) << (4 * n);
  }
  Kept kept;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int source = (g / 4 + e / 2 * 2) * 8 + 2 * t + e % 2;
    kept.words[e] = __shfl_sync(kFullWarp, own, source) >> (g % 4);
  }
  return kept;
}

}  // namespace fastgpt::cuda
