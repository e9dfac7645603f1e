// Causal attention, forward, on tensor cores: FlashAttention-2 (Dao, arXiv 2307.08691) on packed or strided
// q, k, v.
//
// Query i, at position t(i) = Tk - Tq + i, sees keys t(i) - window < j <= t(i). For a block of queries, going
// through tiles of N keys from left to right, with s = q k^T and c = log2(e) scale, so that c s is in base 2:
//
//     m' = max(m, max_j s)          a = 2^(c (m - m'))
//     total = a total + sum_j 2^(c (s - m'))
//     o = a o + (z 2^(c (s - m'))) v                   z: dropout
//     after the last tile    o = o / total,   lse = c m + log2 total, in base 2 too
//
// The weight of a row's maximum is then exactly 1 (docs/stability.md says what for).
//
// Bytes, at least: 2 (2 Tq + 2 Tk) D + 4 Tq a head: q, o, k, v once, lse. Flops: 4 D for each pair seen.
//
// Launch: a block of threads for each block of queries of a head, the longest rows of a head first, so that
// the short ones fill the tail; those of a head are neighbours, and find its k and v in L2. Each warp has 16
// R queries. Tiles that no query of the block sees are not read, those that none of a warp's does not
// multiplied; only those that a warp sees in part are masked.
//
// Few queries (decoding) would leave most of a chip idle: there a block takes a share of the keys and writes
// its m, total and o in fp32, and a second kernel adds up the shares. Only the first warp of a block then has
// rows.
//
// Shared memory: [q | k v | k v], two stages: while a tile is multiplied, the next is on its way.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace fastgpt::cuda {

// Head sizes up to 64, 128 and 256. Up to 128 two blocks fit an SM; two row tiles a warp read each k and v
// from shared memory half as often as one would. At 256 o alone takes 128 registers a thread.
template <int D>
struct ForwardLaunch {
  static constexpr int kD = D;
  static constexpr int kWarps = 4;
  static constexpr int R = D <= 128 ? 2 : 1;
  static constexpr int N = D <= 64 ? 64 : 32;
  static constexpr bool kHeld = D <= 64;
  static constexpr int kBlocks = D <= 128 ? 2 : 1;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16 * R * kWarps;
  static constexpr int kShared = 2 * D * (kRows + 4 * N);
};

template <typename T, typename L>
__global__ void __launch_bounds__(L::kThreads, L::kBlocks)
    attention_forward_kernel(const Attention a, const Shares shares, const Heads q, const Heads k,
                             const Heads v, T* o, float* lse) {
  constexpr int R = L::R, N = L::N, kD = L::kD;
  using Rows = Tile<T, L::kRows, kD>;
  using Keys = Tile<T, N, kD>;
  FASTGPT_DYNAMIC_SHARED(shared);
  auto [bh, b, h, first_query, start, stop] = query_block(a, L::kRows, N);
  const int offset = a.Tk - a.Tq;
  if (shares.count > 1) {
    start = max(start, shares.begin + static_cast<int>(blockIdx.y) * shares.size);
    stop = min(stop, shares.begin + static_cast<int>(blockIdx.y + 1) * shares.size);
  }
  const T* const k_head = head_of<const T>(k, b, h);
  const T* const v_head = head_of<const T>(v, b, h);

  const Rows q_tile{shared};
  unsigned char* const stages = shared + Rows::kBytes;
  const auto copy_keys = [&](int first, int stage) {
    const Keys k_tile{stages + stage * 2 * Keys::kBytes}, v_tile{k_tile.bytes + Keys::kBytes};
    copy_rows<L::kThreads>(k_tile, k_head, k.token, first, a.Tk, a.D);
    copy_rows<L::kThreads>(v_tile, v_head, v.token, first, a.Tk, a.D);
    ptx::cp_async_commit();
  };
  copy_rows<L::kThreads>(q_tile, head_of<const T>(q, b, h), q.token, first_query, a.Tq, a.D);
  copy_keys(start, 0);

  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int own_row = threadIdx.x / kWarpSize * 16 * R, own_query = first_query + own_row;
  const float scale2 = a.scale * kLog2e;
  float m[R][2], total[R][2], acc[R][kD / 8][4];
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[r][i] = -INFINITY;
      total[r][i] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[r][n][e] = 0.0f;
    }
  }
  LeftRows<T, L::kRows, kD, R, L::kHeld> queries{q_tile, own_row};
  ptx::cp_async_wait<0>();
  __syncthreads();  // q and the first keys have come
  queries.hold();

  for (int first = start, stage = 0; first < stop; first += N, stage ^= 1) {
    if (first + N < stop) copy_keys(first + N, stage ^ 1);
    const Keys k_tile{stages + stage * 2 * Keys::kBytes}, v_tile{k_tile.bytes + Keys::kBytes};
    const int position = offset + own_query;
    const Span span{position, position + 16 * R - 1, first, first + N - 1};
    if (own_query < a.Tq && span.any_seen(a.window)) {
      float s[R][N / 8][4];
      multiply_rows<T>(s, queries, k_tile);
      if (!span.all_seen(a.window)) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int n = 0; n < N / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int row = 16 * r + g + e / 2 * 8, column = 8 * n + 2 * t + e % 2;
              if (!seen(position + row, first + column, a.window)) s[r][n][e] = -INFINITY;
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float top = -INFINITY;
#pragma unroll
          for (int n = 0; n < N / 8; ++n) top = fmaxf(top, fmaxf(s[r][n][2 * i], s[r][n][2 * i + 1]));
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
          const float next = fmaxf(m[r][i], top);
          // A row that has seen no key yet: 2^(-inf - 0) = 0, where -inf - -inf would be NaN.
          const float anchor = next == -INFINITY ? 0.0f : next;
          const float shrink = ptx::exp2((m[r][i] - anchor) * scale2);
          m[r][i] = next;
          total[r][i] *= shrink;
#pragma unroll
          for (int n = 0; n < N / 8; ++n) {
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; ++e) {
              s[r][n][e] = ptx::exp2((s[r][n][e] - anchor) * scale2);
              total[r][i] += s[r][n][e];  // of this lane's columns
            }
          }
#pragma unroll
          for (int n = 0; n < kD / 8; ++n) {
            acc[r][n][2 * i] *= shrink;
            acc[r][n][2 * i + 1] *= shrink;
          }
        }
        if (a.seed) {
          const Kept kept = keep_queries<N>(a, bh, own_query + 16 * r, first);
#pragma unroll
          for (int n = 0; n < N / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[r][n][e] = kept(n, e) ? s[r][n][e] : 0.0f;
          }
        }
      }
      multiply_columns(acc, s, v_tile);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has been read, the other has come
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[r][i] *= scale2;
      total[r][i] += __shfl_xor_sync(kFullWarp, total[r][i], 1);
      total[r][i] += __shfl_xor_sync(kFullWarp, total[r][i], 2);
    }
  }
  if (shares.count > 1) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = own_query + 16 * r + 8 * i + g;
        if (query >= a.Tq) continue;
        const int64_t row = (static_cast<int64_t>(blockIdx.y) * a.B * a.H + bh) * a.Tq + query;
        if (t == 0) shares.maxima[row] = m[r][i];
        if (t == 0) shares.totals[row] = total[r][i];
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          if (n * 8 >= a.D) continue;
          const Vec<float, 2> pair{acc[r][n][2 * i], acc[r][n][2 * i + 1]};
          store_vec(shares.parts + row * a.D + 8 * n + 2 * t, pair);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = own_query + 16 * r + 8 * i + g;
      if (t == 0 && query < a.Tq) {
        lse[static_cast<int64_t>(bh) * a.Tq + query] = m[r][i] + log2f(total[r][i]);
      }
      const float inverse = 1.0f / (total[r][i] * a.keep);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        acc[r][n][2 * i] *= inverse;
        acc[r][n][2 * i + 1] *= inverse;
      }
    }
  }
  const int64_t stride = static_cast<int64_t>(a.H) * a.D;
  T* const o_head = o + (static_cast<int64_t>(b) * a.Tq * stride + h * a.D);
  store_rows(acc, q_tile, own_row, o_head, stride, first_query, a.Tq, a.D);
}

// Adds up what the shares left, in order: a block for each query of a head, a thread for each column.
//
//     m = max_s m_s,   total = sum_s 2^(m_s - m) total_s,   o = sum_s 2^(m_s - m) o_s / total
template <typename T>
__global__ void attention_combine_kernel(const Attention a, const Shares shares, T* o, float* lse) {
  const int64_t rows = static_cast<int64_t>(a.B) * a.H * a.Tq, row = blockIdx.x;
  float m = -INFINITY, total = 0.0f, sum = 0.0f;
  for (int share = 0; share < shares.count; ++share) m = fmaxf(m, shares.maxima[share * rows + row]);
  const int d = threadIdx.x;
  for (int share = 0; share < shares.count; ++share) {
    const float weight = ptx::exp2(shares.maxima[share * rows + row] - m);
    total = fmaf(weight, shares.totals[share * rows + row], total);
    if (d < a.D) sum = fmaf(weight, shares.parts[(share * rows + row) * a.D + d], sum);
  }
  if (d == 0) lse[row] = m + log2f(total);
  const int64_t query = row % a.Tq, head = row / a.Tq % a.H, batch = row / a.Tq / a.H;
  if (d < a.D) o[((batch * a.Tq + query) * a.H + head) * a.D + d] = from_float<T>(sum / (total * a.keep));
}

}  // namespace fastgpt::cuda
