"""GELU, and GELU with the bias addition before it.

    h    = x + b                                         or x, without a bias
    tanh form:  y = h * s,  s = 1 / (1 + exp(-2 u)),  u = k (h + a h^3),  k = sqrt(2 / pi),  a = 0.044715
    erf form:   y = h * s,  s = (1 + erf(h / sqrt 2)) / 2

    dx = dy * (s + h s'),  db = sum_rows dx
    tanh form:  s' = 2 k (1 + 3 a h^2) s (1 - s)
    erf form:   s' = exp(-h^2 / 2) / sqrt(2 pi)

(1 + tanh u) / 2 is the logistic function of 2 u: one exponential, which may overflow to infinity and then
gives s = 0, and no cancellation where tanh u is near -1.

Bytes, e an element's: forward 2 R C e (x, y), backward 3 R C e (x, dy, dx). Bias and partial sums are small.

Launch: without a bias a block of elements per program; with one a tile of rows x columns, any width. For db
a program keeps its columns and goes through rows with a stride, holding its sums in registers; `sum_partials`
adds up those of the programs that share columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.examples import MEMORY_BOUND, Example, meta
from fastgpt.kernels.launch import chip, launch, tile
from fastgpt.kernels.partials import sum_partials
from fastgpt.kernels.tune import tunable, tuned

COLUMNS = 1024  # of a tile at most: 3 tiles in GPT-2's 3072, rows of 2 KB in bf16


class Config(NamedTuple):
    elements: int  # of a tile
    per_thread: int
    programs_per_sm: int = 0


# Memory-bound: bytes in flight count (see layer_norm.py). One 16-byte load of bf16 a thread at full occupancy
# is 32 KB an SM, two on the B200; a tile of several rows loads its bias once.
FORWARD = {80: Config(2048, 8), 90: Config(2048, 8), 100: Config(4096, 16), 120: Config(2048, 8)}
# x, dy and the sums of db are 16 registers each: four programs of 8 warps with 64 registers fit an SM, 64 KB
# in flight. sm_100 takes 66; programs that do not fit would wait for the others to end.
FOUR, THREE = (Config(4096, 16, programs_per_sm=n) for n in (4, 3))
BACKWARD = {80: FOUR, 90: FOUR, 100: THREE, 120: FOUR}
# For tune.py: half and twice the elements of a program, with a load or two a thread; more and fewer programs.
FORWARD_CANDIDATES = [Config(1024, 8), Config(2048, 8), Config(2048, 16), Config(4096, 16)]
BACKWARD_CANDIDATES = [Config(4096, 16, 2), THREE, FOUR, Config(2048, 16, 8)]


@triton.jit
def gate(h, TANH: tl.constexpr):
    """s, by which gelu multiplies h (fp32)."""
    if TANH:
        s = 1.0 / (1.0 + tl.exp2(-_twice_u(h)))
    else:
        s = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    return s


@triton.jit
def _twice_u(h):
    """2 u / ln 2, for exp2: three instructions, of which a multiply-add."""
    K: tl.constexpr = 2 * 0.7978845608028654 * 1.4426950408889634  # 2 sqrt(2 / pi) / ln 2
    return h * tl.fma(h * h, K * 0.044715, K)


@triton.jit
def slope(h, TANH: tl.constexpr):
    """The derivative of gelu at h (fp32)."""
    if TANH:
        K: tl.constexpr = 2 * 0.7978845608028654  # 2 sqrt(2 / pi)
        u = _twice_u(h)
        e = tl.exp2(-tl.abs(u))
        r = 1.0 / (1.0 + e)
        s = tl.where(u >= 0.0, r, e * r)
        near = tl.minimum(tl.maximum(h, -20.0), 20.0)  # beyond, e is 0, which h^2 = inf would spoil
        d = tl.fma(near * tl.fma(near * near, K * (3 * 0.044715), K), e * r * r, s)  # s (1 - s) without 1 - s
    else:
        d = gate(h, TANH) + h * tl.exp2(h * h * -0.7213475204444817) * 0.3989422804014327
    return d


@triton.jit
def _gelu_forward(x_ptr, y_ptr, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x * gate(x, TANH), at < N)


@triton.jit
def _gelu_backward(dy_ptr, x_ptr, dx_ptr, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, at < N, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, at < N, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dy * slope(x, TANH), at < N)


@triton.jit
def _bias_gelu_forward(
    x_ptr, b_ptr, y_ptr, R, C, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(C, BLOCK)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (rows < R)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    h = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    h += tl.load(b_ptr + cols, cols < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, h * gate(h, TANH), mask)


@triton.jit
def _bias_gelu_backward(
    dy_ptr, x_ptr, b_ptr, dx_ptr, db_ptr, R, C, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col_in = cols < C
    b = 0.0
    if b_ptr is not None:
        b = tl.load(b_ptr + cols, col_in, other=0.0).to(tl.float32)[None, :]
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(1) * ROWS, R, tl.num_programs(1) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < R)[:, None] & col_in[None, :]
        at = rows[:, None] * C + cols[None, :]
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        dx = dy * slope(tl.load(x_ptr + at, mask, other=0.0).to(tl.float32) + b, TANH)
        tl.store(dx_ptr + at, dx, mask)
        db += dx
    tl.store(db_ptr + tl.program_id(1).to(tl.int64) * C + cols, tl.sum(db, 0), col_in)


@tunable
def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    config = tuned("gelu_forward", FORWARD[chip(x.device).family], FORWARD_CANDIDATES, exact=True)
    launch(
        _gelu_forward,
        (triton.cdiv(x.numel(), config.elements),),
        *(x, y, x.numel()),
        TANH=approximate == "tanh",
        BLOCK=config.elements,
        num_warps=config.elements // (32 * config.per_thread),
    )
    return y


@tunable
def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    config = tuned("gelu_backward", FORWARD[chip(x.device).family], FORWARD_CANDIDATES, exact=True)
    launch(
        _gelu_backward,
        (triton.cdiv(x.numel(), config.elements),),
        *(dy, x, dx, x.numel()),
        TANH=approximate == "tanh",
        BLOCK=config.elements,
        num_warps=config.elements // (32 * config.per_thread),
    )
    return dx


@tunable
def bias_gelu_forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, bias.dtype), device=x.device)
    config = tuned("bias_gelu_forward", FORWARD[chip(x.device).family], FORWARD_CANDIDATES, exact=True)
    t = tile(width, elements=config.elements, per_thread=config.per_thread, widest=COLUMNS)
    launch(
        _bias_gelu_forward,
        (triton.cdiv(rows, t.rows) * triton.cdiv(width, t.columns),),
        *(x, bias, y, rows, width),
        TANH=approximate == "tanh",
        ROWS=t.rows,
        BLOCK=t.columns,
        num_warps=t.warps,
    )
    return y


@tunable
def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """(dx, db); without a bias, for an x that it has been added to, db all the same."""
    dy, x = dy.contiguous(), x.contiguous()
    bias = None if bias is None else bias.contiguous()
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    dx, db = torch.empty_like(x), (x if bias is None else bias).new_empty(width)
    target = chip(x.device)
    config = tuned("bias_gelu_backward", BACKWARD[target.family], BACKWARD_CANDIDATES)
    t = tile(width, elements=config.elements, per_thread=config.per_thread, widest=COLUMNS)
    blocks = triton.cdiv(width, t.columns)
    programs = min(
        triton.cdiv(rows, t.rows), triton.cdiv(config.programs_per_sm * target.sms, max(blocks, 1))
    )
    partials = torch.empty((1, programs, width), dtype=torch.float32, device=x.device)
    launch(
        _bias_gelu_backward,
        (blocks, programs),
        *(dy, x, bias, dx, partials, rows, width),
        TANH=approximate == "tanh",
        ROWS=t.rows,
        BLOCK=t.columns,
        num_warps=t.warps,
    )
    sum_partials(partials, db)
    return dx, db


def examples() -> Iterator[Example]:
    """GPT-2's inner width, in both forms and both sizes of element."""
    for approximate, dtype in [
        ("tanh", torch.bfloat16),
        ("none", torch.bfloat16),
        ("tanh", torch.float32),
    ]:
        x, b = meta(8192, 3072, dtype=dtype), meta(3072, dtype=dtype)
        calls = {
            "_gelu_forward": partial(gelu_forward, x, approximate),
            "_gelu_backward": partial(gelu_backward, x, x, approximate),
            "_bias_gelu_forward": partial(bias_gelu_forward, x, b, approximate),
            "_bias_gelu_backward": partial(bias_gelu_backward, x, x, b, approximate),
        }
        for kernel, call in calls.items():
            name = f"{kernel.removeprefix('_')}-{approximate}-{str(dtype).removeprefix('torch.')}"
            first = approximate == "tanh" and dtype == torch.bfloat16
            yield Example(name, call, {kernel: MEMORY_BOUND}, every_chip=first)
