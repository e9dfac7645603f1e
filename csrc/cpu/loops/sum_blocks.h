// The sums of columns [begin, end) of a (blocks, width) matrix, each in the order of the blocks: eight at a
// time, and then those sums, which rounds less than one after another. Compiled for each instruction set: see
// cpu/isa.h.

namespace fastgpt::FASTGPT_ISA {

template <typename T>
void sum_blocks(const float* partials, T* out, int64_t blocks, int64_t width, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kWidth) {
    const int64_t n = left(end, c);
    Vec total = {};
    for (int64_t first = 0; first < blocks; first += 8) {
      Vec part = {};
      for (int64_t block = first; block < first + 8 && block < blocks; ++block)
        part += load(partials + block * width + c, n);
      total += part;
    }
    store(out + c, total, n);
  }
}

}  // namespace fastgpt::FASTGPT_ISA
