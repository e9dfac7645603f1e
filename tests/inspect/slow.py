"""Planted: all that a Triton kernel can get wrong at once. tests/inspect/test_planted.py has it diagnosed."""

import triton
import triton.language as tl


@triton.jit
def slow_matmul(a_ptr, b_ptr, c_ptr, K, stride, BLOCK: tl.constexpr):
    """c = a b for (BLOCK, K) and (K, BLOCK), whose elements are `stride` apart: no access is coalesced.

    The products are in full fp32 precision, which tensor cores do not have, and one warp holds whole tiles in
    registers: more than there are.
    """
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    c = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + (rows * K + k + cols) * stride)
        b = tl.load(b_ptr + ((k + rows) * BLOCK + cols) * stride)
        c = tl.dot(a, b, c, input_precision="ieee")
    tl.store(c_ptr + rows * BLOCK + cols, c)


@triton.jit
def copy(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """Nothing is wrong with this one."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < N), at < N)
