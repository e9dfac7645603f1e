// Token plus position embedding on CPU tensors. The equations are in fastgpt/ops/embedding.py.
//
// Backward, each row of a gradient is summed by one thread, in the order of the batch. The tokens are sorted
// by counting, so that a row's summands are known; work is shared out by rows to write plus rows to read,
// since a few tokens are most of any text. The commonest is a twentieth of it, and still one thread's.
#include <torch/library.h>

#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/common.h"

#define FASTGPT_LOOPS "cpu/loops/embedding.h"
#include "cpu/each_isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

int64_t checked(int64_t token, int64_t vocab_size) {
  TORCH_CHECK_INDEX(token >= 0 && token < vocab_size, "idx holds ", token, ": it must be 0 to ",
                    vocab_size - 1);
  return token;
}

Tensor embedding_forward(const Tensor& idx, const Tensor& token_weight, const Tensor& position_weight,
                         int64_t start) {
  const Tensor tokens = idx.contiguous(), wt = token_weight.contiguous(), wp = position_weight.contiguous();
  const int64_t length = idx.size(1), vocab_size = wt.size(0), width = wt.size(1);
  const auto dtype = c10::promoteTypes(wt.scalar_type(), wp.scalar_type());
  const Tensor y = empty({idx.size(0), length, width}, dtype);
  const auto* token = const_data<int64_t>(tokens);
  with_type(wt.scalar_type(), [&](auto token_type) {
    with_type(wp.scalar_type(), [&](auto position_type) {
      using W = decltype(token_type);
      using P = decltype(position_type);
      using Y = std::conditional_t<std::is_same_v<W, P>, W, float>;  // as they promote
      const auto loop = FASTGPT_CHOOSE(add_rows<W, P, Y>);
      const int64_t grain = kGrain / std::max<int64_t>(width, 1) + 1;
      parallel_for(0, tokens.numel(), grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          loop(const_data<W>(wt) + checked(token[row], vocab_size) * width,
               const_data<P>(wp) + (start + row % length) * width, data<Y>(y) + row * width, width);
      });
    });
  });
  return y;
}

// Which rows of the batch hold each token: rows[offsets[v]] to rows[offsets[v + 1]] those of v, in order.
struct Occurrences {
  std::vector<int64_t> offsets, rows;

  Occurrences(const Tensor& tokens, int64_t vocab_size) : offsets(vocab_size + 2), rows(tokens.numel()) {
    const auto* token = const_data<int64_t>(tokens);
    const int64_t count = tokens.numel();
    // Counted two places on: the second loop then moves what was one place on to where it belongs.
    for (int64_t row = 0; row < count; ++row) ++offsets[checked(token[row], vocab_size) + 2];
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    for (int64_t row = 0; row < count; ++row) rows[offsets[token[row] + 1]++] = row;
    offsets.pop_back();
  }
};

Tensor token_gradient(const Tensor& dy, const Tensor& tokens, int64_t vocab_size, at::ScalarType dtype) {
  const int64_t width = dy.size(2);
  const Tensor dwt = empty({vocab_size, width}, dtype);
  const Occurrences found(tokens, vocab_size);
  // Work is counted in rows to write and rows to read: that of token v begins at v + offsets[v].
  const auto first_token = [&](int64_t place) {
    int64_t low = 0, high = vocab_size;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (middle + found.offsets[middle] < place)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  with_type(dy.scalar_type(), [&](auto dy_type) {
    with_type(dtype, [&](auto type) {
      using D = decltype(dy_type);
      using T = decltype(type);
      const auto loop = FASTGPT_CHOOSE(sum_rows<D, T>);
      const int64_t grain = kGrain / std::max<int64_t>(width, 1) + 1;
      parallel_for(0, vocab_size + tokens.numel(), grain, [&](int64_t begin, int64_t end) {
        const int64_t last = first_token(end);
        for (int64_t v = first_token(begin); v < last; ++v) {
          const int64_t absent = v;
          while (v < last && found.offsets[v] == found.offsets[v + 1]) ++v;
          // Most tokens are in no batch. memset writes large pieces without reading them first.
          std::memset(data<T>(dwt) + absent * width, 0, (v - absent) * width * sizeof(T));
          if (v < last)
            loop(const_data<D>(dy), found.rows.data() + found.offsets[v], 0,
                 found.offsets[v + 1] - found.offsets[v], data<T>(dwt) + v * width, width);
        }
      });
    });
  });
  return dwt;
}

Tensor position_gradient(const Tensor& dy, int64_t block_size, int64_t start, at::ScalarType dtype) {
  const int64_t batch = dy.size(0), length = dy.size(1), width = dy.size(2);
  const Tensor dwp = empty({block_size, width}, dtype);
  with_type(dy.scalar_type(), [&](auto dy_type) {
    with_type(dtype, [&](auto type) {
      using D = decltype(dy_type);
      using T = decltype(type);
      const auto loop = FASTGPT_CHOOSE(sum_rows<D, T>);
      const int64_t grain = kGrain / std::max<int64_t>(width * batch, 1) + 1;
      parallel_for(0, block_size, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t t = row - start;
          const bool used = t >= 0 && t < length;
          loop(const_data<D>(dy) + (used ? t * width : 0), nullptr, length, used ? batch : 0,
               data<T>(dwp) + row * width, width);
        }
      });
    });
  });
  return dwp;
}

std::tuple<Tensor, Tensor> embedding_backward(const Tensor& dy, const Tensor& idx, int64_t vocab_size,
                                              int64_t block_size, int64_t start, at::ScalarType token_dtype,
                                              at::ScalarType position_dtype) {
  const Tensor dout = dy.contiguous();
  return {token_gradient(dout, idx.contiguous(), vocab_size, token_dtype),
          position_gradient(dout, block_size, start, position_dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("embedding_forward", &embedding_forward);
  m.impl("embedding_backward", &embedding_backward);
}

}  // namespace fastgpt
