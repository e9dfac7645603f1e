// Matrix products of CPU tensors, each by the library that computes it fastest here.
#pragma once

#include <optional>
#include <tuple>

#include "cpu/common.h"

namespace fastgpt {

// out = a b, or out += a b: a (M, K), b (K, N), out (M, N), of one dtype.
void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b, bool add = false);

// x W^T + b, (..., N), for x (..., K), W (N, K) and b (N,).
Tensor linear_product(const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& bias = std::nullopt);

// dx and dW of that for dy (rows, N); one that is not needed is empty.
std::tuple<Tensor, Tensor> product_gradients(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             bool need_dx, bool need_dw);

}  // namespace fastgpt
