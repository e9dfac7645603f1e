"""Planted: all that a Triton kernel can get wrong at once. tests/inspect/test_diagnosis.py finds it out."""

import triton
import triton.language as tl


@triton.jit
def slow_matmul(a_ptr, b_ptr, c_ptr, best_ptr, K, stride, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """c = a b for (BLOCK, K) and (K, BLOCK), whose elements are `stride` apart: no access is coalesced.

    The products are in full fp32 precision, which tensor cores do not have, and one warp keeps the sums and
    the best of them in registers: more than there are.
    """
    rows, cols, steps = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, STEP)
    c = tl.zeros([BLOCK, BLOCK], tl.float32)
    best = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, STEP):
        a = tl.load(a_ptr + (rows[:, None] * K + k + steps[None, :]) * stride)
        b = tl.load(b_ptr + ((k + steps[:, None]) * BLOCK + cols[None, :]) * stride)
        c = tl.dot(a, b, c, input_precision="ieee")
        best = tl.maximum(best, c)
    tl.store(c_ptr + rows[:, None] * BLOCK + cols[None, :], c)
    tl.store(best_ptr + rows[:, None] * BLOCK + cols[None, :], best)


@triton.jit
def copy(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """Nothing is wrong with this one."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < N), at < N)
