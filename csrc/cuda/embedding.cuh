// Token embedding plus position embedding.
//
//     y_btc = Wt[idx_bt, c] + Wp[start + t, c]
//
//     dWt[n, c] = sum over (b, t) with idx_bt = n of dy_btc
//     dWp[start + t, c] = sum_b dy_btc
//
// dWt without atomics: the tokens are sorted, stably, so that those of one value are neighbours in a fixed
// order, a run. Runs are as uneven as words: in English text one token in twenty is a comma. So that no block
// has a long one to itself, the sorted tokens are cut into chunks of kChunk; the part of a run that lies in
// one chunk is summed by one block, and written to dWt if it is the whole run. Of the runs that cross an
// edge, at most one enters a chunk and one leaves it: those parts go to two rows of partial sums, row 0 of
// the chunk for the run at its beginning, row 1 for the one that leaves it; a second kernel adds up the parts
// of a run, in order, from the chunk that it begins in.
//
// Bytes, e an element's: forward 2 B T C e + T C e (a row of Wt for each token, y, Wp), backward 2 B T C e
// (dy for each gradient) and the two gradients, of which dWt's zeros are most: V C e.
//
// Launch: forward a warp per token. Backward a thread per piece of 16 bytes of a row, up to 128 a block, so a
// row is one or a few tiles; a block per tile and group of kGroup sorted tokens (for the parts that begin
// there), chunk, or position. A thread adds its columns of the rows one after another, eight of them in
// flight.
#pragma once

#include "cuda/types.cuh"

namespace fastgpt::cuda {

constexpr int kTokenWarps = 4;
constexpr int kTileThreads = 128;  // at most
constexpr int kTileBlocks = 5;     // of an SM at least
constexpr int kInFlight = 8;       // rows
constexpr int kChunk = 64;         // sorted tokens: eight rounds of rows one after another
constexpr int kGroup = 8;          // sorted tokens: about a run in a batch of text

// `aligned`: tensors and their rows begin at multiples of 16 bytes. `n` tokens, `length` of them in a
// sequence.
template <typename T>
__global__ void __launch_bounds__(kWarpSize* kTokenWarps)
    embedding_forward_kernel(const int64_t* __restrict__ idx, const T* __restrict__ token_weight,
                             const T* __restrict__ position_weight, T* __restrict__ y, int64_t start,
                             int64_t n, int64_t length, int64_t vocab_size, int width, bool aligned) {
  constexpr int kSize = Vec<T>::kSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTokenWarps + threadIdx.y;
  if (row >= n) return;
  const int64_t token = idx[row];
  const bool known = token >= 0 && token < vocab_size;  // otherwise it reads nothing, and gives NaN
  const T* const from = token_weight + (known ? token : 0) * width;
  const T* const position = position_weight + (start + row % length) * width;
#pragma unroll 4
  for (int column = threadIdx.x * kSize; column < width; column += kWarpSize * kSize) {
    float values[kSize], added[kSize];
    load_floats(values, from, column, known ? width : 0, aligned);
    load_floats(added, position, column, width, aligned);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = known ? values[i] + added[i] : NAN;
    store_floats(values, y + row * width, column, width, aligned);
  }
}

// The first column of this thread, in a block of one of the `tiles` of a row.
template <typename T>
FASTGPT_DEVICE int tile_column(unsigned tiles) {
  return static_cast<int>(blockIdx.x % tiles * blockDim.x + threadIdx.x) * Vec<T>::kSize;
}

// Adds rows to `sums` for as long as there are more: next(i) is the row of the i-th, from 0 on, or null after
// the last. The same for all threads of a block; `column` is the thread's own.
template <typename T, int N, typename Next>
FASTGPT_DEVICE void add_rows(float (&sums)[N], Next next, int column, int width, bool aligned) {
  for (int64_t first = 0;; first += kInFlight) {
    float rows[kInFlight][N];
    bool more = true;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const T* const row = next(first + i);
      more = row != nullptr;
      load_floats(rows[i], row, column, more ? width : 0, aligned);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += rows[i][j];
    }
    if (!more) return;
  }
}

// The parts of runs that begin among this block's sorted tokens. `order` says where in dy a sorted token is.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    embedding_tokens_kernel(const T* __restrict__ dy, const int* __restrict__ tokens,
                            const int64_t* __restrict__ order, T* __restrict__ dwt,
                            float* __restrict__ partials, int64_t n, int64_t vocab_size, int width,
                            unsigned tiles, bool aligned) {
  constexpr int kSize = Vec<T>::kSize;
  const int column = tile_column<T>(tiles);
  const int64_t group = static_cast<int64_t>(blockIdx.x / tiles) * kGroup;
  for (int64_t first = group; first < min(group + kGroup, n); ++first) {
    const int token = tokens[first];
    const bool enters = first > 0 && tokens[first - 1] == token, at_edge = first % kChunk == 0;
    if (token < 0 || token >= vocab_size || (enters && !at_edge)) continue;
    const int64_t chunk = first / kChunk, end = min((chunk + 1) * kChunk, n);
    float sums[kSize] = {};
    add_rows<T>(
        sums,
        [=](int64_t i) -> const T* {
          return first + i < end && tokens[first + i] == token ? dy + order[first + i] * width : nullptr;
        },
        column, width, aligned);
    const bool leaves = end < n && tokens[end - 1] == token && tokens[end] == token;
    if (enters || leaves) {
      float* const out = partials + (2 * chunk + (at_edge ? 0 : 1)) * width;
      store_floats(sums, out, column, width, aligned);
    } else {
      store_floats(sums, dwt + static_cast<int64_t>(token) * width, column, width, aligned);
    }
  }
}

// The whole run that begins in this block's chunk and leaves it, if there is one.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    embedding_runs_kernel(const int* __restrict__ tokens, T* __restrict__ dwt,
                          const float* __restrict__ partials, int64_t n, int64_t vocab_size, int width,
                          unsigned tiles, bool aligned) {
  const int64_t chunk = blockIdx.x / tiles, begin = chunk * kChunk, end = begin + kChunk;
  if (end >= n) return;
  const int token = tokens[end - 1];
  if (tokens[end] != token || token < 0 || token >= vocab_size) return;
  const bool whole = tokens[begin] == token;
  if (whole && begin > 0 && tokens[begin - 1] == token) return;  // it began in a chunk before
  const int column = tile_column<T>(tiles);
  float sums[Vec<T>::kSize] = {};
  add_rows<float>(
      sums,
      [=](int64_t i) -> const float* {
        if (i == 0) return partials + (2 * chunk + (whole ? 0 : 1)) * width;
        const int64_t first = begin + i * kChunk;
        return first < n && tokens[first] == token ? partials + 2 * (chunk + i) * width : nullptr;
      },
      column, width, aligned);
  store_floats(sums, dwt + static_cast<int64_t>(token) * width, column, width, aligned);
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    embedding_positions_kernel(const T* __restrict__ dy, T* __restrict__ dwp, int64_t start, int64_t batch,
                               int64_t length, int width, unsigned tiles, bool aligned) {
  const int64_t position = blockIdx.x / tiles;
  const int column = tile_column<T>(tiles);
  float sums[Vec<T>::kSize] = {};
  add_rows<T>(
      sums, [=](int64_t i) -> const T* { return i < batch ? dy + (i * length + position) * width : nullptr; },
      column, width, aligned);
  store_floats(sums, dwp + (start + position) * width, column, width, aligned);
}

}  // namespace fastgpt::cuda
