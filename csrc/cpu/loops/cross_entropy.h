// Hot loops of cross-entropy, in the notation of kernels/cross_entropy.py: a row's maximum and its sum of
// exponentials in one read, block by block, and its gradient in a second, which comes from the cache.
// Compiled for each instruction set: see cpu/isa.h.

namespace fastgpt::FASTGPT_ISA {

constexpr int64_t kBlock = 2048;  // columns: at most 8 KB, which the L1 cache holds between two looks

// e^x for x <= 0, to about an ulp: `exp` of vec.h less what greater numbers ask for.
inline Vec exp_negative(Vec x) {
  const ExpParts parts = exp_parts(x);
  const Vec scale = as_float((parts.shifted << 23) + (127u << 23));  // 2^n; the shifter's own bits leave
  return x < -87.3365479f ? Vec{} : parts.power * scale;
}

inline float exp_negative(float x) { return exp_negative(splat(x))[0]; }

// The first n elements; the others are -inf, of which neither maximum nor sum takes notice.
template <typename T>
inline Vec load_logits(const T* x, int64_t n) {
  const Vec values = load(x, n);
  if (n == kWidth) return values;
  float part[kWidth];
  store(part, values);
  for (int64_t i = n; i < kWidth; ++i) part[i] = -std::numeric_limits<float>::infinity();
  return load(part);
}

// The greatest of `top` and n elements, NaN apart: that comes back in the sum.
template <typename T>
inline float block_max(const T* x, int64_t n, float top) {
  Vec greatest[4] = {splat(top), splat(top), splat(top), splat(top)};
  int64_t c = 0;
  for (; c + 4 * kWidth <= n; c += 4 * kWidth)
    for (int i = 0; i < 4; ++i) greatest[i] = max(load(x + c + i * kWidth), greatest[i]);
  for (; c < n; c += kWidth) greatest[0] = max(load_logits(x + c, left(n, c)), greatest[0]);
  return max(max(max(greatest[0], greatest[1]), max(greatest[2], greatest[3])));
}

template <typename T>
inline float block_sum_exp(const T* x, int64_t n, float top) {
  Vec total = {};
  for (int64_t c = 0; c < n; c += kWidth) total += exp_negative(load_logits(x + c, left(n, c)) - top);
  return sum(total);
}

template <typename T>
inline float block_sum_distance(const T* x, int64_t n, float shift) {
  Vec total = {};
  for (int64_t c = 0; c < n; c += kWidth) {
    const int64_t count = left(n, c);
    total += first(load(x + c, count) - shift, count);
  }
  return sum(total);
}

template <typename T>
inline void fill_zero(T* x, int64_t n) {
  for (int64_t c = 0; c < n; c += kWidth) store(x + c, Vec{}, left(n, c));
}

template <typename T>
void cross_entropy_row(const LossRows<T>& all, int64_t row) {
  const float dloss = all.dloss != nullptr ? all.dloss[row * all.dloss_stride] : 1.0f;
  if (all.filled && dloss == 1.0f) return;  // dlogits holds that gradient already
  const T* x = all.logits + row * all.logits_stride;
  T* dx = all.dlogits != nullptr ? all.dlogits + row * all.dlogits_stride : nullptr;
  const int64_t y = all.targets[row], size = all.size;
  if (y == all.ignore_index) {
    if (all.losses != nullptr) all.losses[row] = 0.0f;
    if (dx != nullptr) fill_zero(dx, all.width);
    return;
  }

  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const bool known = y >= 0 && y < size;
  const float x_y = known ? load(x + y, 1)[0] : std::numeric_limits<float>::quiet_NaN();
  const float shift = x_y == -kInfinity ? 0.0f : x_y;  // near the others: their sum loses no digits
  float top = std::numeric_limits<float>::lowest();    // finite: -inf - -inf would be NaN
  float total = 0.0f, excess = 0.0f;
  for (int64_t c = 0; c < size; c += kBlock) {
    const int64_t n = size - c < kBlock ? size - c : kBlock;
    const float greater = block_max(x + c, n, top);
    total = total * exp_negative(top - greater) + block_sum_exp(x + c, n, greater);
    top = greater;
    if (all.label_smoothing != 0.0f) excess += block_sum_distance(x + c, n, shift);
  }
  const float log_total = std::log(total);
  const float lse = top + log_total;
  if (all.losses != nullptr)
    all.losses[row] = (top - x_y) + log_total - all.label_smoothing * (excess / static_cast<float>(size)) +
                      all.z_loss * lse * lse;
  if (dx == nullptr) return;

  const float g = dloss / all.count;
  const float scale = known ? g * (1.0f + 2.0f * all.z_loss * lse) / total : x_y;
  const float everywhere = g * all.label_smoothing / static_cast<float>(size);
  for (int64_t c = 0; c < size; c += kWidth) {
    const int64_t n = left(size, c);
    store(dx + c, exp_negative(load(x + c, n) - top) * scale - everywhere, n);
  }
  fill_zero(dx + size, all.width - size);
  if (!known) return;
  // p - 1 before the rest: what is left when they cancel is exact, and for a single column it is 0.
  const float p = exp_negative(x_y - top) / total;
  const float at_y = g * ((p - 1.0f) + all.label_smoothing + p * (2.0f * all.z_loss * lse)) - everywhere;
  store(dx + y, splat(at_y), 1);
}

template <typename T>
void cross_entropy_rows(const LossRows<T>& all, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) cross_entropy_row(all, row);
}

}  // namespace fastgpt::FASTGPT_ISA
