// What keeps dropout_add's mask the same on the CPU and on a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace fastgpt {

// p 2^32, to the nearest: p is then met to 2^-33. An element is dropped whose random word is below.
inline uint32_t dropout_threshold_of(double p) {
  return static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
}

}  // namespace fastgpt
