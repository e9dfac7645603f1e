// Philox 4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a counter in each
// lane. Included by loops, for each instruction set, after cpu/vec.h.

namespace fastgpt::FASTGPT_ISA {

typedef uint64_t Wide __attribute__((vector_size(FASTGPT_VECTOR_BYTES)));

// The products of the low halves.
inline Wide multiply_low(Wide a, Wide b) {
#if FASTGPT_VECTOR_BYTES == 64
  return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // GCC 12 warns of the plain one
#elif FASTGPT_VECTOR_BYTES == 32
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(FASTGPT_X86)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The upper halves of the products with m. Lanes are little-endian, as everywhere that PyTorch runs.
inline Bits multiply_high(Bits x, uint32_t m) {
  const Wide even = multiply_low((Wide)x, Wide{} + m), odd = multiply_low((Wide)x >> 32, Wide{} + m);
  return (Bits)((even >> 32) | (odd & 0xffffffff00000000u));
}

// Four words for each counter, in its place.
inline void philox(Bits (&counter)[4], uint64_t seed, int rounds) {
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < rounds; ++round) {
    const Bits high_0 = multiply_high(counter[0], 0xd2511f53u),
               high_2 = multiply_high(counter[2], 0xcd9e8d57u);
    const Bits low_0 = counter[0] * 0xd2511f53u, low_2 = counter[2] * 0xcd9e8d57u;
    counter[0] = high_2 ^ counter[1] ^ key_0;
    counter[1] = low_2;
    counter[2] = high_0 ^ counter[3] ^ key_1;
    counter[3] = low_0;
    key_0 += 0x9e3779b9u;
    key_1 += 0xbb67ae85u;
  }
}

// Words -> [0, 1), as triton.language.rand, so that a seed means the same in every kernel.
inline Vec to_uniform(Bits word) {
  const IntVec x = (IntVec)word;
  return __builtin_convertvector(x < 0 ? ~x : x, Vec) * 4.6566127342e-10f;
}

}  // namespace fastgpt::FASTGPT_ISA
