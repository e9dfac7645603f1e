// Hot loops of GELU over contiguous (rows, width) matrices. Compiled for each instruction set: see cpu/isa.h.
//
//   gelu(h) = h s(h),  gelu'(h) = s + h s'
//   tanh form:  s = 1 / (1 + exp(-v)),  s' = v' s (1 - s),  v = 2 sqrt(2 / pi) (h + 0.044715 h^3)
//   erf form:   s = P(N(0, 1) <= h),    s' = exp(-h^2 / 2) / sqrt(2 pi)
//
// (1 + tanh(v / 2)) / 2 is the logistic function of v: one exponential, and no cancellation on the left.

namespace fastgpt::FASTGPT_ISA {

constexpr float kLogistic = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;
constexpr float kTail[] = {0.127661526f,    0.127660945f,  0.114622362f,  0.0878290907f, 0.0586540215f,
                           -0.00937774125f, 0.0653283298f, -0.146707773f, 0.0954074264f, -0.0210782066f};

inline Vec logistic_argument(Vec h) { return h * fma(h * h, splat(kLogistic * kCubic), splat(kLogistic)); }

// P(N(0, 1) <= h), given e = exp(-h^2 / 2). The tail beyond |h| is e r(|h|) with a smooth r: a polynomial in
// q = 1 / (1 + 0.32 |h|), fitted here to erfcx(|h| / sqrt 2) / 2 with a relative error below 4e-8.
inline Vec normal_cdf(Vec h, Vec e) {
  const Vec q = 1.0f / fma(abs(h), splat(0.32f), splat(1.0f));
  Vec r = splat(kTail[9]);
  for (int i = 8; i >= 0; --i) r = fma(r, q, splat(kTail[i]));
  const Vec tail = e * q * r;
  return h < 0.0f ? tail : 1.0f - tail;
}

// s, by which gelu multiplies h.
template <bool kTanh>
inline Vec gate(Vec h) {
  if (kTanh) return 1.0f / (1.0f + exp(-logistic_argument(h)));
  return normal_cdf(h, exp(h * h * -0.5f));
}

// The derivative of gelu. Far out, where exp is 0, a finite h must stay so: infinity times 0 is NaN.
template <bool kTanh>
inline Vec slope(Vec h) {
  if (kTanh) {
    const Vec v = logistic_argument(h);
    const Vec e = exp(-abs(v));
    const Vec r = 1.0f / (1.0f + e);
    const Vec s = v >= 0.0f ? r : e * r;
    Vec near = h > 20.0f ? splat(20.0f) : h;
    near = near < -20.0f ? splat(-20.0f) : near;
    const Vec hv = near * fma(near * near, splat(3.0f * kLogistic * kCubic), splat(kLogistic));  // h v'
    return fma(hv, e * r * r, s);  // s (1 - s) without 1 - s
  }
  const Vec e = exp(h * h * -0.5f);
  return fma(h, e * 0.3989422804014327f, normal_cdf(h, e));
}

// y = gelu(x + bias), without one where it is null; x + bias goes to h, which may be x, if that is not null.
template <typename T, bool kTanh>
void gelu_forward(const T* x, const float* bias, T* h, T* y, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < width; c += kWidth) {
      const int64_t n = left(width, c), at = row * width + c;
      Vec sum = load(x + at, n);
      if (bias != nullptr) sum += load(bias + c, n);
      if (h != nullptr) store(h + at, sum, n);
      store(y + at, sum * gate<kTanh>(sum), n);
    }
  }
}

// dx = dy * gelu'(x + bias), and db (null for none), its sum over these rows.
template <typename T, bool kTanh>
void gelu_backward(const T* dy, const T* x, const float* bias, T* dx, float* db, int64_t rows,
                   int64_t width) {
  if (db != nullptr)
    for (int64_t c = 0; c < width; ++c) db[c] = 0.0f;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < width; c += kWidth) {
      const int64_t n = left(width, c), at = row * width + c;
      Vec h = load(x + at, n);
      if (bias != nullptr) h += load(bias + c, n);
      const Vec d = load(dy + at, n) * slope<kTanh>(h);
      store(dx + at, d, n);
      if (db != nullptr) store(db + c, load(db + c, n) + d, n);
    }
  }
}

}  // namespace fastgpt::FASTGPT_ISA
