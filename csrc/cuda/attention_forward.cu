#include "cuda/attention_forward.cuh"
#include "cuda/attention_fp32.cuh"
#include "cuda/attention_launch.cuh"

namespace fastgpt::cuda {

void attention_forward(const Attention& a, DType dtype, Heads q, Heads k, Heads v, void* o, float* lse,
                       cudaStream_t stream) {
  Launch launch("attention_forward", {a.B, a.Tq, a.H, a.D}, stream);
  const int64_t heads = static_cast<int64_t>(a.B) * a.H;
  if (dtype == DType::kFloat) {
    return with_columns(a.D, [&](auto columns) {
      using L = Fp32Launch<decltype(columns)::value>;
      launch.grid(heads * ceil_div(a.Tq, L::kRows)).block(L::kThreads).shared(L::shared(a.D, 1, 1));
      launch(attention_forward_fp32_kernel<L>, a, q, k, v, static_cast<float*>(o), lse);
    });
  }
  with_tiles(dtype, a.D, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    using L = ForwardLaunch<decltype(width)::value>;
    launch.grid(heads * ceil_div(a.Tq, L::kRows)).block(L::kThreads).shared(L::kShared);
    launch(attention_forward_kernel<T, L>, a, q, k, v, static_cast<T*>(o), lse);
  });
}

}  // namespace fastgpt::cuda
