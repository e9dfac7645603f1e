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
// 2 step, ... Sums of up to 1024 columns stay in the L1 cache, while rows are read in long pieces.
template <typename D, typename T>
void sum_rows(const D* dy, const int64_t* rows, int64_t step, int64_t count, T* out, int64_t width) {
  constexpr int64_t kColumns = 1024;
  float sums[kColumns];
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t columns = width - first < kColumns ? width - first : kColumns;
    for (int64_t c = 0; c < columns; c += kWidth) store(sums + c, Vec{});
    for (int64_t i = 0; i < count; ++i) {
      const D* row = dy + (rows != nullptr ? rows[i] : i * step) * width + first;
      for (int64_t c = 0; c < columns; c += kWidth)
        store(sums + c, load(sums + c) + load(row + c, left(columns, c)));
    }
    for (int64_t c = 0; c < columns; c += kWidth) store(out + first + c, load(sums + c), left(columns, c));
  }
}

}  // namespace fastgpt::FASTGPT_ISA
