// Includes cpu/vec.h and FASTGPT_LOOPS once for every instruction set; see cpu/isa.h. No include guard.
#include "cpu/isa.h"
#include "cpu/number.h"

// What vec.h needs, so that none of it is compiled for one instruction set alone.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef FASTGPT_X86
#include <immintrin.h>
#endif

#define FASTGPT_ISA baseline
#define FASTGPT_VECTOR_BYTES 16
#include "cpu/vec.h"
#include FASTGPT_LOOPS
#undef FASTGPT_ISA
#undef FASTGPT_VECTOR_BYTES

#ifdef FASTGPT_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#define FASTGPT_ISA avx2
#define FASTGPT_VECTOR_BYTES 32
#include "cpu/vec.h"
#include FASTGPT_LOOPS
#undef FASTGPT_ISA
#undef FASTGPT_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(                                                             \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif
#define FASTGPT_ISA avx512
#define FASTGPT_VECTOR_BYTES 64
#include "cpu/vec.h"
#include FASTGPT_LOOPS
#undef FASTGPT_ISA
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target( \
    "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif
#define FASTGPT_ISA avx512_bf16
#define FASTGPT_BF16 1
#include "cpu/vec.h"
#include FASTGPT_LOOPS
#undef FASTGPT_ISA
#undef FASTGPT_BF16
#undef FASTGPT_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // FASTGPT_X86

#undef FASTGPT_LOOPS
