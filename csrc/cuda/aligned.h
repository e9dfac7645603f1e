// Whether 16-byte accesses are possible.
#pragma once

#include <cstdint>

namespace fastgpt::cuda {

// All pointers are multiples of 16 bytes, or null.
template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace fastgpt::cuda
