"""LayerNorm, RMSNorm, and LayerNorm with the residual addition before it.

    s    = x + residual                          or x, without one
    mean = sum_c s / C                           0 for RMSNorm
    rstd = 1 / sqrt(sum_c (s - mean)^2 / C + eps)
    xhat = (s - mean) * rstd
    y    = xhat * w + b

    g  = dy * w
    dx = rstd * (g - sum_c g / C - xhat * sum_c (g * xhat) / C) + ds      no sum_c g for RMSNorm
    dw = sum_rows dy * xhat,  db = sum_rows dy

Bytes, e an element's: forward 2 R C e (x, y), with the addition 4 R C e (residual, s too); backward 3 R C e
(dy, x, dx), with ds 4. The rest (w, b, mean, rstd, partial sums) is under a tenth of that at GPT-2's sizes.

Launch, rows up to WIDEST: a tile of whole rows per program, so that x is read once and stays in registers
from the sum to y. Backward launches a few programs per SM, each going through tiles with a stride; dw and db
of a program stay in registers until it has seen its last row, and `sum_partials` adds up the programs'.
Launch, wider rows: a row per program, in blocks of columns read twice (from L2 the second time); dw and db by
programs of their own, each for a block of columns and a stride of rows.
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

WIDEST = 8192  # 16 warps hold 16 elements a thread of such a row, without spills in backward


class Config(NamedTuple):
    elements: int  # of a tile
    per_thread: int
    programs_per_sm: int = 0


# Memory-bound: what counts is bytes in flight, latency (about 0.7 us) x bandwidth / SMs: 13 KB an SM on A100,
# 18 on H100, 38 on B200. Eight bf16 elements are one 16-byte load a thread, 32 KB at full occupancy; the B200
# gets two. sm_120 has less bandwidth an SM than the A100.
FORWARD = {80: Config(1024, 8), 90: Config(1024, 8), 100: Config(2048, 16), 120: Config(1024, 8)}
# dw and db take two registers an element besides x, dy and w: 16 elements a thread leave room for two
# programs of 8 warps an SM, 32 KB of x and dy in flight; more programs would write more partial sums.
BACKWARD = dict.fromkeys(FORWARD, Config(4096, 16, programs_per_sm=2))
# For tune.py: twice and four times the rows of a program, with a load or two a thread.
FORWARD_CANDIDATES = [Config(1024, 8), Config(2048, 8), Config(2048, 16), Config(4096, 16)]
# More programs hide each other's latency, at the price of partial sums; fewer rows leave them registers.
BACKWARD_CANDIDATES = [Config(4096, 16, 1), Config(4096, 16, 4), Config(2048, 16, 4), Config(2048, 8, 4)]
WIDE_BLOCK, WIDE_WARPS = 4096, 8  # 16 elements a thread
WIDE_SUMS = Config(4096, 16, programs_per_sm=2)
WIDE_SUMS_COLUMNS = 256  # 512 bytes of a bf16 row: whole lines, and 16 rows at a time


@triton.jit
def _forward(
    x_ptr,
    residual_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    summed_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    C,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    row_in, col_in = rows < R, cols < C
    mask = row_in[:, None] & col_in[None, :]
    at = rows[:, None] * C + cols[None, :]
    s = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + at, mask, other=0.0).to(tl.float32)
        rounded = s.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + at, rounded, mask)
        s = rounded.to(tl.float32)  # backward will read the rounded sum: normalise the same
    if mean_ptr is not None:
        mean = tl.sum(s, 1) / C
        tl.store(mean_ptr + rows, mean, row_in)
        s = tl.where(mask, s - mean[:, None], 0.0)  # lanes past C must not count in the variance
    rstd = tl.rsqrt(tl.sum(s * s, 1) / C + eps)
    tl.store(rstd_ptr + rows, rstd, row_in)
    y = s * rstd[:, None] * tl.load(w_ptr + cols, col_in, other=0.0).to(tl.float32)[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + cols, col_in, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y, mask)


@triton.jit
def _backward(
    dy_ptr,
    ds_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    R,
    C,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    col_in = cols < C
    w = tl.load(w_ptr + cols, col_in, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, R, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        row_in = rows < R
        mask = row_in[:, None] & col_in[None, :]
        at = rows[:, None] * C + cols[None, :]
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        xhat = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, row_in, other=0.0)[:, None]
        if mean_ptr is not None:
            xhat -= tl.load(mean_ptr + rows, row_in, other=0.0)[:, None]
        xhat *= rstd
        dw += dy * xhat
        g = dy * w  # 0 in lanes past C, so the sums below need no mask
        dx = g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(g, 1) / C)[:, None]
        dx *= rstd
        if db_ptr is not None:
            db += dy
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + at, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask)
    at = tl.program_id(0).to(tl.int64) * C + cols
    tl.store(dw_ptr + at, tl.sum(dw, 0), col_in)
    if db_ptr is not None:
        tl.store(db_ptr + at, tl.sum(db, 0), col_in)


@triton.jit
def _load_sum(x_ptr, residual_ptr, summed_ptr, at, mask):
    """x, or the rounded x + residual, in fp32."""
    s = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + at, mask, other=0.0).to(tl.float32)
        s = s.to(summed_ptr.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _forward_wide(
    x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, summed_ptr, mean_ptr, rstd_ptr, R, C, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    m2 = 0.0  # sum of squared distances from the mean of the columns so far
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < C
        s = _load_sum(x_ptr, residual_ptr, summed_ptr, row * C + cols, mask)
        if mean_ptr is not None:  # Chan et al.: merge two sets' means and squared distances
            count = tl.minimum(C - start, BLOCK).to(tl.float32)
            block_mean = tl.sum(s, 0) / count
            s = tl.where(mask, s - block_mean, 0.0)
            delta = block_mean - mean
            share = count / (start + count)
            mean += delta * share
            m2 += delta * delta * start * share
        m2 += tl.sum(s * s, 0)
    rstd = tl.rsqrt(m2 / C + eps)
    tl.store(rstd_ptr + row, rstd)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < C
        at = row * C + cols
        s = _load_sum(x_ptr, residual_ptr, summed_ptr, at, mask)
        if residual_ptr is not None:
            tl.store(summed_ptr + at, s, mask)
        y = (s - mean) * rstd * tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
        if b_ptr is not None:
            y += tl.load(b_ptr + cols, mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y, mask)


@triton.jit
def _backward_wide(dy_ptr, ds_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, R, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_gx = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < C
        g = tl.load(dy_ptr + row * C + cols, mask, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
        xhat = (tl.load(x_ptr + row * C + cols, mask, other=0.0).to(tl.float32) - mean) * rstd
        sum_g += g
        sum_gx += g * xhat
    mean_g = tl.sum(sum_g, 0) / C
    mean_gx = tl.sum(sum_gx, 0) / C
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < C
        at = row * C + cols
        g = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
        xhat = (tl.load(x_ptr + at, mask, other=0.0).to(tl.float32) - mean) * rstd
        dx = g - xhat * mean_gx
        if mean_ptr is not None:
            dx -= mean_g
        dx *= rstd
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + at, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask)


@triton.jit
def _sums_wide(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dw_ptr, db_ptr, R, C, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col_in = cols < C
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(1) * ROWS, R, tl.num_programs(1) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        row_in = rows < R
        mask = row_in[:, None] & col_in[None, :]
        at = rows[:, None] * C + cols[None, :]
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        xhat = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            xhat -= tl.load(mean_ptr + rows, row_in, other=0.0)[:, None]
        dw += dy * xhat * tl.load(rstd_ptr + rows, row_in, other=0.0)[:, None]
        if db_ptr is not None:
            db += dy
    at = tl.program_id(1).to(tl.int64) * C + cols
    tl.store(dw_ptr + at, tl.sum(dw, 0), col_in)
    if db_ptr is not None:
        tl.store(db_ptr + at, tl.sum(db, 0), col_in)


@tunable
def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, x + residual or x, mean or None, rstd)."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    summed = x
    if residual is not None:
        residual = residual.contiguous()
        summed = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    y = torch.empty_like(summed)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centered else None
    rows, width = rstd.numel(), x.shape[-1]
    args = (x, residual, weight, bias, y, None if residual is None else summed, mean, rstd, rows, width, eps)
    if width > WIDEST:
        launch(_forward_wide, (rows,), *args, BLOCK=WIDE_BLOCK, num_warps=WIDE_WARPS)
    else:
        config = tuned("norm_forward", FORWARD[chip(x.device).family], FORWARD_CANDIDATES)
        t = tile(width, elements=config.elements, per_thread=config.per_thread, widest=WIDEST)
        grid = (triton.cdiv(rows, t.rows),)
        launch(_forward, grid, *args, ROWS=t.rows, BLOCK=t.columns, num_warps=t.warps)
    return y, summed, mean, rstd


@tunable
def norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db); db has shape (0,) without a bias."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dsummed = None if dsummed is None else dsummed.contiguous()
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    db = torch.empty_like(weight if has_bias else weight[:0])
    rows, width = rstd.numel(), x.shape[-1]
    target = chip(x.device)

    def partial_sums(programs: int) -> Tensor:
        return torch.empty((1 + has_bias, programs, width), dtype=torch.float32, device=x.device)

    if width > WIDEST:
        launch(
            _backward_wide,
            (rows,),
            *(dy, dsummed, x, weight, mean, rstd, dx, rows, width),
            BLOCK=WIDE_BLOCK,
            num_warps=WIDE_WARPS,
        )
        config = WIDE_SUMS
        t = tile(width, elements=config.elements, per_thread=config.per_thread, widest=WIDE_SUMS_COLUMNS)
        blocks = triton.cdiv(width, t.columns)
        wanted = triton.cdiv(config.programs_per_sm * target.sms, blocks)
        programs = min(triton.cdiv(rows, t.rows), wanted)
        partials = partial_sums(programs)
        launch(
            _sums_wide,
            (blocks, programs),
            *(dy, x, mean, rstd, partials[0], partials[1] if has_bias else None, rows, width),
            ROWS=t.rows,
            BLOCK=t.columns,
            num_warps=t.warps,
        )
    else:
        config = tuned("norm_backward", BACKWARD[target.family], BACKWARD_CANDIDATES)
        t = tile(width, elements=config.elements, per_thread=config.per_thread, widest=WIDEST)
        programs = min(triton.cdiv(rows, t.rows), config.programs_per_sm * target.sms)
        partials = partial_sums(programs)
        launch(
            _backward,
            (programs,),
            *(dy, dsummed, x, weight, mean, rstd, dx, partials[0], partials[1] if has_bias else None),
            *(rows, width),
            ROWS=t.rows,
            BLOCK=t.columns,
            num_warps=t.warps,
        )
    sum_partials(partials, dw, db if has_bias else None)
    return dx, dw, db


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    y, _, mean, rstd = norm_forward(x, None, weight, bias, eps, centered=True)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_backward(dy, None, x, weight, mean, rstd, has_bias=has_bias)


def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    return norm_forward(x, residual, weight, bias, eps, centered=True)


def add_layer_norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_backward(dy, dsummed, summed, weight, mean, rstd, has_bias=has_bias)


def examples() -> Iterator[Example]:
    """GPT-2's width, in both sizes of element, the widest tile, and the wide kernels."""
    for width, dtype in [
        (768, torch.bfloat16),
        (768, torch.float32),
        (8192, torch.float32),
        (16384, torch.bfloat16),
    ]:
        x, w = meta(8192, width, dtype=dtype), meta(width, dtype=dtype)
        row = meta(8192, dtype=torch.float32)
        name = f"{width}-{str(dtype).removeprefix('torch.')}"
        suffix = "_wide" if width > WIDEST else ""
        yield Example(
            f"forward-{name}",
            partial(add_layer_norm_forward, x, x, w, w, 1e-5),
            {f"_forward{suffix}": MEMORY_BOUND},
            every_chip=dtype == torch.bfloat16,
        )
        yield Example(
            f"backward-{name}",
            partial(add_layer_norm_backward, x, x, x, w, row, row, True),
            {f"_backward{suffix}": MEMORY_BOUND},
            every_chip=dtype == torch.bfloat16,
        )
