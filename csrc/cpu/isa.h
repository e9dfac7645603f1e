// One binary, several instruction sets: the hot loops are compiled for each, and one is chosen at run time.
//
// A file of loops holds plain C++ over raw pointers, in namespace fastgpt::FASTGPT_ISA, and is compiled once
// for each instruction set by
//
//   #define FASTGPT_LOOPS "cpu/loops/gelu.h"
//   #include "cpu/each_isa.h"
//
// after every other include: a function of a header that were compiled for AVX-512 here might be the copy
// that the linker keeps for everyone. FASTGPT_CHOOSE(f) is then the f of this machine. Loops must not hold
// lambdas, which compilers do not compile for the instruction set of the function around them.
#pragma once

namespace fastgpt {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The best instruction set of this machine, or the lesser one that the environment's FASTGPT_CPU_ISA
// (baseline, avx2, avx512, avx512_bf16) asks for: looked up once.
Isa isa();

}  // namespace fastgpt

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FASTGPT_BASELINE_ONLY)
#define FASTGPT_X86 1
#define FASTGPT_CHOOSE(...)                                                         \
  (fastgpt::isa() == fastgpt::Isa::kAvx512Bf16 ? &fastgpt::avx512_bf16::__VA_ARGS__ \
   : fastgpt::isa() == fastgpt::Isa::kAvx512   ? &fastgpt::avx512::__VA_ARGS__      \
   : fastgpt::isa() == fastgpt::Isa::kAvx2     ? &fastgpt::avx2::__VA_ARGS__        \
                                               : &fastgpt::baseline::__VA_ARGS__)
#else
#define FASTGPT_CHOOSE(...) (&fastgpt::baseline::__VA_ARGS__)
#endif
