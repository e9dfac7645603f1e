// Hot loops of LayerNorm and RMSNorm over rows [begin, end) of (rows, width) matrices; between its passes a
// row stays in the L1 cache. RMSNorm is LayerNorm with a mean of 0: its `mean` is null. Compiled for each
// instruction set: see cpu/isa.h.

namespace fastgpt::FASTGPT_ISA {

// Sums are kept in so many vectors, since an addition takes longer than it is until the next one could begin.
constexpr int64_t kChains = 4;

inline float sum(const Vec (&totals)[kChains]) {
  return sum(totals[0] + totals[1] + (totals[2] + totals[3]));
}

template <typename T>
inline float row_mean(const T* x, int64_t width) {
  Vec totals[kChains] = {};
  int64_t c = 0;
  for (; c + kChains * kWidth <= width; c += kChains * kWidth)
#pragma GCC unroll 4
    for (int64_t i = 0; i < kChains; ++i) totals[i] += load(x + c + i * kWidth);
  for (; c < width; c += kWidth) totals[0] += load(x + c, left(width, c));
  return sum(totals) / static_cast<float>(width);
}

template <typename T>
inline float row_rstd(const T* x, float mean, int64_t width, float eps) {
  Vec totals[kChains] = {};
  int64_t c = 0;
  for (; c + kChains * kWidth <= width; c += kChains * kWidth)
#pragma GCC unroll 4
    for (int64_t i = 0; i < kChains; ++i) {
      const Vec centred = load(x + c + i * kWidth) - mean;
      totals[i] = fma(centred, centred, totals[i]);
    }
  for (; c < width; c += kWidth) {
    const int64_t n = left(width, c);
    const Vec centred = first(load(x + c, n) - mean, n);
    totals[0] = fma(centred, centred, totals[0]);
  }
  return 1.0f / std::sqrt(sum(totals) / static_cast<float>(width) + eps);
}

// With a residual, its sum with x is what is normalised, and is written to `summed`.
template <typename T>
void layer_norm_forward(const T* x, const T* residual, const float* weight, const float* bias, T* y,
                        T* summed, float* mean, float* rstd, int64_t begin, int64_t end, int64_t width,
                        float eps) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * width;
    const T* values = x + at;
    if (residual != nullptr) {
      for (int64_t c = at; c < at + width; c += kWidth) {
        const int64_t n = left(at + width, c);
        store(summed + c, load(x + c, n) + load(residual + c, n), n);
      }
      values = summed + at;
    }
    const float centre = mean != nullptr ? row_mean(values, width) : 0.0f;
    const float scale = row_rstd(values, centre, width, eps);
    for (int64_t c = 0; c < width; c += kWidth) {
      const int64_t n = left(width, c);
      const Vec shift = bias != nullptr ? load(bias + c, n) : Vec{};
      store(y + at + c, fma((load(values + c, n) - centre) * scale, load(weight + c, n), shift), n);
    }
    if (mean != nullptr) mean[row] = centre;
    rstd[row] = scale;
  }
}

// dx, and the sums over these rows that dw and db (null without bias) are made of. `dsummed`, the gradient of
// the sum that the forward pass returned, is added to dx where it is not null.
template <typename T>
void layer_norm_backward(const T* dy, const T* dsummed, const T* x, const float* weight, const float* mean,
                         const float* rstd, T* dx, float* dw, float* db, int64_t begin, int64_t end,
                         int64_t width) {
  for (int64_t c = 0; c < width; ++c) dw[c] = 0.0f;
  if (db != nullptr)
    for (int64_t c = 0; c < width; ++c) db[c] = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * width;
    const float centre = mean != nullptr ? mean[row] : 0.0f;
    const float scale = rstd[row];
    Vec sum_g = {}, sum_gx = {};
    for (int64_t c = 0; c < width; c += kWidth) {
      const int64_t n = left(width, c);
      const Vec d = load(dy + at + c, n);
      const Vec xhat = (load(x + at + c, n) - centre) * scale;
      const Vec g = d * load(weight + c, n);  // 0 past the end
      sum_g += g;
      sum_gx = fma(g, xhat, sum_gx);
      store(dw + c, fma(d, xhat, load(dw + c, n)), n);
      if (db != nullptr) store(db + c, load(db + c, n) + d, n);
    }
    const float mean_g = mean != nullptr ? sum(sum_g) / static_cast<float>(width) : 0.0f;
    const float mean_gx = sum(sum_gx) / static_cast<float>(width);
    for (int64_t c = 0; c < width; c += kWidth) {
      const int64_t n = left(width, c);
      const Vec xhat = (load(x + at + c, n) - centre) * scale;
      const Vec g = load(dy + at + c, n) * load(weight + c, n);
      Vec out = (g - mean_g - xhat * mean_gx) * scale;
      if (dsummed != nullptr) out += load(dsummed + at + c, n);
      store(dx + at + c, out, n);
    }
  }
}

}  // namespace fastgpt::FASTGPT_ISA
