// Causal attention in fp32, on the FMA units: equations and order of the kernels as in attention_forward.cuh
// and attention_backward.cuh. For exactness and for tests; training is in 16 bits.
//
// Launch: each warp has R rows of its own (queries, or keys for dk and dv) and goes through tiles of 32 rows
// of the other kind, which the block has in shared memory: first a lane has a row of the tile, for the
// scores, then columns lane, lane + 32, ... of the sums. Any D up to 32 C, no alignment.
#pragma once

#include "cuda/attention_pairs.cuh"
#include "cuda/reduce.cuh"

namespace fastgpt::cuda {

template <int kColumns>
struct Fp32Launch {
  static constexpr int C = kColumns;
  static constexpr int kWarps = 4;
  static constexpr int R = C <= 4 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = R * kWarps;

  // `own`: matrices of which a warp has rows; `weights`: sums that it makes.
  static int64_t shared(int D, int own, int weights) {
    return 4 * (own * D * kRows + 2 * kWarpSize * (D | 1) + weights * kWarpSize * kRows);
  }
};

// Rows of a (limit, D) matrix, zeros past `limit`: those of each warp transposed, (warps, D, R).
template <typename L>
FASTGPT_DEVICE void load_own(float* own, const float* from, int64_t stride, int first, int limit, int D) {
  for (int i = threadIdx.x; i < L::kRows * D; i += L::kThreads) {
    const int row = i / D, d = i % D;
    own[(row / L::R * D + d) * L::R + row % L::R] =
        first + row < limit ? from[(first + row) * stride + d] : 0.0f;
  }
}

// The same of 32 rows, each beginning at an odd distance from the last: lanes at one column meet no bank
// twice.
template <typename L>
FASTGPT_DEVICE void load_rows(float* rows, const float* from, int64_t stride, int first, int limit, int D) {
  for (int i = threadIdx.x; i < kWarpSize * D; i += L::kThreads) {
    const int row = i / D, d = i % D;
    rows[row * (D | 1) + d] = first + row < limit ? from[(first + row) * stride + d] : 0.0f;
  }
}

// This lane's row of the tile times the warp's own rows. In four sums, each a quarter as long: backward takes
// differences of such products.
template <int R>
FASTGPT_DEVICE void dot_rows(float (&s)[R], const float* own, const float* rows, int D) {
  const float* row = rows + threadIdx.x % kWarpSize * (D | 1);
  float parts[4][R] = {};
  for (int first = 0; first < D; first += 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = first + i;
      if (d < D) {
        const auto values = load_vec<Vec<float, R>>(own + d * R);
#pragma unroll
        for (int r = 0; r < R; ++r) parts[i][r] = fmaf(values[r], row[d], parts[i][r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) s[r] = (parts[0][r] + parts[1][r]) + (parts[2][r] + parts[3][r]);
}

// acc += w rows, with w (32, R) in shared memory, transposed.
template <int R, int C>
FASTGPT_DEVICE void add_rows(float (&acc)[R][C], const float* w, const float* rows, int D) {
  const int lane = threadIdx.x % kWarpSize;
  for (int j = 0; j < kWarpSize; ++j) {
    const auto weights = load_vec<Vec<float, R>>(w + j * R);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int d = lane + kWarpSize * c;
      const float x = d < D ? rows[j * (D | 1) + d] : 0.0f;
#pragma unroll
      for (int r = 0; r < R; ++r) acc[r][c] = fmaf(weights[r], x, acc[r][c]);
    }
  }
}

// Shared memory of a warp, given to its lanes and taken back.
template <int R>
FASTGPT_DEVICE void share(float* w, const float (&values)[R]) {
  Vec<float, R> all;
#pragma unroll
  for (int r = 0; r < R; ++r) all[r] = values[r];
  store_vec(w + threadIdx.x % kWarpSize * R, all);
}

template <int R, int C>
FASTGPT_DEVICE void store_columns(const float (&acc)[R][C], float* to, int64_t stride, int first, int limit,
                                  int D) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int d = threadIdx.x % kWarpSize + kWarpSize * c;
      if (first + r < limit && d < D) to[(first + r) * stride + d] = acc[r][c];
    }
  }
}

FASTGPT_DEVICE bool kept(const Attention& a, int bh, int query, int key) {
  return keep_four(a, query, key / 4, bh) >> (key % 4) & 1;
}

FASTGPT_DEVICE float warp_max(float x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, bit));
  return x;
}

template <typename L>
__global__ void __launch_bounds__(L::kThreads, 4)
    attention_forward_fp32_kernel(const Attention a, const Heads q, const Heads k, const Heads v, float* o,
                                  float* lse) {
  constexpr int R = L::R, C = L::C;
  FASTGPT_DYNAMIC_SHARED(shared);
  const int D = a.D, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float* const w = reinterpret_cast<float*>(shared) + warp * kWarpSize * R;
  float* const own = reinterpret_cast<float*>(shared) + kWarpSize * L::kRows;
  float* const keys = own + L::kRows * D;
  float* const values = keys + kWarpSize * (D | 1);

  const auto [bh, b, h, first_query, start, stop] = query_block(a, L::kRows, kWarpSize);
  const int own_query = first_query + warp * R, position = a.Tk - a.Tq + own_query;
  const float scale2 = a.scale * kLog2e;
  load_own<L>(own, head_of<const float>(q, b, h), q.token, first_query, a.Tq, D);

  float m[R], total[R] = {}, acc[R][C] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) m[r] = -INFINITY;
  for (int first = start; first < stop; first += kWarpSize) {
    load_rows<L>(keys, head_of<const float>(k, b, h), k.token, first, a.Tk, D);
    load_rows<L>(values, head_of<const float>(v, b, h), v.token, first, a.Tk, D);
    __syncthreads();  // the tiles are complete
    float s[R];
    dot_rows(s, own + warp * D * R, keys, D);
    const int key = first + lane;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (!seen(position + r, key, a.window)) s[r] = -INFINITY;
      const float next = fmaxf(m[r], warp_max(s[r]) * scale2);
      const float anchor = next == -INFINITY ? 0.0f : next;  // no key seen yet
      const float shrink = exp2f(m[r] - anchor);
      s[r] = exp2f(fmaf(s[r], scale2, -anchor));
      m[r] = next;
      total[r] = fmaf(total[r], shrink, s[r]);  // of this lane's keys
#pragma unroll
      for (int c = 0; c < C; ++c) acc[r][c] *= shrink;
      if (a.seed && !kept(a, bh, own_query + r, key)) s[r] = 0.0f;
    }
    share(w, s);
    __syncwarp();
    add_rows(acc, w, values, D);
    __syncthreads();  // the tiles and w have been read
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    total[r] = warp_sum(total[r]);
    const float inverse = 1.0f / (total[r] * a.keep);
#pragma unroll
    for (int c = 0; c < C; ++c) acc[r][c] *= inverse;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (lane == 0 && own_query + r < a.Tq) {
      lse[static_cast<int64_t>(bh) * a.Tq + own_query + r] = m[r] + log2f(total[r]);
    }
  }
  const int64_t stride = static_cast<int64_t>(a.H) * D;
  store_columns(acc, o + (static_cast<int64_t>(b) * a.Tq * stride + h * D), stride, own_query, a.Tq, D);
}

// dq, and delta for the kernel below.
template <typename L>
__global__ void __launch_bounds__(L::kThreads, 4)
    attention_backward_queries_fp32_kernel(const Attention a, const float* d_out, const Heads q,
                                           const Heads k, const Heads v, const float* o, const float* lse,
                                           float* delta, const Heads dq) {
  constexpr int R = L::R, C = L::C;
  FASTGPT_DYNAMIC_SHARED(shared);
  const int D = a.D, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float* const w = reinterpret_cast<float*>(shared) + warp * kWarpSize * R;
  float* const own = reinterpret_cast<float*>(shared) + kWarpSize * L::kRows;
  float* const outs = own + L::kRows * D;
  float* const keys = outs + L::kRows * D;
  float* const values = keys + kWarpSize * (D | 1);

  const auto [bh, b, h, first_query, start, stop] = query_block(a, L::kRows, kWarpSize);
  const int own_query = first_query + warp * R, position = a.Tk - a.Tq + own_query;
  const int64_t o_stride = static_cast<int64_t>(a.H) * D;
  const int64_t o_head = static_cast<int64_t>(b) * a.Tq * o_stride + h * D;
  const float scale2 = a.scale * kLog2e, kept_scale = 1.0f / a.keep;
  load_own<L>(own, head_of<const float>(q, b, h), q.token, first_query, a.Tq, D);
  load_own<L>(outs, d_out + o_head, o_stride, first_query, a.Tq, D);

  float row_lse[R], row_delta[R] = {}, acc[R][C] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = o_head + (own_query + r) * o_stride;
    const bool inside = own_query + r < a.Tq;
    for (int d = lane; inside && d < D; d += kWarpSize)
      row_delta[r] = fmaf(d_out[row + d], o[row + d], row_delta[r]);
    row_delta[r] = warp_sum(row_delta[r]);
    row_lse[r] = inside ? lse[static_cast<int64_t>(bh) * a.Tq + own_query + r] : INFINITY;  // then p = 0
    if (lane == 0 && inside) delta[static_cast<int64_t>(bh) * a.Tq + own_query + r] = row_delta[r];
  }
  for (int first = start; first < stop; first += kWarpSize) {
    load_rows<L>(keys, head_of<const float>(k, b, h), k.token, first, a.Tk, D);
    load_rows<L>(values, head_of<const float>(v, b, h), v.token, first, a.Tk, D);
    __syncthreads();  // the tiles are complete
    float s[R], dp[R];
    dot_rows(s, own + warp * D * R, keys, D);
    dot_rows(dp, outs + warp * D * R, values, D);
    const int key = first + lane;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float p = seen(position + r, key, a.window) ? exp2f(fmaf(s[r], scale2, -row_lse[r])) : 0.0f;
      if (a.seed) dp[r] = kept(a, bh, own_query + r, key) ? dp[r] * kept_scale : 0.0f;
      dp[r] = p * (dp[r] - row_delta[r]);
    }
    share(w, dp);
    __syncwarp();
    add_rows(acc, w, keys, D);
    __syncthreads();  // the tiles and w have been read
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) acc[r][c] *= a.scale;
  }
  store_columns(acc, head_of<float>(dq, b, h), dq.token, own_query, a.Tq, D);
}

template <typename L>
__global__ void __launch_bounds__(L::kThreads, 4)
    attention_backward_keys_fp32_kernel(const Attention a, const float* d_out, const Heads q, const Heads k,
                                        const Heads v, const float* lse, const float* delta, const Heads dk,
                                        const Heads dv) {
  constexpr int R = L::R, C = L::C;
  FASTGPT_DYNAMIC_SHARED(shared);
  const int D = a.D, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float* const weights = reinterpret_cast<float*>(shared) + warp * 2 * kWarpSize * R;
  float* const gradients = weights + kWarpSize * R;
  float* const own = reinterpret_cast<float*>(shared) + 2 * kWarpSize * L::kRows;
  float* const values = own + L::kRows * D;
  float* const queries = values + L::kRows * D;
  float* const outs = queries + kWarpSize * (D | 1);

  const int blocks = (a.Tk + L::kRows - 1) / L::kRows, offset = a.Tk - a.Tq;
  const int bh = blockIdx.x / blocks, b = bh / a.H, h = bh % a.H;
  const int first_key = static_cast<int>(blockIdx.x % blocks) * L::kRows, own_key = first_key + warp * R;
  const int start = max(first_key - offset, 0) / kWarpSize * kWarpSize;
  const int stop = min(first_key + L::kRows - 1 + a.window - offset, a.Tq);
  const int64_t o_stride = static_cast<int64_t>(a.H) * D;
  const float* const do_head = d_out + (static_cast<int64_t>(b) * a.Tq * o_stride + h * D);
  const float scale2 = a.scale * kLog2e, kept_scale = 1.0f / a.keep;
  load_own<L>(own, head_of<const float>(k, b, h), k.token, first_key, a.Tk, D);
  load_own<L>(values, head_of<const float>(v, b, h), v.token, first_key, a.Tk, D);

  float dk_acc[R][C] = {}, dv_acc[R][C] = {};
  for (int first = start; first < stop; first += kWarpSize) {
    load_rows<L>(queries, head_of<const float>(q, b, h), q.token, first, a.Tq, D);
    load_rows<L>(outs, do_head, o_stride, first, a.Tq, D);
    const int query = first + lane;
    const int64_t statistic = static_cast<int64_t>(bh) * a.Tq + query;
    const float column_lse = query < a.Tq ? lse[statistic] : INFINITY;  // then p = 0
    const float column_delta = query < a.Tq ? delta[statistic] : 0.0f;
    __syncthreads();  // the tiles are complete
    float s[R], dp[R];
    dot_rows(s, own + warp * D * R, queries, D);
    dot_rows(dp, values + warp * D * R, outs, D);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float p =
          seen(offset + query, own_key + r, a.window) ? exp2f(fmaf(s[r], scale2, -column_lse)) : 0.0f;
      s[r] = p;
      if (a.seed) {
        const float z = kept(a, bh, query, own_key + r) ? kept_scale : 0.0f;
        s[r] = z * p;
        dp[r] *= z;
      }
      dp[r] = p * (dp[r] - column_delta);
    }
    share(weights, s);
    share(gradients, dp);
    __syncwarp();
    add_rows(dv_acc, weights, outs, D);
    add_rows(dk_acc, gradients, queries, D);
    __syncthreads();  // the tiles and what was shared have been read
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) dk_acc[r][c] *= a.scale;
  }
  store_columns(dk_acc, head_of<float>(dk, b, h), dk.token, own_key, a.Tk, D);
  store_columns(dv_acc, head_of<float>(dv, b, h), dv.token, own_key, a.Tk, D);
}

}  // namespace fastgpt::cuda
