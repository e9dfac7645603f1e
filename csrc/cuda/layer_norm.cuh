// LayerNorm, RMSNorm, and LayerNorm with the residual addition before it.
//
//     s    = x + residual                          or x, without one
//     mean = sum_c s / C                           0 for RMSNorm, which has no `mean`
//     rstd = 1 / sqrt(sum_c (s - mean)^2 / C + eps)
//     xhat = (s - mean) * rstd
//     y    = xhat * w + b
//
//     g  = dy * w
//     dx = rstd * (g - sum_c g / C - xhat * sum_c (g * xhat) / C) + ds      no sum_c g for RMSNorm
//     dw = sum_rows dy * xhat,  db = sum_rows dy
//
// Bytes, e an element's: forward 2 R C e (x, y), with the addition 4 R C e; backward 3 R C e (dy, x, dx),
// with ds 4.
//
// Launch: a block is blockDim.y rows of blockDim.x threads each. Rows up to kNarrow columns have a warp and
// no barrier, longer ones a block of 8 columns a thread; the row is read once and stays in registers.
// Backward goes through the rows with a stride, keeps the sums for dw and db in registers, and writes one
// partial sum a block. Rows longer than kWidest are read again from L2 for each pass, and dw and db have a
// kernel of their own.
#pragma once

#include "cuda/dtype.h"
#include "cuda/reduce.cuh"

namespace fastgpt::cuda {

constexpr int kNarrow = 1024, kWidest = 4096;
constexpr int kRowWarps = 4;       // rows of a block, where a row has a warp
constexpr int kWideThreads = 512;  // of a row longer than kWidest
constexpr int kColumns = 8;        // of a thread, where it does not keep the row
constexpr int kSumWarps = 8;

// Weights and biases, whose type need not be that of x.
struct Parameter {
  const void* data;
  DType dtype;
};

template <int N>
FASTGPT_DEVICE void load_floats(float (&out)[N], Parameter from, int column, int width, bool aligned) {
  switch (from.dtype) {
    case DType::kFloat:
      return load_floats(out, static_cast<const float*>(from.data), column, width, aligned);
    case DType::kHalf:
      return load_floats(out, static_cast<const half*>(from.data), column, width, aligned);
    case DType::kBFloat16:
      return load_floats(out, static_cast<const bf16*>(from.data), column, width, aligned);
  }
}

template <typename T>
struct NormForward {
  const T *x, *residual;  // residual and summed may be null
  Parameter w, b;         // b may be null
  T *y, *summed;
  float *mean, *rstd;  // mean is null for RMSNorm
  int64_t rows;
  int width;
  float eps;
  bool aligned;  // 16-byte accesses throughout
};

template <typename T>
struct NormBackward {
  const T *dy, *dsummed, *x;  // dsummed may be null
  Parameter w;
  const float *mean, *rstd;
  T* dx;
  float *dw, *db;  // (programs, width) partial sums; db may be null
  int64_t rows;
  int width;
  bool aligned;
};

// x, or the rounded x + residual, which is what backward reads.
template <int N, typename T>
FASTGPT_DEVICE void load_sum(float (&out)[N], const NormForward<T>& p, int64_t row, int column) {
  const int64_t at = row * p.width;
  load_floats(out, p.x + at, column, p.width, p.aligned);
  if (p.residual == nullptr) return;
  float added[N];
  load_floats(added, p.residual + at, column, p.width, p.aligned);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(from_float<T>(out[i] + added[i]));
}

template <int N, typename T>
FASTGPT_DEVICE void store_normalised(const float (&s)[N], const NormForward<T>& p, int64_t row, int column,
                                     float mean, float rstd) {
  const int64_t at = row * p.width;
  if (p.summed != nullptr) store_floats(s, p.summed + at, column, p.width, p.aligned);
  float w[N], b[N] = {}, y[N];
  load_floats(w, p.w, column, p.width, p.aligned);
  if (p.b.data != nullptr) load_floats(b, p.b, column, p.width, p.aligned);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = (s[i] - mean) * rstd * w[i] + b[i];
  store_floats(y, p.y + at, column, p.width, p.aligned);
}

template <typename T>
FASTGPT_DEVICE void store_statistics(const NormForward<T>& p, int64_t row, float mean, float rstd) {
  if (threadIdx.x != 0) return;
  if (p.mean != nullptr) p.mean[row] = mean;
  p.rstd[row] = rstd;
}

// kChunks times kColumns elements of the row are in each thread.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kChunks == 1 ? kWidest / kColumns : kWarpSize * kRowWarps)
    norm_forward(NormForward<T> p) {
  FASTGPT_SHARED(float, scratch, kWarpSize);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // a warp of its own, for which no barrier waits
  float s[kChunks][kColumns];
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    load_sum(s[c], p, row, (c * blockDim.x + threadIdx.x) * kColumns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum += s[c][i];
  }
  const float mean = p.mean == nullptr ? 0.0f : row_sum(sum, scratch) / p.width;
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = (c * blockDim.x + threadIdx.x) * kColumns;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float centred = column + i < p.width ? s[c][i] - mean : 0.0f;
      squares += centred * centred;
    }
  }
  const float rstd = rsqrtf(row_sum(squares, scratch) / p.width + p.eps);
  store_statistics(p, row, mean, rstd);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    store_normalised(s[c], p, row, (c * blockDim.x + threadIdx.x) * kColumns, mean, rstd);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWideThreads) norm_forward_wide(NormForward<T> p) {
  FASTGPT_SHARED(float, scratch, kWarpSize);
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * kColumns, step = kWideThreads * kColumns;
  float mean = 0.0f, sum = 0.0f, s[kColumns];
  if (p.mean != nullptr) {
    for (int column = first; column < p.width; column += step) {
      load_sum(s, p, row, column);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum += s[i];
    }
    mean = row_sum(sum, scratch) / p.width;
  }
  float squares = 0.0f;
  for (int column = first; column < p.width; column += step) {
    load_sum(s, p, row, column);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float centred = column + i < p.width ? s[i] - mean : 0.0f;
      squares += centred * centred;
    }
  }
  const float rstd = rsqrtf(row_sum(squares, scratch) / p.width + p.eps);
  store_statistics(p, row, mean, rstd);
  for (int column = first; column < p.width; column += step) {
    load_sum(s, p, row, column);
    store_normalised(s, p, row, column, mean, rstd);
  }
}

// xhat and dy of the columns from `column` on; zeros past the row.
template <int N, typename T>
FASTGPT_DEVICE void load_row(float (&xhat)[N], float (&dy)[N], const NormBackward<T>& p, int64_t row,
                             int column) {
  const int64_t at = row * p.width;
  const float mean = p.mean == nullptr ? 0.0f : p.mean[row], rstd = p.rstd[row];
  load_floats(dy, p.dy + at, column, p.width, p.aligned);
  load_floats(xhat, p.x + at, column, p.width, p.aligned);
#pragma unroll
  for (int i = 0; i < N; ++i) xhat[i] = column + i < p.width ? (xhat[i] - mean) * rstd : 0.0f;
}

template <int N, typename T>
FASTGPT_DEVICE void store_dx(const float (&xhat)[N], const float (&g)[N], const NormBackward<T>& p,
                             int64_t row, int column, float mean_g, float mean_gx) {
  const int64_t at = row * p.width;
  const float rstd = p.rstd[row];
  float dx[N], ds[N] = {};
  if (p.dsummed != nullptr) load_floats(ds, p.dsummed + at, column, p.width, p.aligned);
#pragma unroll
  for (int i = 0; i < N; ++i) dx[i] = rstd * (g[i] - mean_g - xhat[i] * mean_gx) + ds[i];
  store_floats(dx, p.dx + at, column, p.width, p.aligned);
}

// The sums of a block's rows, kept in the threads of each: added over threadIdx.y, in order, into a partial
// sum.
template <int kChunks>
FASTGPT_DEVICE void store_partial(const float (&sums)[kChunks][kColumns], float* partial, int width,
                                  float* scratch) {
  const int threads = blockDim.x, rows = blockDim.y, slots = kChunks * kColumns * threads;
  if (rows > 1) {
    __syncthreads();  // what was in scratch has been read
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        scratch[threadIdx.y * slots + (c * kColumns + i) * threads + threadIdx.x] = sums[c][i];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = (c * threads + threadIdx.x) * kColumns + i;
      if ((c * kColumns + i) % rows != static_cast<int>(threadIdx.y) || column >= width) continue;
      float sum = sums[c][i];
      if (rows > 1) {
        sum = 0.0f;
        for (int y = 0; y < rows; ++y) sum += scratch[y * slots + (c * kColumns + i) * threads + threadIdx.x];
      }
      partial[column] = sum;
    }
  }
}

// Dynamic shared memory: none for blocks of one row, else a float a row and column.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kChunks == 1 ? kWidest / kColumns : kWarpSize * kRowWarps)
    norm_backward(NormBackward<T> p) {
  FASTGPT_SHARED(float, scratch, 2 * kWarpSize);
  FASTGPT_DYNAMIC_SHARED(bytes);
  float dw[kChunks][kColumns] = {}, db[kChunks][kColumns] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    float xhat[kChunks][kColumns], g[kChunks][kColumns];
    float sums[2] = {0.0f, 0.0f};  // of g, of g * xhat
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = (c * blockDim.x + threadIdx.x) * kColumns;
      float w[kColumns];
      load_row(xhat[c], g[c], p, row, column);
      load_floats(w, p.w, column, p.width, p.aligned);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        dw[c][i] += g[c][i] * xhat[c][i];
        db[c][i] += g[c][i];
        g[c][i] *= w[i];
        sums[0] += g[c][i];
        sums[1] += g[c][i] * xhat[c][i];
      }
    }
    row_sum(sums, scratch);
    const float mean_g = p.mean == nullptr ? 0.0f : sums[0] / p.width, mean_gx = sums[1] / p.width;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      store_dx(xhat[c], g[c], p, row, (c * blockDim.x + threadIdx.x) * kColumns, mean_g, mean_gx);
    }
  }
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.width;
  store_partial(dw, p.dw + at, p.width, reinterpret_cast<float*>(bytes));
  if (p.db != nullptr) store_partial(db, p.db + at, p.width, reinterpret_cast<float*>(bytes));
}

template <typename T>
__global__ void __launch_bounds__(kWideThreads) norm_backward_wide(NormBackward<T> p) {
  FASTGPT_SHARED(float, scratch, 2 * kWarpSize);
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * kColumns, step = kWideThreads * kColumns;
  float sums[2] = {0.0f, 0.0f}, xhat[kColumns], g[kColumns], w[kColumns];
  const auto load = [&](int column) {
    load_row(xhat, g, p, row, column);
    load_floats(w, p.w, column, p.width, p.aligned);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) g[i] *= w[i];
  };
  for (int column = first; column < p.width; column += step) {
    load(column);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      sums[0] += g[i];
      sums[1] += g[i] * xhat[i];
    }
  }
  row_sum(sums, scratch);
  const float mean_g = p.mean == nullptr ? 0.0f : sums[0] / p.width, mean_gx = sums[1] / p.width;
  for (int column = first; column < p.width; column += step) {
    load(column);
    store_dx(xhat, g, p, row, column, mean_g, mean_gx);
  }
}

// dw and db of long rows: a block has kWarpSize * kColumns columns, and rows with a stride.
template <typename T>
__global__ void __launch_bounds__(kWarpSize* kSumWarps) norm_sums_wide(NormBackward<T> p) {
  FASTGPT_SHARED(float, scratch, kSumWarps * kWarpSize * kColumns);
  const int first = blockIdx.x * kWarpSize * kColumns, column = first + threadIdx.x * kColumns;
  float dw[1][kColumns] = {}, db[1][kColumns] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kSumWarps + threadIdx.y; row < p.rows;
       row += static_cast<int64_t>(gridDim.y) * kSumWarps) {
    float xhat[kColumns], dy[kColumns];
    load_row(xhat, dy, p, row, column);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      dw[0][i] += dy[i] * xhat[i];
      db[0][i] += dy[i];
    }
  }
  const int64_t at = static_cast<int64_t>(blockIdx.y) * p.width + first;
  store_partial(dw, p.dw + at, p.width - first, scratch);
  if (p.db != nullptr) store_partial(db, p.db + at, p.width - first, scratch);
}

}  // namespace fastgpt::cuda
