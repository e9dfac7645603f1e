// cuBLASLt is column-major: what is (rows, columns) here is (columns, rows) there. So the product is
//
//     y^T (n, m) = w (n, k) x^T (k, m)        A = w, transposed unless `w_transposed`, B = x^T, D = y^T
//
// and the bias runs along D's rows, as the epilogue wants it. The auxiliary matrix, h, is stored as D is. By
// cublasLt.h its leading dimension must be a multiple of 8, its elements are of D's type, and the pointers of
// bias and auxiliary matrix tell the heuristic how they are aligned.
#include "cuda/cublaslt.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#ifdef FASTGPT_EMULATED
#include "emulator_cublaslt.h"
#else
#include <cublasLt.h>
#endif

namespace fastgpt::cuda {
namespace {

void check(cublasStatus_t status, const GeluProduct& p) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error("linear_gelu of shape (" + std::to_string(p.m) + ", " + std::to_string(p.n) +
                           ", " + std::to_string(p.k) + "): cuBLASLt: " + cublasLtGetStatusString(status));
}

cudaDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::kHalf:
      return CUDA_R_16F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

cublasLtEpilogue_t epilogue_of(const GeluProduct& p) {
  if (p.h == nullptr) return p.bias == nullptr ? CUBLASLT_EPILOGUE_GELU : CUBLASLT_EPILOGUE_GELU_BIAS;
  return p.bias == nullptr ? CUBLASLT_EPILOGUE_GELU_AUX : CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}

// The power of two up to 256 that an address is a multiple of; 256 for null.
uint32_t alignment(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<uint32_t>(address & -address);
}

// A product in cuBLASLt's terms. Descriptors lie on the stack: there is nothing to destroy.
struct Description {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a, b, d;

  explicit Description(const GeluProduct& p) {
    const auto compute =
        p.dtype == DType::kFloat && p.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    const cudaDataType_t type = type_of(p.dtype);
    check(cublasLtMatmulDescInit(&operation, compute, CUDA_R_32F), p);
    set(p, CUBLASLT_MATMUL_DESC_TRANSA, p.w_transposed ? CUBLAS_OP_N : CUBLAS_OP_T);
    set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p));
    if (p.bias != nullptr) set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    if (p.h != nullptr) {
      set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.h);
      set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.n);
    }
    const int64_t rows = p.w_transposed ? p.n : p.k, columns = p.w_transposed ? p.k : p.n;
    check(cublasLtMatrixLayoutInit(&a, type, rows, columns, p.w_stride), p);
    check(cublasLtMatrixLayoutInit(&b, type, p.k, p.m, p.k), p);
    check(cublasLtMatrixLayoutInit(&d, type, p.n, p.m, p.n), p);
  }

 private:
  template <typename T>
  void set(const GeluProduct& p, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof(value)), p);
  }
};

using Algorithm = std::optional<cublasLtMatmulAlgo_t>;

// The heuristic's best algorithm, if there is one.
Algorithm find_algorithm(cublasLtHandle_t handle, Description& description, const GeluProduct& p,
                         int64_t workspace_bytes) {
  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference), p);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)), p);
  };
  // Only algorithms that keep partial sums in fp32, if they have any.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.w));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.x));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p.y));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(p.y));
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle, &description.operation, &description.a, &description.b,
                                     &description.d, &description.d, &preference, 1, &result, &found);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, p);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0 || result.state != CUBLAS_STATUS_SUCCESS)
    return std::nullopt;
  return result.algo;
}

// All that the heuristic's answer depends on.
using Kind = std::array<int64_t, 15>;

Kind kind_of(int device, const GeluProduct& p, int64_t workspace_bytes) {
  return {device,
          p.m,
          p.n,
          p.k,
          p.w_stride,
          p.w_transposed,
          p.tf32,
          static_cast<int64_t>(p.dtype),
          static_cast<int64_t>(epilogue_of(p)),
          alignment(p.x),
          alignment(p.w),
          alignment(p.bias),
          alignment(p.y),
          alignment(p.h),
          workspace_bytes};
}

Algorithm algorithm_of(cublasLtHandle_t handle, int device, Description& description, const GeluProduct& p,
                       int64_t workspace_bytes) {
  constexpr size_t kRemembered = 4096;  // lengths of prompts make new ones without end
  static std::mutex mutex;
  static std::map<Kind, Algorithm> algorithms;
  const Kind kind = kind_of(device, p, workspace_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = algorithms.find(kind);
  if (known != algorithms.end()) return known->second;
  if (algorithms.size() >= kRemembered) algorithms.clear();
  return algorithms[kind] = find_algorithm(handle, description, p, workspace_bytes);
}

}  // namespace

bool gelu_product(void* handle, int device, const GeluProduct& p, const Workspace& workspace,
                  cudaStream_t stream) {
  if (p.h != nullptr && p.n % 8 != 0) return false;
  const auto lt = static_cast<cublasLtHandle_t>(handle);
  Description description(p);
  const Algorithm algorithm = algorithm_of(lt, device, description, p, workspace.bytes);
  if (!algorithm.has_value()) return false;
  const float alpha = 1.0f, beta = 0.0f;
  check(cublasLtMatmul(lt, &description.operation, &alpha, p.w, &description.a, p.x, &description.b, &beta,
                       p.y, &description.d, p.y, &description.d, &*algorithm, workspace.data,
                       static_cast<size_t>(workspace.bytes), stream),
        p);
  return true;
}

}  // namespace fastgpt::cuda
