// Starting a kernel, on the GPU or in the emulator.
//
//     Launch launch("layer_norm_forward", {rows, width}, stream);
//     launch.grid(blocks).block(threads).shared(bytes);
//     launch(kernel<T>, argument, ...);
//
// Shared memory is dynamic shared memory, and may be left out. Nothing is launched when a dimension of the
// grid is 0. A launch that CUDA refuses throws std::runtime_error with the kernel and the shape.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/dtype.h"
#include "cuda/types.cuh"

namespace fastgpt::cuda {

class Launch {
 public:
  Launch(const char* name, std::vector<int64_t> shape, cudaStream_t stream)
      : name_(name), shape_(std::move(shape)), stream_(stream) {}

  Launch& grid(int64_t x, int64_t y = 1, int64_t z = 1) {
    empty_ = x == 0 || y == 0 || z == 0;
    if (x < 0 || y < 0 || z < 0 || x > 0x7fffffff || y > 0xffff || z > 0xffff) {
      fail("a grid of " + std::to_string(x) + " x " + std::to_string(y) + " x " + std::to_string(z) +
           " blocks, where 2147483647 x 65535 x 65535 is the largest");
    }
    grid_ = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    return *this;
  }

  Launch& block(int x, int y = 1, int z = 1) {
    block_ = dim3(x, y, z);
    return *this;
  }

  Launch& shared(int64_t bytes) {
    shared_ = bytes;
    return *this;
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments&&... arguments) {
    if (empty_) return;
#ifdef FASTGPT_EMULATED
    emulator::record(reinterpret_cast<void*>(kernel), block_, shared_);
    emulator::launch(name_, grid_, block_, shared_, [=]() { kernel(static_cast<Parameters>(arguments)...); });
#else
    constexpr int64_t kWithoutAsking = 48 << 10;
    if (shared_ > kWithoutAsking) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_)));
    }
    // clang-format off
    kernel<<<grid_, block_, static_cast<size_t>(shared_), stream_>>>(static_cast<Parameters>(arguments)...);
    // clang-format on
    check(cudaGetLastError());
#endif
  }

 private:
  void check(cudaError_t error) const {
    if (error != cudaSuccess) fail(cudaGetErrorString(error));
  }

  [[noreturn]] void fail(const std::string& reason) const {
    std::string shape;
    for (const int64_t size : shape_) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    throw std::runtime_error(std::string(name_) + " of shape (" + shape + "): " + reason);
  }

  const char* name_;
  std::vector<int64_t> shape_;
  cudaStream_t stream_;
  dim3 grid_{1, 1, 1}, block_{1, 1, 1};
  int64_t shared_ = 0;
  bool empty_ = false;
};

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<T>()) with the element type that dtype names.
template <typename Function>
void dispatch(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat:
      return function(Type<float>());
    case DType::kHalf:
      return function(Type<half>());
    case DType::kBFloat16:
      return function(Type<bf16>());
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastgpt::cuda
