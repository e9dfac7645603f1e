// attention on CPU tensors. The equations are in fastgpt/ops/attention.py.
#include "cpu/attention.h"

#include <torch/library.h>

#include <cmath>
#include <memory>
#include <new>
#include <tuple>
#include <utility>

#include "cpu/common.h"

#define FASTGPT_LOOPS "cpu/loops/attention.h"
#include "cpu/each_isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 1 << 20;  // multiplications that are worth a thread

struct Delete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<float[], Delete>;

Scratch scratch(int64_t floats) {
  return Scratch(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
}

// The same elements; dense in the last dimension, as every view of packed qkv or of a cache is.
Tensor dense_heads(const Tensor& x, at::ScalarType dtype) {
  const Tensor same = x.to(dtype);
  return same.stride(-1) == 1 ? same : same.contiguous();
}

// q, k and v, (B, T, H, D) each. Without k and v, q is all three, (B, T, 3, H, D).
struct Inputs {
  Tensor q, k, v;

  Inputs(const Tensor& q_, const std::optional<Tensor>& k_, const std::optional<Tensor>& v_)
      : q(dense_heads(q_, q_.scalar_type())) {
    if (k_.has_value() && v_.has_value()) {
      k = dense_heads(*k_, q.scalar_type());
      v = dense_heads(*v_, q.scalar_type());
    } else {
      const Tensor packed = q;
      q = packed.select(2, 0), k = packed.select(2, 1), v = packed.select(2, 2);
    }
  }
};

template <typename T>
Heads<T> heads(const Tensor& x) {
  T* start;
  if constexpr (std::is_const_v<T>)
    start = const_data<std::remove_const_t<T>>(x);
  else
    start = data<T>(x);
  return {start, x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
Attention<T> attention(const Inputs& in, const std::optional<Tensor>& seed, double dropout_p,
                       std::optional<double> scale, std::optional<int64_t> window) {
  Attention<T> a;
  a.q = heads<const T>(in.q), a.k = heads<const T>(in.k), a.v = heads<const T>(in.v);
  a.batches = in.q.size(0), a.queries = in.q.size(1), a.heads = in.q.size(2), a.width = in.q.size(3);
  a.keys = in.k.size(1);
  a.window = std::min(window.value_or(a.keys), a.keys);
  a.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(a.width))) * M_LOG2E);
  a.seed = const_data<int64_t>(seed);
  a.dropout_p = static_cast<float>(dropout_p);
  return a;
}

int64_t blocks(int64_t count) { return (count + kBlock - 1) / kBlock; }

// Tasks that take about `multiplications` each, in threads.
template <typename F>
void in_threads(int64_t tasks, int64_t multiplications, int64_t scratch_floats, F task) {
  parallel_for(0, tasks, kGrain / std::max<int64_t>(multiplications, 1) + 1, [&](int64_t begin, int64_t end) {
    const Scratch own = scratch(scratch_floats);
    for (int64_t i = begin; i < end; ++i) task(i, own.get());
  });
}

template <typename T>
void forward_blocks(const Attention<T>& a, const Heads<T>& o, float* lse) {
  const auto loop = FASTGPT_CHOOSE(attention_forward<T>);
  const int64_t per_head = blocks(a.queries);
  in_threads(a.batches * a.heads * per_head, kBlock * a.keys * a.width, forward_scratch(a.width),
             [&](int64_t task, float* own) {
               const int64_t head = task / per_head, i = task % per_head;
               const int64_t block =
                   i % 2 ? per_head - 1 - i / 2 : i / 2;  // short and long ones next to each other
               loop(a, head / a.heads, head % a.heads, block, o, lse + head * a.queries, own);
             });
}

template <typename T>
void forward_few(const Attention<T>& a, const Heads<T>& o, float* lse) {
  const auto loop = FASTGPT_CHOOSE(attention_few<T>);
  const auto merge = FASTGPT_CHOOSE(attention_merge<T>);
  const int64_t rows = a.batches * a.heads * a.queries, stride = padded(a.width) + 2;
  const int64_t start = std::max<int64_t>(a.offset() - a.window + 1, 0);  // the first key that is seen
  const int64_t chunks = std::max<int64_t>((a.keys - start + kChunk - 1) / kChunk, 1);
  const Scratch parts = scratch(rows * chunks * stride);
  in_threads(rows * chunks, kChunk * a.width, few_scratch(a.width), [&](int64_t task, float* own) {
    const int64_t row = task / chunks, head = row / a.queries, begin = start + task % chunks * kChunk;
    float* const part = parts.get() + task * stride;
    float* const top = part + padded(a.width);
    loop(a, head / a.heads, head % a.heads, row % a.queries, begin, std::min(begin + kChunk, a.keys), part,
         top, top + 1, own);
  });
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t head = row / a.queries;
    merge(parts.get() + row * chunks * stride, chunks, stride, a.width,
          o.at(head / a.heads, row % a.queries, head % a.heads), lse + row);
  }
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const std::optional<Tensor>& k,
                                             const std::optional<Tensor>& v,
                                             const std::optional<Tensor>& seed, double dropout_p,
                                             std::optional<double> scale, std::optional<int64_t> window) {
  const Inputs in(q, k, v);
  const Tensor o = empty(in.q.sizes(), q.scalar_type());
  const Tensor lse = empty({in.q.size(0), in.q.size(2), in.q.size(1)}, at::kFloat);
  with_type(q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto a = attention<T>(in, seed, dropout_p, scale, window);
    if (a.queries <= kFewQueries && a.seed == nullptr && a.keys > a.queries)
      forward_few(a, heads<T>(o), data<float>(lse));
    else
      forward_blocks(a, heads<T>(o), data<float>(lse));
  });
  return {o, lse};
}

// A head to a task. Where that leaves threads idle, a task is the gradient of some keys, or that of a block
// of queries, of the same bits; together they take 7/5 of the products.
template <typename T>
void backward_heads(const Attention<T>& a, const Heads<const T>& o, const Heads<const T>& d_o,
                    const float* lse, const Gradients<T>& out) {
  const auto loop = FASTGPT_CHOOSE(attention_backward<T>);
  const int64_t heads = a.batches * a.heads, query_blocks = blocks(a.queries), tiles = blocks(a.keys);
  const auto run = [&](int64_t head, int64_t first_block, int64_t last_block, int64_t first_tile,
                       int64_t last_tile, const Gradients<T>& wanted, float* own) {
    loop(a, head / a.heads, head % a.heads, first_block, last_block, first_tile, last_tile, o, d_o,
         lse + head * a.queries, wanted, own);
  };
  if (heads >= at::get_num_threads()) {
    in_threads(heads, a.queries * a.keys * a.width, backward_scratch(a.width, a.keys),
               [&](int64_t head, float* own) { run(head, 0, query_blocks, 0, tiles, out, own); });
    return;
  }
  const Gradients<T> queries_alone{out.dq, {}, {}}, keys_alone{{}, out.dk, out.dv};
  const int64_t pairs = (tiles + 1) / 2, per_head = pairs + query_blocks;
  in_threads(heads * per_head, kBlock * a.keys * a.width, backward_scratch(a.width, 2 * kBlock),
             [&](int64_t task, float* own) {
               const int64_t head = task / per_head, i = task % per_head;
               if (i < pairs)
                 run(head, 0, query_blocks, 2 * i, std::min(2 * i + 2, tiles), keys_alone, own);
               else
                 run(head, i - pairs, i - pairs + 1, 0, tiles, queries_alone, own);
             });
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_o, const Tensor& q,
                                                      const std::optional<Tensor>& k,
                                                      const std::optional<Tensor>& v, const Tensor& o,
                                                      const Tensor& lse, const std::optional<Tensor>& seed,
                                                      double dropout_p, std::optional<double> scale,
                                                      std::optional<int64_t> window) {
  const auto dtype = q.scalar_type();
  const Inputs in(q, k, v);
  const Tensor output = dense_heads(o, dtype), gradient = dense_heads(d_o, dtype);
  const Tensor statistics = plain(lse, at::kFloat);
  const bool packed = !k.has_value();
  const Tensor dq = empty(q.sizes(), dtype);
  const Tensor dk = packed ? empty({0}, dtype) : empty(k->sizes(), k->scalar_type());
  const Tensor dv = packed ? empty({0}, dtype) : empty(v->sizes(), v->scalar_type());
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto a = attention<T>(in, seed, dropout_p, scale, window);
    const auto part = [&](int64_t i) { return heads<T>(dq.select(2, i)); };
    const Gradients<T> out = packed ? Gradients<T>{part(0), part(1), part(2)}
                                    : Gradients<T>{heads<T>(dq), heads<T>(dk), heads<T>(dv)};
    backward_heads(a, heads<const T>(output), heads<const T>(gradient), const_data<float>(statistics), out);
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("attention_forward", &attention_forward);
  m.impl("attention_backward", &attention_backward);
}

}  // namespace fastgpt
