// Hot loop of dropout_add over blocks of elements. Compiled for each instruction set: see cpu/isa.h.
#include "cpu/loops/philox.h"

namespace fastgpt::FASTGPT_ISA {

// y = z x + residual (null for none) in the blocks [begin, end) of `count` elements; z is 0 where the
// element's random word is below the threshold, else the scale. An element k kQuarter + j of block b has word
// k of the counter (j, b).
template <typename T>
void dropout_add(const T* x, const T* residual, T* y, int64_t seed, uint32_t threshold, float scale,
                 int64_t begin, int64_t end, int64_t count) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kDropoutBlock;
    const int64_t size = count - start < kDropoutBlock ? count - start : kDropoutBlock;
    const int64_t lanes = size < kDropoutBlock / 4 ? size : kDropoutBlock / 4;
    for (int64_t j = 0; j < lanes; j += kWidth) {
      Bits words[4] = {(Bits)lane_numbers() + static_cast<uint32_t>(j), Bits{} + static_cast<uint32_t>(block),
                       Bits{}, Bits{}};
      philox(words, static_cast<uint64_t>(seed), 10);
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t c = k * (kDropoutBlock / 4) + j;
        if (c >= size) break;
        const int64_t n = left(size, c), at = start + c;
        const Vec z = words[k] >= threshold ? splat(scale) : Vec{};
        Vec value = z * load(x + at, n);
        if (residual != nullptr) value += load(residual + at, n);
        store(y + at, value, n);
      }
    }
  }
}

}  // namespace fastgpt::FASTGPT_ISA
