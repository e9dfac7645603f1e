// Launchers of causal attention. Shapes and equations: fastgpt/ops/attention.py; kernels: attention_*.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dtype.h"

namespace fastgpt::cuda {

// A (B, T, H, D) tensor. Strides are in elements; that of D is 1.
struct Heads {
  void* data;
  int64_t batch, token, head;
};

struct Attention {
  int B, H, Tq, Tk, D;
  int window;           // keys that a query sees, itself included: at most Tk
  float scale;          // of the scores, above 0
  const int64_t* seed;  // on the device; null without dropout
  uint32_t threshold;   // see `dropout_threshold`
  float keep;           // 1 - dropout_p
};

// A weight is dropped when its random number, of 31 bits, is below this. Compared as integers, those are
// dropped whose uniform number in fp32, made of the same bits as by triton.language.rand, is below p.
uint32_t dropout_threshold(float p);

// Few queries against many keys, as in decoding: the keys are shared among blocks, and what those leave is
// added up.
struct Shares {
  int count;      // 1: not shared
  int begin;      // the first key that is seen, or a little before
  int size;       // keys of a share
  float* parts;   // (count, B, H, Tq, D): o, not yet divided
  float* maxima;  // (count, B, H, Tq)
  float* totals;  // (count, B, H, Tq)
};

// For a chip of so many multiprocessors. The buffers are the caller's to make, unless count is 1.
Shares attention_shares(const Attention& a, DType dtype, int multiprocessors);

// Heads of D elements that these kernels take: a multiple of 8 up to 256, where each row of q, k and v begins
// at a multiple of 16 bytes; fp32 at any D up to 256 and anywhere.
//
// q (B, Tq, H, D), k and v (B, Tk, H, D), o (B, Tq, H, D) contiguous, lse (B, H, Tq).
void attention_forward(const Attention& a, const Shares& shares, DType dtype, Heads q, Heads k, Heads v,
                       void* o, float* lse, cudaStream_t stream);

// `d_out` and o are contiguous, dk and dv have the same strides; delta (B, H, Tq) is scratch memory.
void attention_backward(const Attention& a, DType dtype, const void* d_out, Heads q, Heads k, Heads v,
                        const void* o, const float* lse, float* delta, Heads dq, Heads dk, Heads dv,
                        cudaStream_t stream);

}  // namespace fastgpt::cuda
