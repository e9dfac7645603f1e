// The element types that launchers take. Plain C++: seen by the bindings, the launchers and the tests.
#pragma once

namespace fastgpt::cuda {

enum class DType { kFloat, kHalf, kBFloat16 };

}  // namespace fastgpt::cuda
