// Products of small matrices in the L1 cache, in float: own registers' worth of the result at a time, by
// outer products. Included by loops, for each instruction set, after cpu/vec.h.

namespace fastgpt::FASTGPT_ISA {

// Accumulators: kRows x kVecs vectors, which leave registers for a row of the right matrix and a broadcast.
constexpr int64_t kVecs = 2;
constexpr int64_t kRows = kWidth == 16 ? 8 : 4;

enum class Start { kZero, kAdd, kScale };

// c (kRows, VECS vectors) = [c +] a b over `depth`; kScale multiplies the old c by `factor`, a row of
// vectors. a is (kRows, depth) or, if A_BY_COLUMNS, (depth, kRows).
template <int64_t VECS, bool A_BY_COLUMNS, Start START>
inline void multiply_registers(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                               int64_t c_stride, int64_t depth, const Vec* factor) {
  Vec sums[kRows][VECS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[VECS];
#pragma GCC unroll 4
    for (int64_t i = 0; i < VECS; ++i) row[i] = load(b + k * b_stride + i * kWidth);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const Vec value = splat(A_BY_COLUMNS ? a[k * a_stride + r] : a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int64_t i = 0; i < VECS; ++i) sums[r][i] = fma(value, row[i], sums[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int64_t i = 0; i < VECS; ++i) {
      float* const at = c + r * c_stride + i * kWidth;
      if (START == Start::kAdd) sums[r][i] += load(at);
      if (START == Start::kScale) sums[r][i] = fma(load(at), factor[i], sums[r][i]);
      store(at, sums[r][i]);
    }
}

// The same for `rows` rows, a multiple of kRows.
template <int64_t VECS, bool A_BY_COLUMNS, Start START>
void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                   int64_t c_stride, int64_t rows, int64_t depth, const Vec* factor = nullptr) {
  for (int64_t r = 0; r < rows; r += kRows)
    multiply_registers<VECS, A_BY_COLUMNS, START>(a + (A_BY_COLUMNS ? r : r * a_stride), a_stride, b,
                                                  b_stride, c + r * c_stride, c_stride, depth, factor);
}

// a0 b0 a1 b1 ... of the first halves, and of the second halves.
template <int64_t... I>
inline Vec zip_low(Vec a, Vec b, std::integer_sequence<int64_t, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * kWidth)...);
#else
  return __builtin_shuffle(a, b, IntVec{(I / 2 + I % 2 * kWidth)...});
#endif
}
template <int64_t... I>
inline Vec zip_high(Vec a, Vec b, std::integer_sequence<int64_t, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kWidth / 2 + I / 2 + I % 2 * kWidth)...);
#else
  return __builtin_shuffle(a, b, IntVec{(kWidth / 2 + I / 2 + I % 2 * kWidth)...});
#endif
}
inline Vec zip_low(Vec a, Vec b) { return zip_low(a, b, std::make_integer_sequence<int64_t, kWidth>()); }
inline Vec zip_high(Vec a, Vec b) { return zip_high(a, b, std::make_integer_sequence<int64_t, kWidth>()); }

// Zipping the two halves of the rows log2(kWidth) times transposes them.
inline void transpose(Vec (&x)[kWidth]) {
#pragma GCC unroll 4
  for (int64_t step = 1; step < kWidth; step *= 2) {
    Vec y[kWidth];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kWidth / 2; ++i) {
      y[2 * i] = zip_low(x[i], x[i + kWidth / 2]);
      y[2 * i + 1] = zip_high(x[i], x[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; ++i) x[i] = y[i];
  }
}

// Element i is the sum of x[i].
inline Vec sums(Vec (&x)[kWidth]) {
#pragma GCC unroll 4
  for (int64_t half = kWidth / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) x[i] = zip_low(x[i], x[i + half]) + zip_high(x[i], x[i + half]);
  return x[0];
}

// Rows (rows, width) with a stride -> out (out_rows, out_width), out_width a multiple of the vector, 0
// beyond.
template <typename T>
void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t width, float* out, int64_t out_rows,
               int64_t out_width) {
  for (int64_t r = 0; r < out_rows; ++r)
    for (int64_t c = 0; c < out_width; c += kWidth)
      store(out + r * out_width + c,
            r < rows && c < width ? load(x + r * stride + c, left(width, c)) : Vec{});
}

// The transpose of that times `factor`, into (out_width, out_rows).
template <typename T>
void copy_columns(const T* x, int64_t stride, int64_t rows, int64_t width, float factor, float* out,
                  int64_t out_rows, int64_t out_width) {
  for (int64_t r = 0; r < out_rows; r += kWidth)
    for (int64_t c = 0; c < out_width; c += kWidth) {
      Vec block[kWidth];
      const int64_t n = left(width, c);
      for (int64_t i = 0; i < kWidth; ++i)
        block[i] = r + i < rows && n > 0 ? load(x + (r + i) * stride + c, n) * factor : Vec{};
      transpose(block);
      for (int64_t i = 0; i < kWidth; ++i) store(out + (c + i) * out_rows + r, block[i]);
    }
}

// x (padded width, columns with x_stride), each column c times factor[c] -> out (rows, width): its transpose.
template <typename T>
void write_columns(const float* x, int64_t x_stride, const float* factor, T* out, int64_t stride,
                   int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r += kWidth)
    for (int64_t c = 0; c < width; c += kWidth) {
      Vec block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) block[i] = load(x + (c + i) * x_stride + r) * load(factor + r);
      transpose(block);
      for (int64_t i = 0; i < kWidth && r + i < rows; ++i)
        store(out + (r + i) * stride + c, block[i], left(width, c));
    }
}

}  // namespace fastgpt::FASTGPT_ISA
