// Choosing an attention kernel by element type and head size.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"

namespace fastgpt::cuda {

// Calls function(Type<T>(), integral_constant<width>()) with the least width compiled that holds D.
template <typename Function>
void with_tiles(DType dtype, int D, Function&& function) {
  const auto with_width = [&](auto type) {
    if (D <= 64) return function(type, std::integral_constant<int, 64>());
    if (D <= 128) return function(type, std::integral_constant<int, 128>());
    return function(type, std::integral_constant<int, 256>());
  };
  if (dtype == DType::kHalf) return with_width(Type<half>());
  return with_width(Type<bf16>());
}

// The same for fp32: function(integral_constant<columns>()), columns of 32.
template <typename Function>
void with_columns(int D, Function&& function) {
  if (D <= 64) return function(std::integral_constant<int, 2>());
  if (D <= 128) return function(std::integral_constant<int, 4>());
  return function(std::integral_constant<int, 8>());
}

}  // namespace fastgpt::cuda
