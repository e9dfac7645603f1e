// out = the sum of some rows, one after another, in float. Compiled for each instruction set: see cpu/isa.h.

namespace fastgpt::FASTGPT_ISA {

template <typename T>
void sum_rows(const T* x, float* out, int64_t rows, int64_t width) {
  for (int64_t c = 0; c < width; ++c) out[c] = 0.0f;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < width; c += kWidth) {
      const int64_t n = left(width, c);
      store(out + c, load(out + c, n) + load(x + row * width + c, n), n);
    }
}

}  // namespace fastgpt::FASTGPT_ISA
