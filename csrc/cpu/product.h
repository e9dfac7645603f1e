// Matrix products of CPU tensors, each by the library that computes it fastest here.
#pragma once

#include <optional>

#include "cpu/common.h"

namespace fastgpt {

// out = a b, or out += a b: a (M, K), b (K, N), out (M, N), of one dtype.
void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b, bool add = false);

// a b, with the row `bias` added to every row.
Tensor multiply(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias = std::nullopt);

}  // namespace fastgpt
