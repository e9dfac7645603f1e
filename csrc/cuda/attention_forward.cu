#include <algorithm>

#include "cuda/attention_forward.cuh"
#include "cuda/attention_fp32.cuh"
#include "cuda/attention_launch.cuh"

namespace fastgpt::cuda {
namespace {

constexpr int kFewQueries = 16;
constexpr int kTile = 64;         // a multiple of the keys of a tile, whatever the head size
constexpr int kLeastShare = 256;  // keys worth a block of their own
constexpr int64_t kMostShares = 64;

}  // namespace

Shares attention_shares(const Attention& a, DType dtype, int multiprocessors) {
  Shares shares{1, 0, a.Tk, nullptr, nullptr, nullptr};
  if (a.Tq > kFewQueries || dtype == DType::kFloat) return shares;
  const int begin = std::max(a.Tk - a.Tq - a.window + 1, 0) / kTile * kTile;
  const int64_t heads = std::max<int64_t>(static_cast<int64_t>(a.B) * a.H, 1);
  const int64_t wanted = std::min(ceil_div(2 * multiprocessors, heads), kMostShares);
  const int64_t size = std::max<int64_t>(ceil_div(a.Tk - begin, wanted), kLeastShare);
  shares.begin = begin;
  shares.size = static_cast<int>(ceil_div(size, kTile) * kTile);
  shares.count = static_cast<int>(std::max<int64_t>(ceil_div(a.Tk - begin, shares.size), 1));
  return shares;
}

void attention_forward(const Attention& a, const Shares& shares, DType dtype, Heads q, Heads k, Heads v,
                       void* o, float* lse, cudaStream_t stream) {
  const std::vector<int64_t> shape{a.B, a.Tq, a.H, a.D};
  Launch launch("attention_forward", shape, stream), combine("attention_combine", shape, stream);
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
    launch.grid(heads * ceil_div(a.Tq, L::kRows), shares.count).block(L::kThreads).shared(L::kShared);
    launch(attention_forward_kernel<T, L>, a, shares, q, k, v, static_cast<T*>(o), lse);
    if (shares.count == 1) return;
    combine.grid(heads * a.Tq).block(L::kD);
    combine(attention_combine_kernel<T>, a, shares, static_cast<T*>(o), lse);
  });
}

}  // namespace fastgpt::cuda
