#include "cpu/isa.h"

#include <cstdlib>
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
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

Isa chosen() {
  const char* wanted = std::getenv("FASTGPT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  const std::string name = wanted;
  const Isa isa =
      name == "baseline" ? Isa::kBaseline
      : name == "avx2"   ? Isa::kAvx2
      : name == "avx512"
          ? Isa::kAvx512
          : throw std::runtime_error("FASTGPT_CPU_ISA=" + name + ": it must be baseline, avx2 or avx512");
  if (isa > best()) throw std::runtime_error("FASTGPT_CPU_ISA=" + name + ": this machine does not have it");
  return isa;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

}  // namespace fastgpt
