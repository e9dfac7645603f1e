"""The second stage of sums over rows: partial sums, one per program, added in a fixed order.

    out_c = sum_p partial_pc            partials (P, C) fp32 -> out (C,)

The first stage is in the kernel that has the values in registers: program p adds up its rows and writes
row p. No atomics, so the order of additions, and every bit of the result with it, is the same on each run.

Bytes: 4 P C read, mostly from L2, where the first stage has just written them.
Launch: a program per 32 columns, one 128-byte line of fp32, or 128 of wide rows. Two outputs, such as dw and
db, share the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import launch

BLOCK = 2048  # partial sums a program adds at a time, 16 a thread


@triton.jit
def _sum_partials(partials_ptr, first_ptr, second_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_in = cols < C
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (rows < P)[:, None] & col_in[None, :]
        at = rows[:, None] * C + cols[None, :]
        first += tl.load(partials_ptr + at, mask, other=0.0)
        if second_ptr is not None:
            second += tl.load(partials_ptr + tl.cast(P, tl.int64) * C + at, mask, other=0.0)
    tl.store(first_ptr + cols, tl.sum(first, 0), col_in)
    if second_ptr is not None:
        tl.store(second_ptr + cols, tl.sum(second, 0), col_in)


def sum_partials(partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Write partials[0].sum(0) to `first` and partials[1].sum(0) to `second`; partials (1 or 2, P, C)."""
    _, programs, width = partials.shape
    block = 32 if width <= 8192 else 128  # from there on 64 programs or more are busy with wider lines
    launch(
        _sum_partials,
        (triton.cdiv(width, block),),
        partials,
        first,
        second,
        programs,
        width,
        BLOCK_P=BLOCK // block,
        BLOCK_C=block,
        num_warps=4,
    )
