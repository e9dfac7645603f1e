// Hot loops of attention: FlashAttention-2 (Dao, arXiv 2307.08691) with queries as the lanes of vectors. For
// a block of queries q^T, o^T and the scores s^T are kept transposed: maximum and sum over keys go lane by
// lane, k and v are read row by row as they lie, and any head size is taken. A group is the queries of kVecs
// vectors, which are multiplied with the keys that some of them sees and no others.
#include "cpu/loops/philox.h"
#include "cpu/loops/products.h"

namespace fastgpt::FASTGPT_ISA {

constexpr int64_t kLanes = kVecs * kWidth;
static_assert(kBlock % kLanes == 0 && kBlock % kRows == 0 && 16 % kRows == 0 && kRows % 4 == 0);

// 2^x for x <= 0, give or take rounding, by a polynomial of relative error 2e-9 on |r| <= 1/2 (minimax).
// Below -126, where the result is subnormal, 0 or that.
inline Vec exp2(Vec x) {
#if FASTGPT_VECTOR_BYTES == 64
  x = x < -150.0f ? splat(-150.0f) : x;
#endif
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + shifter;
  const Vec r = x - (shifted - shifter);
  Vec p = splat(0x1.41fbbcp-13f);
  p = fma(p, r, splat(0x1.5f3e54p-10f));
  p = fma(p, r, splat(0x1.3b2d4cp-7f));
  p = fma(p, r, splat(0x1.c6aee8p-5f));
  p = fma(p, r, splat(0x1.ebfbdcp-3f));
  p = fma(p, r, splat(0x1.62e43p-1f));
  p = fma(p, r, splat(1.0f));
#if FASTGPT_VECTOR_BYTES == 64
  return times_power(p, shifted - shifter);
#else
  const Vec y = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return x < -126.0f ? Vec{} : x == x ? y : x;
#endif
}

inline Vec minus_infinity() { return splat(-std::numeric_limits<float>::infinity()); }

// The rows of a tile of keys that some query of a group sees, from `low` to before `high`, rounded outwards
// to kRows. Row n is seen by the query of lane i if n <= first + i and n > first + i - window.
struct Seen {
  int64_t low, high, first, window;
};

// A group of `count` queries whose first is at position `position`, and the tile of keys from `tile` on.
inline Seen seen(int64_t position, int64_t count, int64_t tile, int64_t window) {
  const int64_t first = position - tile;
  const int64_t low = std::max<int64_t>(first - window + 1, 0);
  const int64_t high = std::min(first + count, kBlock);
  return {low / kRows * kRows, (high + kRows - 1) / kRows * kRows, first, window};
}

// Scores (rows of `stride`) that are hidden become -inf.
inline void mask(float* s, int64_t stride, const Seen& part) {
  const IntVec lanes = lane_numbers();
  for (int64_t n = part.low; n < part.high; ++n) {
    const bool seen_by_all = n <= part.first && n > part.first + kLanes - 1 - part.window;
    if (seen_by_all) continue;
    const int32_t row = static_cast<int32_t>(n - part.first);
    const int32_t window = static_cast<int32_t>(part.window);
    for (int64_t i = 0; i < kVecs; ++i) {
      float* at = s + n * stride + i * kWidth;
      const IntVec lane = lanes + static_cast<int32_t>(i * kWidth);
      store(at, ((row <= lane) & (row > lane - window)) != 0 ? load(at) : minus_infinity());
    }
  }
}

// Dropout of the tile of keys from `tile` on (a multiple of 4), for queries `query`, ... in the lanes. A
// counter is (query, key / 4, head); its words belong to four neighbouring keys.
struct Dropout {
  const int64_t* seed;  // null without dropout
  float p;
  int64_t query, tile, head;

  // Which weights of keys n to n + 3 are kept: word -> vector -> lanes of -1 or 0.
  void keep(int64_t n, IntVec (&kept)[4][kVecs]) const;
};

inline void Dropout::keep(int64_t n, IntVec (&kept)[4][kVecs]) const {
  for (int64_t i = 0; i < kVecs; ++i) {
    Bits words[4] = {(Bits)(lane_numbers() + static_cast<int32_t>(query + i * kWidth)),
                     Bits{} + static_cast<uint32_t>((tile + n) / 4), Bits{} + static_cast<uint32_t>(head),
                     Bits{}};
    philox(words, static_cast<uint64_t>(*seed), 7);
    for (int64_t word = 0; word < 4; ++word) kept[word][i] = to_uniform(words[word]) >= p;
  }
}

// s (depth rows, kLanes) = a b, where a is (depth rows, width) and b (width, kBlock), in steps of kStep
// columns: one long chain of additions would lose twice as much to rounding.
template <int64_t STRIDE>
inline void scores(const float* a, int64_t a_stride, const float* b, float* s, int64_t rows, int64_t width) {
  constexpr int64_t kStep = 32;
  multiply_rows<kVecs, false, Start::kZero>(a, a_stride, b, kBlock, s, STRIDE, rows, std::min(kStep, width));
  for (int64_t d = kStep; d < width; d += kStep)
    multiply_rows<kVecs, false, Start::kAdd>(a + d, a_stride, b + d * kBlock, kBlock, s, STRIDE, rows,
                                             std::min(kStep, width - d));
}

// Running maximum and sum of a group.
struct Softmax {
  Vec top[kVecs], total[kVecs], factor[kVecs];

  Softmax() {
    for (int64_t i = 0; i < kVecs; ++i) top[i] = minus_infinity(), total[i] = Vec{};
  }

  // Scores become weights; `factor` is what older sums and outputs are to be multiplied with.
  void take(float* s, const Seen& part) {
    for (int64_t i = 0; i < kVecs; ++i) {
      Vec greatest = minus_infinity();
      for (int64_t n = part.low; n < part.high; ++n)
        greatest = max(load(s + n * kLanes + i * kWidth), greatest);
      const Vec next = max(greatest, top[i]);
      // A query that has seen no key yet: 2^(-inf - 0) = 0, where -inf - -inf would be NaN.
      const Vec anchor = next == minus_infinity() ? Vec{} : next;
      factor[i] = exp2(top[i] - anchor);
      top[i] = next;
      Vec sum = {};
      for (int64_t n = part.low; n < part.high; ++n) {
        float* at = s + n * kLanes + i * kWidth;
        const Vec p = exp2(load(at) - anchor);
        sum += p;
        store(at, p);
      }
      total[i] = fma(total[i], factor[i], sum);
    }
  }
};

inline void drop(float* p, const Seen& part, const Dropout& dropout) {
  IntVec kept[4][kVecs];
  for (int64_t n = part.low; n < part.high; n += 4) {
    dropout.keep(n, kept);
    for (int64_t word = 0; word < 4; ++word)
      for (int64_t i = 0; i < kVecs; ++i) {
        float* at = p + (n + word) * kLanes + i * kWidth;
        store(at, kept[word][i] != 0 ? load(at) : Vec{});
      }
  }
}

// The keys and values from `tile` on, as (kBlock, padded width) each.
template <typename T>
inline void copy_tile(const Attention<T>& a, int64_t b, int64_t h, int64_t tile, float* k, float* v) {
  const int64_t width = padded(a.width), found = std::min(kBlock, a.keys - tile);
  const int64_t filled = (found + kRows - 1) / kRows * kRows;
  copy_rows(a.k.at(b, tile, h), a.k.token, found, a.width, k, filled, width);
  copy_rows(a.v.at(b, tile, h), a.v.token, found, a.width, v, filled, width);
}

// o and lse of a block of queries of one head.
template <typename T>
void attention_forward(const Attention<T>& a, int64_t b, int64_t h, int64_t block, const Heads<T>& o,
                       float* lse, float* scratch) {
  const int64_t width = padded(a.width), rows = (a.width + kRows - 1) / kRows * kRows;
  float* const qt = scratch;              // (width, kBlock)
  float* const ot = qt + width * kBlock;  // (width, kBlock)
  float* const k = ot + width * kBlock;   // (kBlock, width)
  float* const v = k + width * kBlock;    // (kBlock, width)
  float* const s = v + width * kBlock;    // (kBlock, kLanes)
  const int64_t first = block * kBlock, count = std::min(kBlock, a.queries - first);
  const int64_t position = a.offset() + first;
  copy_columns(a.q.at(b, first, h), a.q.token, count, a.width, a.scale, qt, kBlock, width);
  for (int64_t i = 0; i < rows * kBlock; i += kWidth) store(ot + i, Vec{});
  Softmax softmax[kBlock / kLanes];
  const int64_t start = std::max<int64_t>(position - a.window + 1, 0) / kBlock * kBlock;
  for (int64_t tile = start; tile < position + count; tile += kBlock) {
    copy_tile(a, b, h, tile, k, v);
    for (int64_t g = 0; g < count; g += kLanes) {
      const Seen part = seen(position + g, std::min(kLanes, count - g), tile, a.window);
      if (part.low >= part.high) continue;
      const int64_t depth = part.high - part.low;
      scores<kLanes>(k + part.low * width, width, qt + g, s + part.low * kLanes, depth, a.width);
      mask(s, kLanes, part);
      Softmax& running = softmax[g / kLanes];
      running.take(s, part);
      if (a.seed != nullptr) drop(s, part, {a.seed, a.dropout_p, first + g, tile, b * a.heads + h});
      multiply_rows<kVecs, true, Start::kScale>(v + part.low * width, width, s + part.low * kLanes, kLanes,
                                                ot + g, kBlock, rows, depth, running.factor);
    }
  }
  float tops[kBlock], totals[kBlock];
  for (int64_t g = 0; g < kBlock; g += kWidth) {
    const Softmax& done = softmax[g / kLanes];
    store(tops + g, done.top[g % kLanes / kWidth]);
    store(totals + g, done.total[g % kLanes / kWidth]);
  }
  for (int64_t i = 0; i < count; ++i) lse[first + i] = tops[i] + std::log2(totals[i]);
  for (int64_t i = 0; i < kBlock; ++i)
    totals[i] = 1.0f / (a.seed != nullptr ? totals[i] * (1.0f - a.dropout_p) : totals[i]);
  write_columns(ot, kBlock, totals, o.at(b, first, h), o.token, count, a.width);
}

constexpr int64_t kAhead = 16;  // rows

// A row of a head that will be read soon: rows of a cache lie pages apart, which no processor foresees. An
// address beyond the tensor does no harm.
template <typename T>
inline void fetch(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

// Few queries: dot products along the head, and no tile whose lanes would be empty. What the keys [begin,
// end) give to query `query` of one head: o (padded width), which is to be divided by the sum, maximum and
// sum.
template <typename T>
void attention_few(const Attention<T>& a, int64_t b, int64_t h, int64_t query, int64_t begin, int64_t end,
                   float* o, float* top, float* total, float* scratch) {
  const int64_t width = padded(a.width), position = a.offset() + query;
  float* const q = scratch;
  float* const s = q + width;  // scores, then weights
  const int64_t start = std::max(begin, position - a.window + 1);
  const int64_t count = std::min(end, position + 1) - start;
  copy_rows(a.q.at(b, query, h), a.q.token, 1, a.width, q, 1, width);
  for (int64_t c = 0; c < width; c += kWidth) store(q + c, load(q + c) * a.scale);
  Vec greatest = minus_infinity();
  for (int64_t n = 0; n < count; n += kWidth) {
    Vec dots[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      dots[i] = Vec{};
      if (n + i >= count) continue;
      const T* const k = a.k.at(b, start + n + i, h);
      fetch(k + kAhead * a.k.token, a.width);
      for (int64_t c = 0; c < a.width; c += kWidth)
        dots[i] = fma(load(q + c), load(k + c, left(a.width, c)), dots[i]);
    }
    const Vec scores = sums(dots);
    store(s + n, scores);
    greatest = max(lane_numbers() < static_cast<int32_t>(count - n) ? scores : minus_infinity(), greatest);
  }
  *top = max(greatest);
  const float anchor = *top == -std::numeric_limits<float>::infinity() ? 0.0f : *top;
  Vec sum_p = {};
  for (int64_t n = 0; n < count; n += kWidth) {
    const Vec p = first(exp2(load(s + n) - anchor), left(count, n));
    store(s + n, p);
    sum_p += p;
  }
  *total = sum(sum_p);
  for (int64_t c = 0; c < a.width; c += 4 * kWidth) {
    Vec sum_o[4] = {};
    const int64_t vectors = std::min<int64_t>(4, (a.width - c + kWidth - 1) / kWidth);
    for (int64_t n = 0; n < count; ++n) {
      const T* const v = a.v.at(b, start + n, h) + c;
      if (c == 0) fetch(v + kAhead * a.v.token, a.width);
      const Vec p = splat(s[n]);
      if (c + 4 * kWidth <= a.width)
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) sum_o[i] = fma(p, load(v + i * kWidth), sum_o[i]);
      else
        for (int64_t i = 0; i < vectors; ++i)
          sum_o[i] = fma(p, load(v + i * kWidth, left(a.width, c + i * kWidth)), sum_o[i]);
    }
    for (int64_t i = 0; i < vectors; ++i) store(o + c + i * kWidth, sum_o[i]);
  }
}

// Adds up the chunks in order: parts (chunks, `stride` apart: padded width, maximum, sum) -> a row of o and
// lse.
template <typename T>
void attention_merge(const float* parts, int64_t chunks, int64_t stride, int64_t width, T* o, float* lse) {
  const int64_t at = padded(width);
  float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t part = 0; part < chunks; ++part) {
    const float other = parts[part * stride + at];
    top = other > top || other != other ? other : top;
  }
  const float anchor = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
  for (int64_t part = 0; part < chunks; ++part)
    total += std::exp2(parts[part * stride + at] - anchor) * parts[part * stride + at + 1];
  for (int64_t c = 0; c < width; c += kWidth) {
    Vec sum = {};
    for (int64_t part = 0; part < chunks; ++part) {
      const float* const values = parts + part * stride;
      sum = fma(splat(std::exp2(values[at] - anchor)), load(values + c), sum);
    }
    store(o + c, sum / total, left(width, c));
  }
  *lse = top + std::log2(total);
}

// p^T and, from dp^T, ds^T of a group, both (kBlock, kBlock); with dropout p becomes z p.
inline void weights_and_gradient(float* s, float* dp, const Seen& part, const float* lse, const float* delta,
                                 const Dropout& dropout) {
  const Vec factor = splat(1.0f / (1.0f - dropout.p));
  IntVec kept[4][kVecs];
  for (int64_t n = part.low; n < part.high; ++n) {
    if (dropout.seed != nullptr && n % 4 == 0) dropout.keep(n, kept);
    for (int64_t i = 0; i < kVecs; ++i) {
      float* const weight = s + n * kBlock + i * kWidth;
      float* const gradient = dp + n * kBlock + i * kWidth;
      const Vec exponent = load(weight) - load(lse + i * kWidth);
      const Vec p = exp2(exponent > 0.0f ? Vec{} : exponent);
      Vec zp = p, zdp = load(gradient);
      if (dropout.seed != nullptr) {
        zp = kept[n % 4][i] != 0 ? p * factor : Vec{};
        zdp = kept[n % 4][i] != 0 ? zdp * factor : Vec{};
      }
      store(weight, zp);
      store(gradient, p * (zdp - load(delta + i * kWidth)));
    }
  }
}

// c (rows, width) += a^T b for the rows of a tile of keys that a block of queries sees: a is p^T or ds^T,
// (kBlock, kBlock), b is do or q, (kBlock, width). Rows take only the queries that see one of them.
inline void add_for_keys(const float* a, const float* b, float* c, const Seen& part, int64_t count,
                         int64_t width) {
  for (int64_t n = part.low; n < part.high; n += kRows) {
    const int64_t low = std::max<int64_t>(n - part.first, 0);
    const int64_t high = std::min(count, n + kRows - 1 + part.window - part.first);
    const float* const left_rows = a + n * kBlock + low;
    for (int64_t d = 0; d < width; d += kLanes) {
      const float* const right = b + low * width + d;
      float* const out = c + n * width + d;
      if (d + kLanes <= width)
        multiply_rows<kVecs, false, Start::kAdd>(left_rows, kBlock, right, width, out, width, kRows,
                                                 high - low);
      else
        multiply_rows<1, false, Start::kAdd>(left_rows, kBlock, right, width, out, width, kRows, high - low);
    }
  }
}

// delta of a block, from o^T and do^T, in the order in which dp is made: where a query sees one key, whose v
// is its o, dp - delta is 0 and not a rounding error.
inline void sums_of_products(const float* ot, const float* dot, int64_t width, float* delta) {
  for (int64_t i = 0; i < kBlock; i += kWidth) {
    Vec total = {};
    for (int64_t d = 0; d < width; ++d)
      total = fma(load(ot + d * kBlock + i), load(dot + d * kBlock + i), total);
    store(delta + i, total);
  }
}

// Gradients of one head: of the queries of the blocks [first_block, last_block) by way of the keys of the
// tiles [first_tile, last_tile), and of those keys by way of those queries. Each is a sum in the order of
// blocks or tiles, so that a head may be cut into several calls, which give the same bits.
template <typename T>
void attention_backward(const Attention<T>& a, int64_t b, int64_t h, int64_t first_block, int64_t last_block,
                        int64_t first_tile, int64_t last_tile, const Heads<const T>& o,
                        const Heads<const T>& d_o, const float* lse, const Gradients<T>& out,
                        float* scratch) {
  const int64_t width = padded(a.width), rows = (a.width + kRows - 1) / kRows * kRows;
  const int64_t matrix = width * kBlock;
  float* const qt = scratch;        // (width, kBlock)
  float* const dot = qt + matrix;   // (width, kBlock): do
  float* const dqt = dot + matrix;  // (width, kBlock)
  float* const q = dqt + matrix;    // (kBlock, width)
  float* const dout = q + matrix;   // (kBlock, width)
  float* const k = dout + matrix;   // (kBlock, width)
  float* const v = k + matrix;      // (kBlock, width)
  float* const s = v + matrix;      // (kBlock, kBlock): keys, queries
  float* const ds = s + kBlock * kBlock;
  float* const dk = ds + kBlock * kBlock;  // (keys, width)
  const int64_t first_key = first_tile * kBlock, last_key = std::min(a.keys, last_tile * kBlock);
  const bool want_keys = out.dk.data != nullptr, want_queries = out.dq.data != nullptr;
  float* const dv = dk + (want_keys ? (last_tile - first_tile) * matrix : 0);
  if (want_keys)
    for (int64_t i = 0; i < 2 * (last_tile - first_tile) * matrix; i += kWidth) store(dk + i, Vec{});
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t first = block * kBlock, count = std::min(kBlock, a.queries - first);
    const int64_t position = a.offset() + first;
    const int64_t seen_from = std::max<int64_t>(position - a.window + 1, 0) / kBlock * kBlock;
    const int64_t start = std::max(seen_from, first_key), stop = std::min(position + count, last_key);
    if (start >= stop) continue;
    copy_columns(a.q.at(b, first, h), a.q.token, count, a.width, a.scale, qt, kBlock, width);
    copy_columns(d_o.at(b, first, h), d_o.token, count, a.width, 1.0f, dot, kBlock, width);
    copy_rows(a.q.at(b, first, h), a.q.token, count, a.width, q, kBlock, width);
    copy_rows(d_o.at(b, first, h), d_o.token, count, a.width, dout, kBlock, width);
    float delta[kBlock], lses[kBlock] = {};
    copy_columns(o.at(b, first, h), o.token, count, a.width, 1.0f, dqt, kBlock, width);
    sums_of_products(dqt, dot, a.width, delta);
    for (int64_t i = 0; i < count; ++i) lses[i] = lse[first + i];
    if (want_queries)
      for (int64_t i = 0; i < matrix; i += kWidth) store(dqt + i, Vec{});
    for (int64_t tile = start; tile < stop; tile += kBlock) {
      copy_tile(a, b, h, tile, k, v);
      for (int64_t g = 0; g < count; g += kLanes) {
        const Seen part = seen(position + g, std::min(kLanes, count - g), tile, a.window);
        if (part.low >= part.high) continue;
        const int64_t depth = part.high - part.low, at = part.low * kBlock + g;
        scores<kBlock>(k + part.low * width, width, qt + g, s + at, depth, a.width);
        multiply_rows<kVecs, false, Start::kZero>(v + part.low * width, width, dot + g, kBlock, ds + at,
                                                  kBlock, depth, a.width);
        mask(s + g, kBlock, part);
        weights_and_gradient(s + g, ds + g, part, lses + g, delta + g,
                             {a.seed, a.dropout_p, first + g, tile, b * a.heads + h});
        if (want_queries)
          multiply_rows<kVecs, true, Start::kAdd>(k + part.low * width, width, ds + at, kBlock, dqt + g,
                                                  kBlock, rows, depth);
      }
      if (want_keys) {
        const Seen part = seen(position, count, tile, a.window);
        const int64_t at = (tile - first_key) * width;
        add_for_keys(s, dout, dv + at, part, count, width);
        add_for_keys(ds, q, dk + at, part, count, width);
      }
    }
    if (want_queries) {
      float scale[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) scale[i] = a.scale * 0.693147180559945309f;
      write_columns(dqt, kBlock, scale, out.dq.at(b, first, h), out.dq.token, count, a.width);
    }
  }
  if (!want_keys) return;
  for (int64_t n = first_key; n < last_key; ++n) {
    const int64_t at = (n - first_key) * width;
    for (int64_t c = 0; c < a.width; c += kWidth) {
      const int64_t some = left(a.width, c);
      store(out.dk.at(b, n, h) + c, load(dk + at + c) * (a.scale * 0.693147180559945309f), some);
      store(out.dv.at(b, n, h) + c, load(dv + at + c), some);
    }
  }
}

}  // namespace fastgpt::FASTGPT_ISA
