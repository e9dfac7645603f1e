#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace fastgpt {
namespace {

Isa best() {
#ifdef FASTGPT_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx2) return Isa::kBaseline;
  if (!avx512) return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

Isa chosen() {
  const char* wanted = std::getenv("FASTGPT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  const std::string name = wanted;
  const auto* const found = std::find(std::begin(kIsaNames), std::end(kIsaNames), name);
  if (found == std::end(kIsaNames))
    throw std::runtime_error("FASTGPT_CPU_ISA=" + name +
                             ": it must be baseline, avx2, avx512 or avx512_bf16");
  const auto isa = static_cast<Isa>(found - std::begin(kIsaNames));
  if (isa > best()) throw std::runtime_error("FASTGPT_CPU_ISA=" + name + ": this machine does not have it");
  return isa;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

}  // namespace fastgpt
