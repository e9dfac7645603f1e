// GELU of whole matrices, for the operations that contain it.
#pragma once

#include <string_view>
#include <tuple>

#include "cpu/common.h"

namespace fastgpt {

// y = gelu(x + bias); x + bias goes to h, if that is defined. All are contiguous (..., width) and of one
// dtype, but for the bias, which is fp32. y or h may be x.
void bias_gelu_into(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& h, const Tensor& y,
                    std::string_view approximate);

// (dx, db) of y = gelu(x + bias), of these dtypes.
std::tuple<Tensor, Tensor> bias_gelu_gradients(const Tensor& dy, const Tensor& x,
                                               const std::optional<Tensor>& bias,
                                               std::string_view approximate, at::ScalarType dx_dtype,
                                               at::ScalarType db_dtype);

Tensor gelu_gradient(const Tensor& dy, const Tensor& x, std::string_view approximate);

}  // namespace fastgpt
