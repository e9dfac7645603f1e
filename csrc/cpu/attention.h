// What the loops of attention are told. The equations are in fastgpt/ops/attention.py.
#pragma once

#include <cstdint>

namespace fastgpt {

// A (B, T, H, D) tensor with dense heads; strides in elements.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, token, head;

  T* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

template <typename T>
struct Attention {
  Heads<const T> q, k, v;
  int64_t batches, heads, queries, keys, width;
  int64_t window;       // at most `keys`
  float scale;          // of the scores in base 2: log2(e) times the argument of that name
  const int64_t* seed;  // null without dropout
  float dropout_p;

  int64_t offset() const { return keys - queries; }  // the position of query 0
};

// What the backward pass writes: gradients whose data are null are not wanted, dk and dv together.
template <typename T>
struct Gradients {
  Heads<T> dq, dk, dv;
};

constexpr int64_t kBlock = 64;      // queries of a block, keys of a tile
constexpr int64_t kFewQueries = 4;  // at most these are taken one by one, against chunks of keys
constexpr int64_t kChunk = 512;     // keys

// Rows of scratch matrices: the widest vector divides it.
constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// Floats of scratch memory that the loops take.
constexpr int64_t forward_scratch(int64_t width) { return kBlock * (4 * padded(width) + kBlock); }
constexpr int64_t few_scratch(int64_t width) { return 2 * padded(width) + kChunk; }
constexpr int64_t backward_scratch(int64_t width, int64_t keys) {
  return kBlock * (7 * padded(width) + 2 * kBlock) + 2 * (keys + kBlock) * padded(width);
}

}  // namespace fastgpt
