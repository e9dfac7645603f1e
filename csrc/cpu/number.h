// The element types that loops read and write. They compute in float.
#pragma once

#include <cstdint>

namespace fastgpt {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

}  // namespace fastgpt
