// Cross-entropy and its gradient: a block for a row of V logits, of which the first S count.
//
//     m    = max_c l_c,   t = sum_c exp(l_c - m),   lse = m + log t                over c < S
//     loss = (m - l_y) + log t - e sum_c (l_c - l_y) / S + z lse^2                 0 where y = ignore_index
//     dl_c = g (exp(l_c - m) (1 + 2 z lse) / t - (1 - e) [c = y] - e / S)          0 for c >= S
//
// with g = dloss, for the mean over the number of rows that count. A target that is out of range makes the
// row's loss and gradient NaN, and reads nothing.
//
// Bytes, e an element's: R V e for the loss alone, 2 R V e with the gradient.
//
// Launch: a block a row, up to 512 threads, each with 16 elements a step in pieces of 16 bytes; m and t
// belong to a thread until the row is read. Where rows do not begin at multiples of 16 bytes, as with an odd
// V, the same elements are read one by one, so that a row gives the same bits wherever it lies. Rows of
// 16-bit logits up to kMostKept bytes, which 50304 of them are, wait in shared memory for the second look:
// all copies start at once, 100 KB under way a block. Other rows are read again, last step first, from L2.
#pragma once

#include <cmath>

#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace fastgpt::cuda {

constexpr int kMostThreads = 512;
constexpr int kStep = 16;                    // elements of a thread and step
constexpr int kMostKept = (99 << 10) - 512;  // bytes: what every chip from sm_80 on has for a block
constexpr int kGroups = 4;                   // of copies to shared memory, waited for one by one
constexpr int kSumThreads = 1024;
constexpr float kLowest = -3.402823466e38f;  // finite: -inf - -inf would be NaN

template <typename T>
struct LossRows {
  const T* logits;
  const int64_t* targets;
  const float *dloss, *count;  // null: 1
  float* losses;               // null: not asked for
  T* dlogits;                  // null: not asked for; may be `logits`
  int64_t logits_stride, dlogits_stride, dloss_stride, ignore_index;
  int width, size;  // V and S
  float label_smoothing, z_loss;
  bool filled;                    // dlogits already holds the gradient for a dloss of 1
  bool aligned, dlogits_aligned;  // rows begin at multiples of 16 bytes
};

// e^x, with 0 for results under 1e-38.
FASTGPT_DEVICE float exp_flushed(float x) { return ptx::exp2(x * 1.4426950408889634f); }

FASTGPT_DEVICE float warp_max(float value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, lanes));
  return value;
}

// What is known of a row, or of a thread's part of it. fmaxf passes over NaN, which `total` does not.
struct Sums {
  float top = kLowest, total = 0.0f, excess = 0.0f;  // m; t; sum_c (l_c - shift)
};

// Of a warp's lanes, in all of them.
FASTGPT_DEVICE Sums merge(const Sums& part) {
  Sums all;
  all.top = warp_max(part.top);
  all.total = warp_sum(part.total * exp_flushed(part.top - all.top));
  all.excess = warp_sum(part.excess);
  return all;
}

// Of the block's threads, in all of them. `scratch`: shared memory for 3 * kWarpSize floats.
FASTGPT_DEVICE Sums merge_block(Sums part, float* scratch) {
  part = merge(part);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (lane == 0) {
    scratch[warp] = part.top;
    scratch[kWarpSize + warp] = part.total;
    scratch[2 * kWarpSize + warp] = part.excess;
  }
  __syncthreads();
  if (blockDim.x == kWarpSize) return part;
  part = Sums();
  if (lane < static_cast<int>(blockDim.x) / kWarpSize) {
    part = {scratch[lane], scratch[kWarpSize + lane], scratch[2 * kWarpSize + lane]};
  }
  return merge(part);
}

template <typename T>
using Piece = Vec<T>;

// Columns [column, column + N) of a row, -inf for those that are not among the first `size`.
template <typename T>
FASTGPT_DEVICE Piece<T> load_piece(const T* row, int column, int size, bool aligned) {
  constexpr int N = Piece<T>::kSize;
  if (aligned && column + N <= size) return load_vec<Piece<T>>(row + column);
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < N; ++i) piece[i] = column + i < size ? row[column + i] : from_float<T>(-INFINITY);
  return piece;
}

// A thread's pieces of a row, by step. With kKept they are in shared memory once `keep` and a wait are past.
template <typename T, bool kKept>
struct Reader {
  static constexpr int N = Piece<T>::kSize, kPieces = kStep / N;

  const T* row;
  Piece<T>* kept;
  int size, pieces, steps;
  bool aligned;

  FASTGPT_DEVICE Reader(const LossRows<T>& p, const T* row, unsigned char* shared)
      : row(row), kept(reinterpret_cast<Piece<T>*>(shared)), size(p.size), aligned(p.aligned) {
    pieces = (p.width + N - 1) / N;
    const int in_step = kPieces * static_cast<int>(blockDim.x);
    steps = (pieces + in_step - 1) / in_step;
  }

  FASTGPT_DEVICE int piece(int step, int i) const {
    return (step * kPieces + i) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  FASTGPT_DEVICE int column(int step, int i) const { return piece(step, i) * N; }

  FASTGPT_DEVICE void keep(int step) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int k = piece(step, i), c = column(step, i);
      if (k >= pieces) continue;
      if (aligned && c + N <= size) {
        ptx::cp_async_16(kept + k, row + c, true);
      } else {
        kept[k] = load_piece(row, c, size, aligned);
      }
    }
  }

  FASTGPT_DEVICE void load(float (&out)[kPieces][N], int step) const {
    Piece<T> values[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if constexpr (kKept) {
        const int k = piece(step, i);
        values[i] = k < pieces ? kept[k] : load_piece(row, size, size, false);
      } else {
        values[i] = load_piece(row, column(step, i), size, aligned);
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) out[i][j] = to_float(values[i][j]);
    }
  }

  FASTGPT_DEVICE void add(Sums& sums, int step, bool smooth, float shift) const {
    float x[kPieces][N];
    load(x, step);
    float top = sums.top;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) top = fmaxf(top, x[i][j]);
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) total += exp_flushed(x[i][j] - top);
    }
    sums.total = sums.total * exp_flushed(sums.top - top) + total;
    sums.top = top;
    if (!smooth) return;
    float excess = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int c = column(step, i) + j;
        excess += c < size ? x[i][j] - shift : 0.0f;
      }
    }
    sums.excess += excess;
  }
};

// Waits until the first `group` + 1 of kGroups groups of copies are there.
FASTGPT_DEVICE void wait_for_group(int group) {
  switch (group) {
    case 0:
      return ptx::cp_async_wait<3>();
    case 1:
      return ptx::cp_async_wait<2>();
    case 2:
      return ptx::cp_async_wait<1>();
    default:
      return ptx::cp_async_wait<0>();
  }
}

// A thread reads back no more than it copied itself: no barrier.
template <typename T>
FASTGPT_DEVICE Sums sum_row(const Reader<T, true>& reader, bool smooth, float shift) {
  const int in_group = (reader.steps + kGroups - 1) / kGroups;
  for (int group = 0; group < kGroups; ++group) {
    for (int step = group * in_group; step < min((group + 1) * in_group, reader.steps); ++step) {
      reader.keep(step);
    }
    ptx::cp_async_commit();
  }
  Sums sums;
  for (int group = 0; group < kGroups; ++group) {
    wait_for_group(group);
    for (int step = group * in_group; step < min((group + 1) * in_group, reader.steps); ++step) {
      reader.add(sums, step, smooth, shift);
    }
  }
  return sums;
}

template <typename T>
FASTGPT_DEVICE Sums sum_row(const Reader<T, false>& reader, bool smooth, float shift) {
  Sums sums;
  for (int step = 0; step < reader.steps; ++step) reader.add(sums, step, smooth, shift);
  return sums;
}

// What the gradient of a row is made of: dl_c = exp(l_c - m) scale - everywhere, and at_y in column y.
struct Gradient {
  float top, scale, everywhere, at_y;
  int y;
};

template <typename T, bool kKept>
FASTGPT_DEVICE void store_gradient(const Reader<T, kKept>& reader, int step, const Gradient& g, T* to,
                                   int width, bool aligned) {
  constexpr int N = Reader<T, kKept>::N, kPieces = Reader<T, kKept>::kPieces;
  float dl[kPieces][N];
  reader.load(dl, step);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = reader.column(step, i);
#pragma unroll
    for (int j = 0; j < N; ++j) dl[i][j] = exp_flushed(dl[i][j] - g.top) * g.scale - g.everywhere;
    if (g.y >= column && g.y < column + N) {  // a piece of the row
#pragma unroll
      for (int j = 0; j < N; ++j) dl[i][j] = column + j == g.y ? g.at_y : dl[i][j];
    }
    if (aligned && column + N <= reader.size) {
      Piece<T> rounded;
#pragma unroll
      for (int j = 0; j < N; ++j) rounded[j] = from_float<T>(dl[i][j]);
      store_vec(to + column, rounded);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int c = column + j;
        if (c < width) to[c] = from_float<T>(c < reader.size ? dl[i][j] : 0.0f);
      }
    }
  }
}

template <typename T>
FASTGPT_DEVICE void store_zeros(T* to, int width, bool aligned) {
  constexpr int N = Piece<T>::kSize;
  for (int column = threadIdx.x * N; column < width; column += blockDim.x * N) {
    if (aligned && column + N <= width) {
      store_vec(to + column, Piece<T>{});
    } else {
      for (int c = column; c < min(column + N, width); ++c) to[c] = from_float<T>(0.0f);
    }
  }
}

// Dynamic shared memory for kKept: 16 bytes for every piece of a row.
template <typename T, bool kKept>
__global__ void __launch_bounds__(kMostThreads, 2) cross_entropy_kernel(LossRows<T> p) {
  FASTGPT_SHARED(float, scratch, 3 * kWarpSize);
  FASTGPT_DYNAMIC_SHARED(bytes);
  const int64_t n = blockIdx.x;
  float g = p.dloss != nullptr ? p.dloss[n * p.dloss_stride] : 1.0f;
  if (p.filled && g == 1.0f) return;
  const int64_t target = p.targets[n];
  const T* const row = p.logits + n * p.logits_stride;
  T* const to = p.dlogits + n * p.dlogits_stride;
  if (target == p.ignore_index) {
    if (p.losses != nullptr && threadIdx.x == 0) p.losses[n] = 0.0f;
    if (p.dlogits == nullptr) return;
    return store_zeros(to, p.width, p.dlogits_aligned);
  }

  const bool known = target >= 0 && target < p.size;
  const int y = known ? static_cast<int>(target) : -kStep;  // in no piece
  const float l_y = known ? to_float(row[y]) : NAN;
  const bool smooth = p.label_smoothing != 0.0f;
  const Reader<T, kKept> reader(p, row, bytes);
  // Distances from l_y, so that their sum loses no digits.
  Sums sums = sum_row(reader, smooth, l_y == -INFINITY ? 0.0f : l_y);
  sums = merge_block(sums, scratch);  // whose barrier also lets dlogits be the logits: all have read l_y
  const float log_t = logf(sums.total), lse = sums.top + log_t;
  if (p.losses != nullptr && threadIdx.x == 0) {
    float loss = (sums.top - l_y) + log_t;
    if (smooth) loss -= p.label_smoothing * (sums.excess / p.size);
    p.losses[n] = loss + p.z_loss * lse * lse;
  }
  if (p.dlogits == nullptr) return;

  if (p.count != nullptr) g /= *p.count;
  Gradient gradient;
  gradient.y = y;
  gradient.top = sums.top;
  gradient.scale = known ? g * (1.0f + 2.0f * p.z_loss * lse) / sums.total : NAN;
  gradient.everywhere = g * p.label_smoothing / p.size;
  // p - 1 before the rest: what is left when they cancel is exact, and at V = 1 it is 0.
  const float p_y = exp_flushed(l_y - sums.top) / sums.total;
  gradient.at_y =
      g * ((p_y - 1.0f) + p.label_smoothing + p_y * (2.0f * p.z_loss * lse)) - gradient.everywhere;
  for (int step = reader.steps - 1; step >= 0; --step)
    store_gradient(reader, step, gradient, to, p.width, p.dlogits_aligned);
}

// The number of rows that count. One block.
__global__ void __launch_bounds__(kSumThreads)
    count_rows_kernel(const int64_t* targets, float* count, int64_t rows, int64_t ignore_index) {
  FASTGPT_SHARED(float, scratch, kWarpSize);
  int counted = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kSumThreads) counted += targets[row] != ignore_index;
  const float sum = row_sum(static_cast<float>(counted), scratch);
  if (threadIdx.x == 0) *count = sum;
}

// The sum of the losses, divided by the number of rows that count where that is given: 0 / 0, NaN, without
// any. One block.
__global__ void __launch_bounds__(kSumThreads)
    sum_losses_kernel(const float* losses, const float* count, float* loss, int64_t rows) {
  FASTGPT_SHARED(float, scratch, kWarpSize);
  float sum = 0.0f;
  for (int64_t row = threadIdx.x; row < rows; row += kSumThreads) sum += losses[row];
  sum = row_sum(sum, scratch);
  if (threadIdx.x == 0) *loss = count != nullptr ? sum / *count : sum;
}

}  // namespace fastgpt::cuda
