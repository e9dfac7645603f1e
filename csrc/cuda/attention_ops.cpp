// attention_forward and attention_backward on CUDA tensors. Schemas and equations: fastgpt/ops/attention.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda/attention.h"
#include "cuda/tensors.h"

namespace fastgpt::cuda {
namespace {

using at::Tensor;
using Three = std::array<Tensor, 3>;

constexpr int64_t kWidest = 256;

// As these kernels read it: a dense last dimension and, in 16 bits, rows that begin at multiples of 16 bytes.
bool readable(const Tensor& x) {
  if (x.stride(-1) != 1 && x.size(-1) != 1) return false;
  if (x.scalar_type() == at::kFloat) return true;
  bool aligned = x.size(-1) % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < x.dim() - 1; ++i) aligned = aligned && (x.size(i) <= 1 || x.stride(i) % 8 == 0);
  return aligned;
}

int64_t padded(int64_t D, at::ScalarType dtype) { return dtype == at::kFloat ? D : (D + 7) / 8 * 8; }

// x itself where it can be read, else a copy, with zeros up to a multiple of 8 columns.
Tensor prepare(const Tensor& x) {
  if (readable(x)) return x;
  const int64_t D = x.size(-1), width = padded(D, x.scalar_type());
  if (width == D) return x.clone(at::MemoryFormat::Contiguous);
  return at::constant_pad_nd(x, {0, width - D});
}

Heads heads(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// q, k and v, (B, T, H, D); q alone is all three, (B, T, 3, H, D).
Three split(const Tensor& q, const std::optional<Tensor>& k, const std::optional<Tensor>& v) {
  if (k.has_value() && v.has_value()) return {prepare(q), prepare(*k), prepare(*v)};
  const Tensor packed = prepare(q);
  return {packed.select(2, 0), packed.select(2, 1), packed.select(2, 2)};
}

Attention describe(const Three& qkv, int64_t D, const std::optional<Tensor>& seed, double dropout_p,
                   std::optional<double> scale, std::optional<int64_t> window) {
  const Tensor &q = qkv[0], &k = qkv[1];
  TORCH_CHECK_VALUE(D >= 1 && D <= kWidest, "the head size is ", D, ": kernels take 1 to ", kWidest);
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == qkv[2].scalar_type(),
                    "q, k and v have dtypes ", q.scalar_type(), ", ", k.scalar_type(), " and ",
                    qkv[2].scalar_type(), ": they must be the same");
  const int64_t longest = std::numeric_limits<int>::max() / 4;
  TORCH_CHECK_VALUE(k.size(1) <= longest, "k has ", k.size(1), " positions: kernels take up to ", longest);
  Attention a{};
  a.B = static_cast<int>(q.size(0));
  a.H = static_cast<int>(q.size(2));
  a.Tq = static_cast<int>(q.size(1));
  a.Tk = static_cast<int>(k.size(1));
  a.D = static_cast<int>(q.size(3));
  a.window = static_cast<int>(std::min(window.value_or(k.size(1)), k.size(1)));
  a.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(D))));
  a.keep = static_cast<float>(1.0 - dropout_p);
  if (seed.has_value()) {
    a.seed = seed->const_data_ptr<int64_t>();
    a.threshold = dropout_threshold(static_cast<float>(dropout_p));
  }
  return a;
}

// Without the columns that `prepare` added, contiguous.
Tensor finished(const Tensor& gradient, int64_t D) {
  return gradient.size(-1) == D ? gradient : gradient.narrow(-1, 0, D).contiguous();
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const std::optional<Tensor>& k,
                                   const std::optional<Tensor>& v, const std::optional<Tensor>& seed,
                                   double dropout_p, std::optional<double> scale,
                                   std::optional<int64_t> window) {
  const DeviceGuard guard(q);
  const Three qkv = split(q, k, v);
  const int64_t D = q.size(-1);
  const Attention a = describe(qkv, D, seed, dropout_p, scale, window);
  const Tensor o = at::empty({a.B, a.Tq, a.H, a.D}, q.options());
  const Tensor lse = at::empty({a.B, a.H, a.Tq}, q.options().dtype(at::kFloat));
  Shares shares = attention_shares(a, dtype_of(q), sm_count());
  Tensor parts, statistics;  // alive until the kernels are queued
  if (shares.count > 1) {
    parts = at::empty({shares.count, a.B, a.H, a.Tq, a.D}, lse.options());
    statistics = at::empty({2, shares.count, a.B, a.H, a.Tq}, lse.options());
    shares.parts = parts.data_ptr<float>();
    shares.maxima = statistics.data_ptr<float>();
    shares.totals = shares.maxima + statistics.numel() / 2;
  }
  attention_forward(a, shares, dtype_of(q), heads(qkv[0]), heads(qkv[1]), heads(qkv[2]), o.data_ptr(),
                    lse.data_ptr<float>(), current_stream());
  return {finished(o, D), lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_out, const Tensor& q,
                                            const std::optional<Tensor>& k, const std::optional<Tensor>& v,
                                            const Tensor& o, const Tensor& lse,
                                            const std::optional<Tensor>& seed, double dropout_p,
                                            std::optional<double> scale, std::optional<int64_t> window) {
  const DeviceGuard guard(q);
  const Three qkv = split(q, k, v);
  const int64_t D = q.size(-1);
  const Attention a = describe(qkv, D, seed, dropout_p, scale, window);
  const Tensor outs = prepare(o.contiguous()), d_outs = prepare(plain(d_out, q.scalar_type()));
  const Tensor rows = lse.contiguous(), delta = at::empty_like(rows);
  const bool packed = !k.has_value();
  Tensor all;
  Three gradients;
  if (packed) {
    all = at::empty({a.B, a.Tq, 3, a.H, a.D}, q.options());
    for (int64_t i = 0; i < 3; ++i) gradients[i] = all.select(2, i);
  } else {
    for (int64_t i = 0; i < 3; ++i) gradients[i] = at::empty(qkv[i].sizes(), q.options());
  }
  attention_backward(a, dtype_of(q), d_outs.const_data_ptr(), heads(qkv[0]), heads(qkv[1]), heads(qkv[2]),
                     outs.const_data_ptr(), rows.const_data_ptr<float>(), delta.data_ptr<float>(),
                     heads(gradients[0]), heads(gradients[1]), heads(gradients[2]), current_stream());
  if (packed) return {finished(all, D), at::empty({0}, q.options()), at::empty({0}, q.options())};
  return {finished(gradients[0], D), finished(gradients[1], D), finished(gradients[2], D)};
}

}  // namespace

uint32_t dropout_threshold(float p) {
  uint32_t low = 0, high = 1u << 31;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (static_cast<float>(middle) * 4.6566127342e-10f >= p) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("attention_forward", &forward);
  m.impl("attention_backward", &backward);
}

}  // namespace fastgpt::cuda
