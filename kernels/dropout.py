"""Dropout with the residual addition after it.

    y  = z * x + residual,  z = 0 with probability p, else 1 / (1 - p)
    dx = z * dy                                  (the gradient of residual is dy itself)

z is not stored: it is a function of the seed and of the element's number, and backward computes it again.
Philox 4x32-10 (Salmon et al., SC 2011) with the seed as key gives four words for a counter. Element n is in
block b = n div 4 Q; there, element k Q + j takes word k of counter (j, b): so a thread that holds the same j
of the four quarters of a block uses all four words, and each quarter is read in whole lines. z = 0 where the
word is below p 2^32. The mask depends on nothing else, neither the chip nor the shape.

Bytes, e an element's: forward 3 N e (x, residual, y), backward 2 N e (dy, dx).

Launch: a block of 4 Q elements per program.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.examples import Example, meta
from fastgpt.kernels.launch import launch

# Q = 4 warps x 8 elements, a 16-byte load of bf16 a thread. It is part of what a mask is, so the same on all
# chips. Of a block 4 KB are in flight at a time, and the 8 programs that fit an SM have 32 KB.
Q, WARPS = 1024, 4


@triton.jit
def _keep(word, threshold):
    """Whether an element stays, from its random word; threshold is p 2^32 as a uint32."""
    return word.to(tl.uint32, bitcast=True) >= threshold


@triton.jit
def _scales(seed_ptr, threshold, scale, Q: tl.constexpr):
    """z of the four quarters of this program's block."""
    j = tl.arange(0, Q)
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), j, j * 0 + tl.program_id(0), j * 0, j * 0)
    return (
        tl.where(_keep(r0, threshold), scale, 0.0),
        tl.where(_keep(r1, threshold), scale, 0.0),
        tl.where(_keep(r2, threshold), scale, 0.0),
        tl.where(_keep(r3, threshold), scale, 0.0),
    )


@triton.jit(do_not_specialize=["threshold"])
def _dropout_add_forward(x_ptr, residual_ptr, y_ptr, seed_ptr, threshold, scale, N, Q: tl.constexpr):
    z = _scales(seed_ptr, threshold.to(tl.uint32), scale, Q)
    first = tl.program_id(0).to(tl.int64) * (4 * Q)
    for k in tl.static_range(4):
        at = first + k * Q + tl.arange(0, Q)
        x = tl.load(x_ptr + at, at < N, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + at, at < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, z[k] * x + residual, at < N)


@triton.jit(do_not_specialize=["threshold"])
def _dropout_add_backward(dy_ptr, dx_ptr, seed_ptr, threshold, scale, N, Q: tl.constexpr):
    z = _scales(seed_ptr, threshold.to(tl.uint32), scale, Q)
    first = tl.program_id(0).to(tl.int64) * (4 * Q)
    for k in tl.static_range(4):
        at = first + k * Q + tl.arange(0, Q)
        dy = tl.load(dy_ptr + at, at < N, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, z[k] * dy, at < N)


def _threshold(p: float) -> int:
    """p 2^32, to the nearest: p is then met to 2^-33."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout_add_forward(x: Tensor, residual: Tensor, seed: Tensor, p: float) -> Tensor:
    x, residual = x.contiguous(), residual.contiguous()
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    launch(
        _dropout_add_forward,
        (triton.cdiv(x.numel(), 4 * Q),),
        *(x, residual, y, seed, _threshold(p), 1 / (1 - p), x.numel()),
        Q=Q,
        num_warps=WARPS,
    )
    return y


def dropout_add_backward(dy: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    dy = dy.contiguous()
    dx = torch.empty(dy.shape, dtype=dtype, device=dy.device)
    launch(
        _dropout_add_backward,
        (triton.cdiv(dy.numel(), 4 * Q),),
        *(dy, dx, seed, _threshold(p), 1 / (1 - p), dy.numel()),
        Q=Q,
        num_warps=WARPS,
    )
    return dx


def examples() -> Iterator[Example]:
    """GPT-2's residual stream, and fp32."""
    seed = meta(1, dtype=torch.int64)
    requires = ("vector_load", "vector_store", "wide_offsets")
    for dtype in (torch.bfloat16, torch.float32):
        x = meta(8192, 768, dtype=dtype)
        forward = partial(dropout_add_forward, x, x, seed, 0.1)
        backward = partial(dropout_add_backward, x, seed, 0.1, dtype)
        first = dtype == torch.bfloat16
        name = str(dtype).removeprefix("torch.")
        yield Example(f"dropout-add-forward-{name}", forward, {"_dropout_add_forward": requires}, first)
        yield Example(f"dropout-add-backward-{name}", backward, {"_dropout_add_backward": requires}, first)
