// Hot loops of AdamW and of the gradients' norm over one chunk of a tensor. Compiled for each instruction
// set: see cpu/isa.h.
//
// Arithmetic is in fp32, over parts of a chunk. Where a tensor is of another type, its part is converted to a
// buffer, or from one, in the L1 cache.

#include "cpu/loops/philox.h"

namespace fastgpt::FASTGPT_ISA {

constexpr int64_t kPart = kChunk / 4;

template <typename T>
inline const float* widen(const void* from, int64_t at, int64_t n, float* buffer) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int64_t some = left(n, c);
    store(buffer + c, load(static_cast<const T*>(from) + at + c, some), some);
  }
  return buffer;
}

// n elements from `at` on, as floats: in place, or converted to the buffer.
inline const float* floats(const void* from, Type type, int64_t at, int64_t n, float* buffer) {
  if (type == Type::kBFloat16) return widen<BFloat16>(from, at, n, buffer);
  if (type == Type::kHalf) return widen<Half>(from, at, n, buffer);
  return static_cast<const float*>(from) + at;
}

template <typename T>
inline void narrow(const float* from, void* to, int64_t at, int64_t n) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int64_t some = left(n, c);
    store(static_cast<T*>(to) + at + c, load(from + c, some), some);
  }
}

inline void put(const float* from, void* to, Type type, int64_t at, int64_t n) {
  if (type == Type::kFloat && from != static_cast<float*>(to) + at) narrow<float>(from, to, at, n);
  if (type == Type::kBFloat16) narrow<BFloat16>(from, to, at, n);
  if (type == Type::kHalf) narrow<Half>(from, to, at, n);
}

// The random words of a chunk, numbered among all chunks: word k of counter (j, chunk) is for element
// k kPart + j.
inline void chunk_words(int64_t seed, int64_t chunk, uint32_t* words) {
  for (int64_t j = 0; j < kPart; j += kWidth) {
    Bits random[4] = {(Bits)lane_numbers() + static_cast<uint32_t>(j), Bits{} + static_cast<uint32_t>(chunk),
                      Bits{}, Bits{}};
    philox(random, static_cast<uint64_t>(seed), 10);
    for (int64_t k = 0; k < 4; ++k) __builtin_memcpy(words + k * kPart + j, &random[k], sizeof(Bits));
  }
}

// To the lower or the upper neighbour in bfloat16, with the probabilities that make the mean exact: the bits
// plus 16 random ones, cut. A NaN might wrap around.
inline void round_randomly(const float* from, const uint32_t* words, BFloat16* to, int64_t n) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int64_t some = left(n, c);
    const Vec p = load(from + c, some);
    Bits word;
    __builtin_memcpy(&word, words + c, sizeof(word));
    const Bits bits = p == p ? as_bits(p) + (word & 0xffffu) : as_bits(p) | 0x400000u;
    const HalfBits cut = __builtin_convertvector(bits >> 16, HalfBits);
    __builtin_memcpy(to + c, &cut, some * sizeof(BFloat16));
  }
}

inline void update(const AdamwTensor& a, const float* from, const float* grad, float* exp_avg,
                   float* exp_avg_sq, float* to, int64_t n) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int64_t some = left(n, c);
    const Vec g = load(grad + c, some) * a.scale;
    Vec m = load(exp_avg + c, some), v = load(exp_avg_sq + c, some);
    m += (g - m) * a.weight1;
    v = v * a.beta2 + g * g * a.weight2;
    store(exp_avg + c, m, some);
    store(exp_avg_sq + c, v, some);
    const Vec denominator = sqrt(v) * a.inverse_root + a.eps;
    store(to + c, load(from + c, some) * a.decay - a.step_size * (m / denominator), some);
  }
}

// Chunk `chunk` of a tensor, which is number `number` among the chunks of all tensors. Parameters are rounded
// at random if there is a seed.
void adamw_chunk(const AdamwTensor& a, int64_t chunk, int64_t number, const int64_t* seed) {
  float params[kPart], grads[kPart];
  uint32_t words[kChunk];
  if (seed != nullptr) chunk_words(*seed, number, words);
  const int64_t begin = chunk * kChunk;
  for (int64_t k = 0; k < 4 && begin + k * kPart < a.numel; ++k) {
    const int64_t at = begin + k * kPart, n = a.numel - at < kPart ? a.numel - at : kPart;
    const float* g = floats(a.grad, a.grad_type, at, n, grads);
    const float* p = floats(a.param, a.param_type, at, n, params);
    float* out = a.param_type == Type::kFloat ? static_cast<float*>(a.param) + at : params;
    update(a, p, g, a.exp_avg + at, a.exp_avg_sq + at, out, n);
    if (seed != nullptr)
      round_randomly(out, words + k * kPart, static_cast<BFloat16*>(a.param) + at, n);
    else
      put(out, a.param, a.param_type, at, n);
    put(out, a.copy, a.copy_type, at, n);
  }
}

// The sum of the squares of chunk `chunk`.
float square_sum(const NormTensor& a, int64_t chunk) {
  float buffer[kPart];
  Vec sums[4] = {};
  const int64_t begin = chunk * kChunk;
  for (int64_t k = 0; k < 4 && begin + k * kPart < a.numel; ++k) {
    const int64_t at = begin + k * kPart, n = a.numel - at < kPart ? a.numel - at : kPart;
    const float* g = floats(a.grad, a.type, at, n, buffer);
    for (int64_t c = 0; c < n; c += kWidth) {
      const Vec x = load(g + c, left(n, c));
      sums[c / kWidth % 4] = fma(x, x, sums[c / kWidth % 4]);
    }
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace fastgpt::FASTGPT_ISA
