// Hot loops of the embeddings: rows of a matrix gathered, and rows added up. Compiled for each instruction
// set: see cpu/isa.h.

namespace fastgpt::FASTGPT_ISA {

// y = token + position, one row each.
template <typename W, typename P, typename Y>
void add_rows(const W* token, const P* position, Y* y, int64_t width) {
  for (int64_t c = 0; c < width; c += kWidth) {
    const int64_t n = left(width, c);
    store(y + c, load(token + c, n) + load(position + c, n), n);
  }
}

// out = the sum of `count` rows of dy, in order: those that `rows` lists, or where it is null number 0, step,
// 2 step, ... Several vectors at a time, so that a row is read in lines.
template <typename D, typename T>
void sum_rows(const D* dy, const int64_t* rows, int64_t step, int64_t count, T* out, int64_t width) {
  constexpr int64_t kVectors = 8;
  for (int64_t first = 0; first < width; first += kVectors * kWidth) {
    Vec sums[kVectors] = {};
    const bool whole = width - first >= kVectors * kWidth;
    for (int64_t i = 0; i < count; ++i) {
      const D* row = dy + (rows != nullptr ? rows[i] : i * step) * width;
      for (int64_t k = 0; k < kVectors; ++k) {
        const int64_t c = first + k * kWidth;
        if (whole) {
          sums[k] += load(row + c);
        } else if (c < width) {
          sums[k] += load(row + c, left(width, c));
        }
      }
    }
    for (int64_t k = 0; k < kVectors; ++k) {
      const int64_t c = first + k * kWidth;
      if (c < width) store(out + c, sums[k], left(width, c));
    }
  }
}

}  // namespace fastgpt::FASTGPT_ISA
