#include "cuda/attention_backward.cuh"
#include "cuda/attention_fp32.cuh"
#include "cuda/attention_launch.cuh"

namespace fastgpt::cuda {

void attention_backward(const Attention& a, DType dtype, const void* d_out, Heads q, Heads k, Heads v,
                        const void* o, const float* lse, float* delta, Heads dq, Heads dk, Heads dv,
                        cudaStream_t stream) {
  const std::vector<int64_t> shape{a.B, a.Tq, a.H, a.D};
  Launch queries("attention_backward_queries", shape, stream), keys("attention_backward_keys", shape, stream);
  const int64_t heads = static_cast<int64_t>(a.B) * a.H;
  if (dtype == DType::kFloat) {
    return with_columns(a.D, [&](auto columns) {
      using L = Fp32Launch<decltype(columns)::value>;
      const float* const d_outs = static_cast<const float*>(d_out);
      queries.grid(heads * ceil_div(a.Tq, L::kRows)).block(L::kThreads).shared(L::shared(a.D, 2, 1));
      queries(attention_backward_queries_fp32_kernel<L>, a, d_outs, q, k, v, static_cast<const float*>(o),
              lse, delta, dq);
      keys.grid(heads * ceil_div(a.Tk, L::kRows)).block(L::kThreads).shared(L::shared(a.D, 2, 2));
      keys(attention_backward_keys_fp32_kernel<L>, a, d_outs, q, k, v, lse, delta, dk, dv);
    });
  }
  with_tiles(dtype, a.D, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    using Q = QueriesLaunch<decltype(width)::value>;
    using K = KeysLaunch<decltype(width)::value>;
    const T* const d_outs = static_cast<const T*>(d_out);
    queries.grid(heads * ceil_div(a.Tq, Q::kRows)).block(Q::kThreads).shared(Q::kShared);
    queries(attention_backward_queries_kernel<T, Q>, a, d_outs, q, k, v, static_cast<const T*>(o), lse, delta,
            dq);
    keys.grid(heads * ceil_div(a.Tk, K::kRows), K::kD / K::W).block(K::kThreads).shared(K::kShared);
    keys(attention_backward_keys_kernel<T, K>, a, d_outs, q, k, v, lse, delta, dk, dv);
  });
}

}  // namespace fastgpt::cuda
