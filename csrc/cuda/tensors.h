// What the bindings (csrc/cuda/*_ops.cpp) need besides ATen: the library they register in, the stream, the
// device.
//
//     TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) { m.impl("gelu_forward", gelu_forward); }
//
// The emulator compiles the same bindings for CPU tensors, in a library of its own.
#pragma once

#include <ATen/ATen.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include "cuda/dtype.h"
#include "shared/plain.h"

#ifdef FASTGPT_EMULATED

#define FASTGPT_LIBRARY fastgpt_emulated
#define FASTGPT_KEY CPU

#else

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>

#define FASTGPT_LIBRARY fastgpt_native
#define FASTGPT_KEY CUDA

#endif

namespace fastgpt::cuda {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kHalf:
      return DType::kHalf;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK(false, "kernels take float32, float16 and bfloat16, not ", tensor.scalar_type());
  }
}

#ifdef FASTGPT_EMULATED

struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor&) {}
};
inline cudaStream_t current_stream() { return nullptr; }
// Few, so that small tensors already give each block more than one piece of work.
inline int sm_count() { return 2; }

#else

// In force while it lives: the tensor's device, whose current stream `current_stream` then is.
struct DeviceGuard {
  explicit DeviceGuard(const at::Tensor& tensor) : guard(tensor.device()) {}
  c10::cuda::CUDAGuard guard;
};
inline cudaStream_t current_stream() { return at::cuda::getCurrentCUDAStream(); }
inline int sm_count() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

#endif

}  // namespace fastgpt::cuda
