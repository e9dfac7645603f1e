// Copies that change the dtype on the way. Compiled for each instruction set: see cpu/isa.h.

namespace fastgpt::FASTGPT_ISA {

// y = x * factor
template <typename T, typename U>
void scale(const T* x, U* y, float factor, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) {
    const int64_t n = left(end, i);
    store(y + i, load(x + i, n) * factor, n);
  }
}

// total = x, or total += x
template <typename T>
void accumulate(const T* x, float* total, bool first, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) {
    const int64_t n = left(end, i);
    store(total + i, first ? load(x + i, n) : load(total + i, n) + load(x + i, n), n);
  }
}

}  // namespace fastgpt::FASTGPT_ISA
