// Sums over rows of a matrix, in float. Compiled for each instruction set: see cpu/isa.h.

namespace fastgpt::FASTGPT_ISA {

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
