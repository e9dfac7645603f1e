#include "cpu/common.h"

#define FASTGPT_LOOPS "cpu/loops/sum_blocks.h"
#include "cpu/each_isa.h"

namespace fastgpt {

Tensor sum_blocks(const Tensor& partials, at::ScalarType dtype) {
  const int64_t width = partials.size(1);
  const Tensor out = empty({width}, dtype);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto loop = FASTGPT_CHOOSE(sum_blocks<T>);
    parallel_for(0, width, 4096, [&](int64_t begin, int64_t end) {
      loop(const_data<float>(partials), data<T>(out), partials.size(0), width, begin, end);
    });
  });
  return out;
}

}  // namespace fastgpt
