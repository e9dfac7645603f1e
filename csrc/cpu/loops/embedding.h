// Hot loops of the embeddings: rows of a matrix gathered, and rows added up. Compiled for each instruction
// set: see cpu/isa.h.
#include "cpu/loops/sum_rows.h"

namespace fastgpt::FASTGPT_ISA {

// y = token + position, one row each.
template <typename W, typename P, typename Y>
void add_rows(const W* token, const P* position, Y* y, int64_t width) {
  for (int64_t c = 0; c < width; c += kWidth) {
    const int64_t n = left(width, c);
    store(y + c, load(token + c, n) + load(position + c, n), n);
  }
}

}  // namespace fastgpt::FASTGPT_ISA
