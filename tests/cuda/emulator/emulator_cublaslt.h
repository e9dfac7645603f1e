// The part of cuBLASLt that csrc/cuda/cublaslt.cpp calls, computed on the CPU:
// names, arguments and rules are those of NVIDIA's cublasLt.h
// (tests/cuda/test_cublaslt.py compares the constants where that is installed).
// Each product is written down for the tests, with what was asked of the
// heuristic, and what cuBLASLt would refuse is an error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

enum cublasStatus_t {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum cublasLtEpilogue_t {
  CUBLASLT_EPILOGUE_GELU = 32,
  CUBLASLT_EPILOGUE_GELU_BIAS = 36,
  CUBLASLT_EPILOGUE_GELU_AUX = 160,
  CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164
};
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12
};
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};

using cublasLtHandle_t = struct cublasLtContext*;
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType type;
  uint64_t rows, columns;
  int64_t ld;
};
struct cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute;
  cudaDataType scale;
  int32_t transposed;
  uint32_t epilogue;
  const void* bias;
  void* aux;
  int64_t aux_ld;
};
struct cublasLtMatmulPreferenceOpaque_t {
  uint64_t workspace;
  uint32_t reduction, alignment[4];  // of A, B, C, D
};
struct cublasLtMatmulAlgo_t {
  uint64_t kind;  // of product that the heuristic was asked about
  uint64_t workspace;
  uint32_t alignment[4];
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  cublasStatus_t state;
};

namespace emulator_cublaslt {

inline std::string record;    // a line for each call
inline bool refuses = false;  // whether the heuristic finds nothing

inline uint32_t alignment(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<uint32_t>(address & -address);
}

// One number for all that an algorithm may depend on but the matrices'
// addresses.
inline uint64_t kind(const cublasLtMatmulDescOpaque_t& op, const cublasLtMatrixLayoutOpaque_t& a,
                     const cublasLtMatrixLayoutOpaque_t& b, const cublasLtMatrixLayoutOpaque_t& d) {
  uint64_t hash = 14695981039346656037u;
  const auto add = [&](uint64_t value) { hash = (hash ^ value) * 1099511628211u; };
  for (const auto* layout : {&a, &b, &d}) {
    add(layout->type), add(layout->rows), add(layout->columns), add(static_cast<uint64_t>(layout->ld));
  }
  add(op.compute), add(static_cast<uint64_t>(op.transposed)), add(op.epilogue);
  add(alignment(op.bias)), add(alignment(op.aux));
  return hash;
}

inline float get(const void* data, cudaDataType type, int64_t at) {
  if (type == CUDA_R_32F) return static_cast<const float*>(data)[at];
  if (type == CUDA_R_16F) return __half2float(static_cast<const __half*>(data)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
}

inline void put(void* data, cudaDataType type, int64_t at, float value) {
  if (type == CUDA_R_32F) static_cast<float*>(data)[at] = value;
  if (type == CUDA_R_16F) static_cast<__half*>(data)[at] = __float2half_rn(value);
  if (type == CUDA_R_16BF) static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value);
}

inline float gelu(float h) {
  return 0.5f * h * (1.0f + std::tanh(0.7978845608028654f * (h + 0.044715f * h * h * h)));
}

// Copies an attribute, whose size must be right.
template <typename T>
cublasStatus_t set(T& field, const void* value, size_t bytes) {
  if (bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&field, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace emulator_cublaslt

// For the tests. The text lives until the next call.
extern "C" inline __attribute__((used)) const char* emulator_cublaslt_take() {
  static std::string taken;
  taken.swap(emulator_cublaslt::record);
  emulator_cublaslt::record.clear();
  return taken.c_str();
}
extern "C" inline __attribute__((used)) void emulator_cublaslt_refuse(int refuses) {
  emulator_cublaslt::refuses = refuses != 0;
}

inline const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
                                               : "CUBLAS_STATUS_NOT_SUPPORTED";
}

inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDescOpaque_t* op, cublasComputeType_t compute,
                                             cudaDataType scale) {
  *op = {compute, scale, CUBLAS_OP_N, 1, nullptr, nullptr, 0};
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDescOpaque_t* op,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, size_t bytes) {
  using emulator_cublaslt::set;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set(op->transposed, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return set(op->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return set(op->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      return set(op->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      return set(op->aux_ld, value, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayoutOpaque_t* layout, cudaDataType type,
                                               uint64_t rows, uint64_t columns, int64_t ld) {
  *layout = {type, rows, columns, ld};
  return ld >= static_cast<int64_t>(rows) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreferenceOpaque_t* preference) {
  *preference = {0, 7, {256, 256, 256, 256}};
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreferenceOpaque_t* preference,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void* value, size_t bytes) {
  using emulator_cublaslt::set;
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return set(preference->workspace, value, bytes);
  if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
    return set(preference->reduction, value, bytes);
  return set(preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, const cublasLtMatmulDescOpaque_t* op,
                                                     const cublasLtMatrixLayoutOpaque_t* a,
                                                     const cublasLtMatrixLayoutOpaque_t* b,
                                                     const cublasLtMatrixLayoutOpaque_t*,
                                                     const cublasLtMatrixLayoutOpaque_t* d,
                                                     const cublasLtMatmulPreferenceOpaque_t* preference, int,
                                                     cublasLtMatmulHeuristicResult_t* result, int* found) {
  emulator_cublaslt::record += "heuristic reduction=" + std::to_string(preference->reduction) + "\n";
  *found = emulator_cublaslt::refuses ? 0 : 1;
  if (emulator_cublaslt::refuses) return CUBLAS_STATUS_NOT_SUPPORTED;
  result->algo = {emulator_cublaslt::kind(*op, *a, *b, *d), preference->workspace, {}};
  std::memcpy(result->algo.alignment, preference->alignment, sizeof(preference->alignment));
  result->state = CUBLAS_STATUS_SUCCESS;
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, const cublasLtMatmulDescOpaque_t* op,
                                     const void* alpha, const void* A, const cublasLtMatrixLayoutOpaque_t* a,
                                     const void* B, const cublasLtMatrixLayoutOpaque_t* b, const void* beta,
                                     const void* C, const cublasLtMatrixLayoutOpaque_t*, void* D,
                                     const cublasLtMatrixLayoutOpaque_t* d, const cublasLtMatmulAlgo_t* algo,
                                     void* workspace, size_t workspace_bytes, cudaStream_t) {
  using namespace emulator_cublaslt;
  const bool has_bias = op->epilogue & 4, has_aux = op->epilogue & 128;
  const uint64_t m = d->rows, n = d->columns, k = b->rows;
  const bool fits =
      b->columns == n && (op->transposed ? a->rows == k && a->columns == m : a->rows == m && a->columns == k);
  const void* const pointers[] = {A, B, C, D};
  bool promised = algo->kind == kind(*op, *a, *b, *d) && algo->workspace <= workspace_bytes;
  for (int i = 0; i < 4; ++i) promised = promised && alignment(pointers[i]) >= algo->alignment[i];
  const bool aux_fits = op->aux != nullptr && op->aux_ld % 8 == 0 && op->aux_ld >= static_cast<int64_t>(m);
  if (!fits || !promised || has_bias != (op->bias != nullptr) || (has_aux ? !aux_fits : op->aux != nullptr) ||
      op->scale != CUDA_R_32F || (workspace_bytes > 0 && workspace == nullptr) ||
      *static_cast<const float*>(alpha) != 1.0f || *static_cast<const float*>(beta) != 0.0f) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  char line[256];
  std::snprintf(line, sizeof(line),
                "matmul m=%d n=%d k=%d transa=%d lda=%d ldb=%d ldd=%d type=%d "
                "compute=%d epilogue=%d\n",
                int(m), int(n), int(k), int(op->transposed), int(a->ld), int(b->ld), int(d->ld), int(d->type),
                int(op->compute), int(op->epilogue));
  record += line;
  for (uint64_t j = 0; j < n; ++j) {
    for (uint64_t i = 0; i < m; ++i) {
      double sum = 0.0;  // cuBLASLt adds in fp32, in an order of its own
      for (uint64_t l = 0; l < k; ++l) {
        const int64_t at = static_cast<int64_t>(op->transposed ? l + i * a->ld : i + l * a->ld);
        sum += double{get(A, a->type, at)} * get(B, b->type, static_cast<int64_t>(l + j * b->ld));
      }
      float h = static_cast<float>(sum);
      if (has_bias) h += get(op->bias, d->type, static_cast<int64_t>(i));
      if (has_aux) put(op->aux, d->type, static_cast<int64_t>(i + j * op->aux_ld), h);
      put(D, d->type, static_cast<int64_t>(i + j * d->ld), gelu(h));
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}
