// Causal attention, backward, on tensor cores: two kernels that recompute the weights from lse, without
// atomics.
//
//     s2 = log2(e) scale q k^T,   p = 2^(s2 - lse)      lse in base 2; p = 0 where hidden
//     delta_i = sum_d do_id o_id
//     ds = p (z (do v^T) - delta)                               z: dropout, drawn again
//     dq = scale ds k,   dk = scale ds^T q,   dv = (z p)^T do
//
// The first kernel has a block of queries and goes through the keys that they see: delta, which it makes from
// its rows of do and o and leaves for the second, and dq. The second has a block of keys and goes through the
// queries that see them: dk and dv. Its tiles are transposed, (keys, queries): p^T and ds^T are then left
// operands as they come. Each sum has one owner and one order, so every bit is the same on each run. The
// gradients go where their strides say: for packed qkv into one (B, T, 3, H, D).
//
// Bytes, at least: 2 (4 Tq + 4 Tk) D + 4 Tq a head (q, do, o, dq, k, v, dk, dv; lse); as it is, q, do, k and
// v twice. Flops: 14 D for each pair seen, s and dp being made in both kernels, against 10 D for one kernel
// with atomics.
//
// Launch and shared memory as in attention_forward.cuh: each warp has 16 rows, and the other kind of rows
// comes in tiles of N, in two stages.
#pragma once

#include "cuda/attention_tiles.cuh"
#include "cuda/reduce.cuh"

namespace fastgpt::cuda {

// Head sizes up to 64, 128 and 256. Up to 64 the fragments of a warp's own rows stay in registers.
template <int D>
struct BackwardLaunch {
  static constexpr int kD = D;
  static constexpr int kWarps = D <= 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16 * kWarps;
  static constexpr bool kHeld = D <= 64;
};

// At 64 two blocks fit an SM, with tiles of 32 keys.
template <int D>
struct QueriesLaunch : BackwardLaunch<D> {
  static constexpr int N = D <= 128 ? 32 : 16;
  static constexpr int kBlocks = D <= 64 ? 2 : 1;
  static constexpr int kShared = 2 * D * (2 * BackwardLaunch<D>::kRows + 4 * N);
};

// dk and dv take two sums a column: at 256 a block has half of the columns, for which s and dp are made
// twice.
template <int D>
struct KeysLaunch : BackwardLaunch<D> {
  static constexpr int N = D <= 64 ? 64 : D <= 128 ? 32 : 16;
  static constexpr int W = D <= 128 ? D : 128;
  static constexpr int kStatistics = 2 * N;  // floats a stage: lse and delta
  static constexpr int kShared = 2 * D * (2 * BackwardLaunch<D>::kRows + 4 * N) + 2 * 4 * kStatistics;
};

// sum_d x_d y_d of rows of D <= 256 elements, a multiple of 8: at most one access of 16 bytes a lane.
template <typename T>
FASTGPT_DEVICE float dot_row(const T* x, const T* y, int D) {
  const int lane = threadIdx.x % kWarpSize;
  float sum = 0.0f;
  if (lane * kChunk < D) {
    const auto xs = load_vec<Vec<T>>(x + lane * kChunk), ys = load_vec<Vec<T>>(y + lane * kChunk);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum = fmaf(to_float(xs[i]), to_float(ys[i]), sum);
  }
  return warp_sum(sum);
}

template <typename T, typename L>
__global__ void __launch_bounds__(L::kThreads, L::kBlocks)
    attention_backward_queries_kernel(const Attention a, const T* d_out, const Heads q, const Heads k,
                                      const Heads v, const T* o, const float* lse, float* delta,
                                      const Heads dq) {
  constexpr int N = L::N, kD = L::kD;
  using Rows = Tile<T, L::kRows, kD>;
  using Keys = Tile<T, N, kD>;
  FASTGPT_DYNAMIC_SHARED(shared);
  const auto [bh, b, h, first_query, start, stop] = query_block(a, L::kRows, N);
  const int offset = a.Tk - a.Tq;
  const int64_t o_stride = static_cast<int64_t>(a.H) * a.D;
  const int64_t o_head = static_cast<int64_t>(b) * a.Tq * o_stride + h * a.D;
  const T* const k_head = head_of<const T>(k, b, h);
  const T* const v_head = head_of<const T>(v, b, h);

  const Rows q_tile{shared}, do_tile{shared + Rows::kBytes};
  unsigned char* const stages = shared + 2 * Rows::kBytes;
  const auto copy_keys = [&](int first, int stage) {
    const Keys k_tile{stages + stage * 2 * Keys::kBytes}, v_tile{k_tile.bytes + Keys::kBytes};
    copy_rows<L::kThreads>(k_tile, k_head, k.token, first, a.Tk, a.D);
    copy_rows<L::kThreads>(v_tile, v_head, v.token, first, a.Tk, a.D);
    ptx::cp_async_commit();
  };
  copy_rows<L::kThreads>(q_tile, head_of<const T>(q, b, h), q.token, first_query, a.Tq, a.D);
  copy_rows<L::kThreads>(do_tile, d_out + o_head, o_stride, first_query, a.Tq, a.D);
  copy_keys(start, 0);

  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int own_row = threadIdx.x / kWarpSize * 16, own_query = first_query + own_row;
  const float scale2 = a.scale * kLog2e, kept_scale = 1.0f / a.keep;
  // Of rows g and g + 8. Past Tq, lse = inf makes p = 0.
  float row_lse[2] = {INFINITY, INFINITY}, row_delta[2] = {};
  const int rows = min(16, a.Tq - own_query);
#pragma unroll 2
  for (int row = 0; row < rows; ++row) {
    const int64_t at = o_head + (own_query + row) * o_stride;
    const float sum = dot_row(d_out + at, o + at, a.D);
    const int64_t statistic = static_cast<int64_t>(bh) * a.Tq + own_query + row;
    if (lane == 0) delta[statistic] = sum;
    if (row == g) row_delta[0] = sum;
    if (row == g + 8) row_delta[1] = sum;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = g + 8 * i;
    if (row < rows) row_lse[i] = lse[static_cast<int64_t>(bh) * a.Tq + own_query + row];
  }
  float acc[1][kD / 8][4] = {};
  LeftRows<T, L::kRows, kD, 1, L::kHeld> queries{q_tile, own_row}, outs{do_tile, own_row};
  ptx::cp_async_wait<0>();
  __syncthreads();  // q, do and the first keys have come
  queries.hold();
  outs.hold();

  for (int first = start, stage = 0; first < stop; first += N, stage ^= 1) {
    if (first + N < stop) copy_keys(first + N, stage ^ 1);
    const Keys k_tile{stages + stage * 2 * Keys::kBytes}, v_tile{k_tile.bytes + Keys::kBytes};
    const int position = offset + own_query;
    const Span span{position, position + 15, first, first + N - 1};
    if (own_query < a.Tq && span.any_seen(a.window)) {
      float p[1][N / 8][4], dp[1][N / 8][4];
      multiply_rows<T>(p, queries, k_tile);
      multiply_rows<T>(dp, outs, v_tile);
      const bool whole = span.all_seen(a.window);
      Kept kept{};
      if (a.seed) kept = keep_queries<N>(a, bh, own_query, first);
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[0][n][e] = ptx::exp2(fmaf(p[0][n][e], scale2, -row_lse[e / 2]));
          const bool hidden =
              !whole && !seen(position + g + e / 2 * 8, first + 8 * n + 2 * t + e % 2, a.window);
          if (hidden) p[0][n][e] = 0.0f;
          if (a.seed) dp[0][n][e] = kept(n, e) ? dp[0][n][e] * kept_scale : 0.0f;
          dp[0][n][e] = p[0][n][e] * (dp[0][n][e] - row_delta[e / 2]);
        }
      }
      multiply_columns(acc, dp, k_tile);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has been read, the other has come
  }
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][n][e] *= a.scale;
  }
  store_rows(acc, q_tile, own_row, head_of<T>(dq, b, h), dq.token, first_query, a.Tq, a.D);
}

template <typename T, typename L>
__global__ void __launch_bounds__(L::kThreads)
    attention_backward_keys_kernel(const Attention a, const T* d_out, const Heads q, const Heads k,
                                   const Heads v, const float* lse, const float* delta, const Heads dk,
                                   const Heads dv) {
  constexpr int N = L::N, kD = L::kD, W = L::W;
  using Rows = Tile<T, L::kRows, kD>;
  using Queries = Tile<T, N, kD>;
  FASTGPT_DYNAMIC_SHARED(shared);
  const int blocks = (a.Tk + L::kRows - 1) / L::kRows;
  const int bh = blockIdx.x / blocks, b = bh / a.H, h = bh % a.H;
  const int first_key = static_cast<int>(blockIdx.x % blocks) * L::kRows;  // the first are seen most
  const int chunk = static_cast<int>(blockIdx.y) * (W / kChunk);
  const int offset = a.Tk - a.Tq;
  const int start = max(first_key - offset, 0) / N * N;
  const int stop = min(first_key + L::kRows - 1 + a.window - offset, a.Tq);
  const int64_t o_stride = static_cast<int64_t>(a.H) * a.D;
  const T* const do_head = d_out + (static_cast<int64_t>(b) * a.Tq * o_stride + h * a.D);
  const T* const q_head = head_of<const T>(q, b, h);
  lse += static_cast<int64_t>(bh) * a.Tq;
  delta += static_cast<int64_t>(bh) * a.Tq;

  const Rows k_tile{shared}, v_tile{shared + Rows::kBytes};
  unsigned char* const stages = shared + 2 * Rows::kBytes;
  float* const statistics = reinterpret_cast<float*>(stages + 4 * Queries::kBytes);
  const auto copy_queries = [&](int first, int stage) {
    const Queries q_tile{stages + stage * 2 * Queries::kBytes}, do_tile{q_tile.bytes + Queries::kBytes};
    copy_rows<L::kThreads>(q_tile, q_head, q.token, first, a.Tq, a.D);
    copy_rows<L::kThreads>(do_tile, do_head, o_stride, first, a.Tq, a.D);
    ptx::cp_async_commit();
    if (threadIdx.x < N) {  // past Tq, lse = inf makes p = 0, and the zeros of q and do make the rest 0
      const int query = first + static_cast<int>(threadIdx.x);
      float* const own = statistics + stage * L::kStatistics + threadIdx.x;
      own[0] = query < a.Tq ? lse[query] : INFINITY;
      own[N] = query < a.Tq ? delta[query] : 0.0f;
    }
  };
  copy_rows<L::kThreads>(k_tile, head_of<const T>(k, b, h), k.token, first_key, a.Tk, a.D);
  copy_rows<L::kThreads>(v_tile, head_of<const T>(v, b, h), v.token, first_key, a.Tk, a.D);
  copy_queries(start, 0);

  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int own_row = threadIdx.x / kWarpSize * 16, own_key = first_key + own_row;
  const float scale2 = a.scale * kLog2e, kept_scale = 1.0f / a.keep;
  float dk_acc[1][W / 8][4] = {}, dv_acc[1][W / 8][4] = {};
  LeftRows<T, L::kRows, kD, 1, L::kHeld> keys{k_tile, own_row}, values{v_tile, own_row};
  ptx::cp_async_wait<0>();
  __syncthreads();     // k, v and the first queries have come
  if (start < stop) {  // keys out of all windows are not read: no barrier comes before their gradients
    keys.hold();
    values.hold();
  }

  for (int first = start, stage = 0; first < stop; first += N, stage ^= 1) {
    if (first + N < stop) copy_queries(first + N, stage ^ 1);
    const Queries q_tile{stages + stage * 2 * Queries::kBytes}, do_tile{q_tile.bytes + Queries::kBytes};
    const float* const column_lse = statistics + stage * L::kStatistics;
    const float* const column_delta = column_lse + N;
    const int position = offset + first;
    const Span span{position, position + N - 1, own_key, own_key + 15};
    if (own_key < a.Tk && span.any_seen(a.window)) {
      float p[1][N / 8][4], dp[1][N / 8][4];
      multiply_rows<T>(p, keys, q_tile);
      multiply_rows<T>(dp, values, do_tile);
      const bool whole = span.all_seen(a.window);
      Kept kept{};
      if (a.seed) kept = keep_keys<N>(a, bh, first, own_key);
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = 8 * n + 2 * t + e % 2;
          p[0][n][e] = ptx::exp2(fmaf(p[0][n][e], scale2, -column_lse[column]));
          if (!whole && !seen(position + column, own_key + g + e / 2 * 8, a.window)) p[0][n][e] = 0.0f;
          float zp = p[0][n][e];
          if (a.seed) {
            zp = kept(n, e) ? zp * kept_scale : 0.0f;
            dp[0][n][e] = kept(n, e) ? dp[0][n][e] * kept_scale : 0.0f;
          }
          dp[0][n][e] = p[0][n][e] * (dp[0][n][e] - column_delta[column]);
          p[0][n][e] = zp;
        }
      }
      multiply_columns(dv_acc, p, do_tile, chunk);
      multiply_columns(dk_acc, dp, q_tile, chunk);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage has been read, the other has come
  }
#pragma unroll
  for (int n = 0; n < W / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dk_acc[0][n][e] *= a.scale;
  }
  store_rows(dk_acc, k_tile, own_row, head_of<T>(dk, b, h), dk.token, first_key, a.Tk, a.D, chunk);
  store_rows(dv_acc, v_tile, own_row, head_of<T>(dv, b, h), dv.token, first_key, a.Tk, a.D, chunk);
}

}  // namespace fastgpt::cuda
