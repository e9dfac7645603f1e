// Vectors of floats, by the compilers' vector extension: SSE2 or NEON, AVX2, AVX-512 with one source.
// Included once for every instruction set (cpu/each_isa.h), hence without an include guard.

namespace fastgpt::FASTGPT_ISA {

constexpr int64_t kWidth = FASTGPT_VECTOR_BYTES / 4;  // floats in a vector

typedef float Vec __attribute__((vector_size(FASTGPT_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(FASTGPT_VECTOR_BYTES)));  // and what comparisons give
typedef uint32_t Bits __attribute__((vector_size(FASTGPT_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(FASTGPT_VECTOR_BYTES / 2)));

inline IntVec lane_numbers() {
  IntVec numbers;
  for (int64_t i = 0; i < kWidth; ++i) numbers[i] = static_cast<int32_t>(i);
  return numbers;
}

inline Vec splat(float x) { return Vec{} + x; }
inline Bits as_bits(Vec x) { return (Bits)x; }
inline Vec as_float(Bits x) { return (Vec)x; }

// float -> the 16 bits of the nearest value, ties to even; NaN stays NaN.
inline HalfBits to_bfloat16(Vec x) {
#ifdef FASTGPT_BF16
  return (HalfBits)_mm512_cvtneps_pbh(x);  // numbers below 2^-126 become 0
#else
  const Bits bits = as_bits(x);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_convertvector((x == x ? rounded : bits | 0x400000u) >> 16, HalfBits);
#endif
}

inline Vec from_bfloat16(HalfBits x) { return as_float(__builtin_convertvector(x, Bits) << 16); }

// Half precision by arithmetic on the bits, so that no instruction set is needed for it. Normal numbers have
// the exponent moved by 127 - 15; subnormal ones are aligned, and rounded, by an addition of float.
inline HalfBits to_half(Vec x) {
  const Bits sign = as_bits(x) & 0x80000000u;
  const Bits bits = as_bits(x) ^ sign;
  const Bits odd = (bits >> 13) & 1u;
  const Bits normal = (bits - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  const Bits subnormal = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;  // 2^-24 is the last place of 0.5f
  const Bits infinity_or_nan = bits > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits finite = bits < (113u << 23) ? subnormal : normal;
  return __builtin_convertvector((bits >= (143u << 23) ? infinity_or_nan : finite) | (sign >> 16), HalfBits);
}

inline Vec from_half(HalfBits x) {
  const Bits wide = __builtin_convertvector(x, Bits);
  const Bits magnitude = (wide & 0x7fffu) << 13;
  const Bits exponent = magnitude & 0x0f800000u;
  const Bits normal = magnitude + ((127u - 15u) << 23);
  const Bits infinity_or_nan = magnitude + ((255u - 31u) << 23);
  const Bits subnormal = as_bits(as_float(magnitude + (113u << 23)) - as_float(Bits{} + (113u << 23)));
  const Bits value = exponent == 0x0f800000u ? infinity_or_nan : exponent == 0u ? subnormal : normal;
  return as_float(value | ((wide & 0x8000u) << 16));
}

inline Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline HalfBits load_bits(const void* p) {
  HalfBits x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline Vec load(const BFloat16* p) { return from_bfloat16(load_bits(p)); }
inline Vec load(const Half* p) { return from_half(load_bits(p)); }

inline void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline void store_bits(void* p, HalfBits x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline void store(BFloat16* p, Vec x) { store_bits(p, to_bfloat16(x)); }
inline void store(Half* p, Vec x) { store_bits(p, to_half(x)); }

// The elements of a vector that are left of `width` from index c on.
inline int64_t left(int64_t width, int64_t c) { return width - c < kWidth ? width - c : kWidth; }

// The first n elements; the others are 0.
template <typename T>
inline Vec load(const T* p, int64_t n) {
  if (n == kWidth) return load(p);
  T part[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

template <typename T>
inline void store(T* p, Vec x, int64_t n) {
  if (n == kWidth) return store(p, x);
  T part[kWidth];
  store(part, x);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// x, with 0 in place of all but the first n elements.
inline Vec first(Vec x, int64_t n) {
  if (n == kWidth) return x;
  float part[kWidth] = {};
  store(part, x, n);
  return load(part);
}

// a * b + c, in one rounding where the instruction set has that. The compiler fuses nothing by itself
// (-ffp-contract=off): a product that is used twice must be the same number both times.
inline Vec fma(Vec a, Vec b, Vec c) {
#if FASTGPT_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif FASTGPT_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

#if FASTGPT_VECTOR_BYTES == 64
// x 2^n for whole n, also where that is infinite or subnormal.
inline Vec times_power(Vec x, Vec n) { return _mm512_maskz_scalef_ps(0xffff, x, n); }
#endif

inline Vec abs(Vec x) { return as_float(as_bits(x) & 0x7fffffffu); }
inline Vec sqrt(Vec x) {
  for (int64_t i = 0; i < kWidth; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// In a fixed order: halves are added to halves.
inline float sum(Vec x) {
  float parts[kWidth];
  store(parts, x);
  for (int64_t n = kWidth / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) parts[i] += parts[i + n];
  return parts[0];
}

// NaN is the greatest, so that it is not lost.
inline float max(Vec x) {
  float parts[kWidth];
  store(parts, x);
  float greatest = parts[0];
  for (int64_t i = 1; i < kWidth; ++i)
    greatest = parts[i] > greatest || parts[i] != parts[i] ? parts[i] : greatest;
  return greatest;
}

// e^x = power * 2^n to about an ulp: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r. n is in the low
// bits of `shifted`, above those of `shifter`.
struct ExpParts {
  Vec power;
  Bits shifted, shifter;
};

inline ExpParts exp_parts(Vec x) {
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, splat(1.44269504088896341f), shifter);
  const Vec n = shifted - shifter;
  const Vec r = fma(n, splat(-1.42860682030941723e-6f), fma(n, splat(-0.693145751953125f), x));
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return {p, as_bits(shifted), as_bits(shifter)};
}

// Below -87.34, where the result is subnormal, 0 or that.
inline Vec exp(Vec x) {
#if FASTGPT_VECTOR_BYTES == 64
  x = x < -104.0f ? splat(-104.0f) : x > 89.0f ? splat(89.0f) : x;
  const ExpParts clamped = exp_parts(x);
  return times_power(clamped.power, (Vec)clamped.shifted - (Vec)clamped.shifter);
#else
  const ExpParts parts = exp_parts(x);
  // 2^n in two factors, since 2^128, on the way to the largest floats, is none.
  const IntVec whole = (IntVec)(parts.shifted - parts.shifter);
  const IntVec half = whole >> 1;
  const Vec scale_1 = (Vec)((half + 127) << 23);
  const Vec scale_2 = (Vec)((whole - half + 127) << 23);
  Vec y = parts.power * scale_1 * scale_2;
  y = x > 88.7228394f ? splat(std::numeric_limits<float>::infinity()) : y;
  y = x < -87.3365479f ? Vec{} : y;
  return x == x ? y : x;
#endif
}

}  // namespace fastgpt::FASTGPT_ISA
