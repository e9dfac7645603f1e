"""LayerNorm's backward pass, from three kernels that follow the equations to one pass and a small sum.

    python benchmarks/studies/layer_norm_backward.py

    xhat = (x - mean) * rstd
    g    = dy * w
    dx   = rstd * (g - sum_c g / C - xhat * sum_c (g * xhat) / C)
    dw   = sum_rows dy * xhat,  db = sum_rows dy

The least: dy and x are read once, dx is written once. docs/optimise/layer_norm_backward.md tells the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.benchmarks.studies.run import main
from fastgpt.benchmarks.studies.study import Prediction, Size, Step, Study, fill_limit
from fastgpt.benchmarks.timing import random_tensor
from fastgpt.chips import Chip
from fastgpt.inspect.shipped import Call
from fastgpt.kernels.launch import chip, launch
from fastgpt.kernels.layer_norm import layer_norm_backward
from fastgpt.kernels.partials import sum_partials

R, C = 8192, 768  # 8 sequences of 1024 tokens in GPT-2 124M
PASS = 2 * R * C  # bytes of one (R, C) tensor of bf16
EPS = 1e-5
ROUND_S = 0.8e-6  # a load from memory, and two sums across a program's warps: what a row waits for
WARPS = 4
ROWS, COLUMNS = 64, 64  # of a tile of `_sums_of_tiles`
FEW, MORE = 32, 256  # rows at a time of CPU forms: dy, x and dx are 0.3 MB, which L2 holds, or 2.4 MB

Results = tuple[Tensor, Tensor, Tensor]


def inputs(size: Size, device: torch.device) -> list[Any]:
    """dy, x (R, C), weight (C,), mean and rstd (R,) fp32 as forward left them."""
    rows, width = (R, C) if size == "gpt2" else (37, 200)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dy, x = (random_tensor(rows, width, device=device, dtype=dtype) for _ in range(2))
    weight = random_tensor(width, device=device, dtype=dtype)
    wide = x.float()
    mean = wide.mean(1)
    return [dy, x, weight, mean, (wide.var(1, correction=0) + EPS).rsqrt()]


def reference(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    xhat = (x - mean[:, None]) * rstd[:, None]
    g = dy * weight
    dx = g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True)
    return (dx * rstd[:, None]).to(x.dtype), (dy * xhat).sum(0).to(weight.dtype), dy.sum(0)


# -- 1. as the equations stand -------------------------------------------------------------------------------


@triton.jit
def _row_means(dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr, C, BLOCK: tl.constexpr):
    """sum_c g / C and sum_c (g * xhat) / C of a row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    g = tl.load(dy_ptr + row * C + cols, mask, other=0.0).to(tl.float32)
    g *= tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
    xhat = tl.load(x_ptr + row * C + cols, mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + row)
    xhat *= tl.load(rstd_ptr + row)
    tl.store(mean_g_ptr + row, tl.sum(g, 0) / C)
    tl.store(mean_gx_ptr + row, tl.sum(g * xhat, 0) / C)


@triton.jit
def _dx_of_means(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr, dx_ptr, C, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    g = tl.load(dy_ptr + row * C + cols, mask, other=0.0).to(tl.float32)
    g *= tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    xhat = (tl.load(x_ptr + row * C + cols, mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + row)) * rstd
    dx = rstd * (g - tl.load(mean_g_ptr + row) - xhat * tl.load(mean_gx_ptr + row))
    tl.store(dx_ptr + row * C + cols, dx, mask)


@triton.jit
def _sums_of_column(dy_ptr, x_ptr, mean_ptr, rstd_ptr, dw_ptr, db_ptr, R, C, BLOCK: tl.constexpr):
    """dw and db of a column, by the program of that column: neighbouring threads are a row apart."""
    col = tl.program_id(0)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for first in range(0, R, BLOCK):
        rows = (first + tl.arange(0, BLOCK)).to(tl.int64)
        mask = rows < R
        dy = tl.load(dy_ptr + rows * C + col, mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * C + col, mask, other=0.0).to(tl.float32)
        x -= tl.load(mean_ptr + rows, mask, other=0.0)
        dw += dy * x * tl.load(rstd_ptr + rows, mask, other=0.0)
        db += dy
    tl.store(dw_ptr + col, tl.sum(dw, 0))
    tl.store(db_ptr + col, tl.sum(db, 0))


def _sums_by_columns(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> list[Tensor]:
    dw, db = torch.empty_like(weight), torch.empty_like(weight)
    launch(_sums_of_column, (x.shape[1],), dy, x, mean, rstd, dw, db, *x.shape, BLOCK=1024, num_warps=WARPS)
    return [dw, db]


def naive(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    rows, width = x.shape
    dx, mean_g, mean_gx = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    block = triton.next_power_of_2(width)
    read = (dy, x, weight, mean, rstd, mean_g, mean_gx)
    launch(_row_means, (rows,), *read, width, BLOCK=block, num_warps=WARPS)
    launch(_dx_of_means, (rows,), *read, dx, width, BLOCK=block, num_warps=WARPS)
    dw, db = _sums_by_columns(dy, x, weight, mean, rstd)
    return dx, dw, db


# -- 2. a row stays in registers -----------------------------------------------------------------------------


@triton.jit
def _dx_in_one_pass(dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    g = tl.load(dy_ptr + row * C + cols, mask, other=0.0).to(tl.float32)
    g *= tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    xhat = (tl.load(x_ptr + row * C + cols, mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + row)) * rstd
    # g is 0 in lanes past C, so the sums need no mask
    dx = rstd * (g - tl.sum(g, 0) / C - xhat * (tl.sum(g * xhat, 0) / C))
    tl.store(dx_ptr + row * C + cols, dx, mask)


def one_pass(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    dx = _dx(dy, x, weight, mean, rstd)
    dw, db = _sums_by_columns(dy, x, weight, mean, rstd)
    return dx, dw, db


def _dx(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    rows, width = x.shape
    dx = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    launch(_dx_in_one_pass, (rows,), dy, x, weight, mean, rstd, dx, width, BLOCK=block, num_warps=WARPS)
    return dx


# -- 3. neighbouring columns together ------------------------------------------------------------------------


@triton.jit
def _sums_of_tiles(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dw_ptr, db_ptr, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dw and db of neighbouring columns: a row's part of the tile is one or more lines of memory."""
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    col_in = cols < C
    dw = tl.zeros([ROWS, COLUMNS], tl.float32)
    db = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, R, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        row_in = rows < R
        mask = row_in[:, None] & col_in[None, :]
        at = rows[:, None] * C + cols[None, :]
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
        x -= tl.load(mean_ptr + rows, row_in, other=0.0)[:, None]
        dw += dy * x * tl.load(rstd_ptr + rows, row_in, other=0.0)[:, None]
        db += dy
    tl.store(dw_ptr + cols, tl.sum(dw, 0), col_in)
    tl.store(db_ptr + cols, tl.sum(db, 0), col_in)


def tiles(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    dx = _dx(dy, x, weight, mean, rstd)
    dw, db = torch.empty_like(weight), torch.empty_like(weight)
    grid = (triton.cdiv(x.shape[1], COLUMNS),)
    args = (dy, x, mean, rstd, dw, db, *x.shape)
    launch(_sums_of_tiles, grid, *args, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)
    return dx, dw, db


# -- 4. everything in the pass of dx, by atomic additions ----------------------------------------------------


@triton.jit
def _all_with_atomics(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, C, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    dy = tl.load(dy_ptr + row * C + cols, mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    xhat = (tl.load(x_ptr + row * C + cols, mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + row)) * rstd
    tl.atomic_add(dw_ptr + cols, dy * xhat, mask)
    tl.atomic_add(db_ptr + cols, dy, mask)
    g = dy * tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
    dx = rstd * (g - tl.sum(g, 0) / C - xhat * (tl.sum(g * xhat, 0) / C))
    tl.store(dx_ptr + row * C + cols, dx, mask)


def atomics(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    rows, width = x.shape
    dx = torch.empty_like(x)
    dw, db = (torch.zeros(width, dtype=torch.float32, device=x.device) for _ in range(2))
    args = (dy, x, weight, mean, rstd, dx, dw, db, width)
    launch(_all_with_atomics, (rows,), *args, BLOCK=triton.next_power_of_2(width), num_warps=WARPS)
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


# -- 5 and 6. partial sums of as many programs as the chip holds ---------------------------------------------


@triton.jit
def _with_partial_sums(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, R, C, BLOCK: tl.constexpr
):
    """Row after row; dw and db of the program's rows stay in registers until its last."""
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    w = tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * C + cols
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = (tl.load(x_ptr + at, mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + row)) * rstd
        dw += dy * xhat
        db += dy
        g = dy * w
        dx = rstd * (g - tl.sum(g, 0) / C - xhat * (tl.sum(g * xhat, 0) / C))
        tl.store(dx_ptr + at, dx, mask)
    at = tl.program_id(0).to(tl.int64) * C + cols
    tl.store(dw_ptr + at, dw, mask)
    tl.store(db_ptr + at, db, mask)


def partial_sums(programs_per_sm: int) -> Callable[..., Results]:
    def run(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
        rows, width = x.shape
        dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        programs = min(rows, programs_per_sm * chip(x.device).sms)
        partials = torch.empty((2, programs, width), dtype=torch.float32, device=x.device)
        args = (dy, x, weight, mean, rstd, dx, partials[0], partials[1], rows, width)
        block = triton.next_power_of_2(width)
        launch(_with_partial_sums, (programs,), *args, BLOCK=block, num_warps=WARPS)
        sum_partials(partials, dw, db)
        return dx, dw, db

    return run


def shipped(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    return layer_norm_backward(dy, x, weight, mean, rstd, True)


# -- on a CPU ------------------------------------------------------------------------------------------------


def cpu_one_pass(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    """dx by few rows at a time, whose intermediate results stay in the cache; dw and db as before."""
    dx = torch.empty_like(x)
    for rows in _slices(len(x), FEW):
        dx[rows] = reference(dy[rows], x[rows], weight, mean[rows], rstd[rows])[0]
    xhat = (x - mean[:, None]) * rstd[:, None]
    return dx, (dy * xhat).sum(0), dy.sum(0)


def cpu_partial_sums(at_a_time: int) -> Callable[..., Results]:
    """dw and db of the same rows while they are in the cache, added up at the end."""

    def run(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
        dx = torch.empty_like(x)
        parts = []
        for rows in _slices(len(x), at_a_time):
            dx[rows], dw, db = reference(dy[rows], x[rows], weight, mean[rows], rstd[rows])
            parts.append(torch.stack([dw, db]))
        dw, db = torch.stack(parts).sum(0)
        return dx, dw, db

    return run


def _slices(rows: int, at_a_time: int) -> list[slice]:
    return [slice(first, first + at_a_time) for first in range(0, rows, at_a_time)]


def cpu_shipped(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    return torch.ops.fastgpt_native.layer_norm_backward(dy, x, weight, mean, rstd, True)


def cpu_torch(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Results:
    statistics = mean[:, None], rstd[:, None]
    return torch.ops.aten.native_layer_norm_backward(
        dy, x, [x.shape[1]], *statistics, weight, weight, [True, True, True]
    )


# -- the study -----------------------------------------------------------------------------------------------


def _rounds(programs_per_sm: int, rows: int) -> Callable[[Chip], float]:
    """Microseconds of programs that wait for each of their rounds, or of the bytes where that is longer."""

    def us(chip: Chip) -> float:
        programs = programs_per_sm * chip.sms
        partials = 2 * (4 * 2 * programs * C)  # written and read, fp32, of dw and db
        return 1e6 * max(R / (programs * rows) * ROUND_S, (3 * PASS + partials) / chip.bandwidth)

    return us


def _sectors_of_columns(call: Call, chip: Chip) -> dict[str, float]:
    """Each element of a column is in another sector, of which the other 15 columns are other programs'."""
    return fill_limit(2 * R * C * 32, chip) if call.kernel is _sums_of_column else {}


STUDY = Study(
    name="layer_norm_backward",
    sizes="8192 rows of 768 bf16",
    inputs=inputs,
    reference=reference,
    peers={
        f"partial sums, {MORE} rows": cpu_partial_sums(MORE),
        "torch: native_layer_norm_backward": cpu_torch,
    },
    steps=[
        Step(
            "as the equations stand",
            "three kernels: the two means of a row, dx from them, and a program for each column's dw and db.",
            Prediction(
                "the means read two tensors, dx reads two and writes one, the columns read two: 7 passes of "
                "12.6 MB are 88 MB.",
                bytes=7 * PASS,
                launches=3,
            ),
            naive,
            reference,
            "the equations, a tensor each",
            limits=_sectors_of_columns,
        ),
        Step(
            "a row in registers",
            "the means and dx in one kernel, which has the whole row in registers.",
            Prediction(
                "5 passes, 63 MB: 1.4 times as fast where memory binds. On the CPU 20 of 25 passes become 3, "
                "12 in all.",
                bytes=5 * PASS,
                launches=2,
                cpu=2.1,
            ),
            one_pass,
            cpu_one_pass,
            "dx by 32 rows in the cache",
            limits=_sectors_of_columns,
        ),
        Step(
            "neighbouring columns together",
            f"dw and db by tiles of {ROWS} rows and {COLUMNS} columns, so that a warp reads whole lines.",
            Prediction(
                "the same 63 MB, but each line of memory is asked for once instead of 16 times: the time of "
                "the bytes, where the step before could not reach it.",
                bytes=5 * PASS,
                launches=2,
            ),
            tiles,
        ),
        Step(
            "atomic additions",
            "dw and db in the kernel of dx: each row adds itself to two fp32 vectors in L2.",
            Prediction(
                "3 passes, 38 MB, the least there is, and two fills. 12.6 million additions to 1536 "
                "addresses come on top, of which bytes know nothing.",
                bytes=3 * PASS,
                launches=3,
            ),
            atomics,
            fills=2,
            deterministic=False,
        ),
        Step(
            "partial sums",
            "two programs an SM, each with rows at a stride; its dw and db stay in registers, and a second "
            "kernel adds up the programs'.",
            Prediction(
                "on an H100 264 programs write 1.6 MB of partial sums: 41 MB, 12.2 us. But each of a "
                "program's 31 rows waits for memory and for two sums across warps, 0.8 us: 25 us. On the CPU "
                "3 passes instead of 12, if what is in the cache cost nothing: let it be 2.",
                us=_rounds(2, 1),
                cpu=2.0,
            ),
            partial_sums(2),
            cpu_partial_sums(FEW),
            "dw and db too, by 32 rows in the cache",
        ),
        Step(
            "more programs",
            "eight programs an SM instead of two, to hide that wait.",
            Prediction(
                "8 rows a program are 6 us, so that the bytes bind again: but there are four times the "
                "partial sums, 51 MB in all on an H100, 15.1 us.",
                us=_rounds(8, 1),
            ),
            partial_sums(8),
        ),
        Step(
            "four rows at a time",
            "the shipped kernel: two programs of 8 warps an SM, with tiles of 4 rows.",
            Prediction(
                "8 rounds of 4 rows wait as 8 rows did, with the partial sums of two programs an SM: 41 MB, "
                "12.2 us on an H100. On the CPU C++ needs no tensor for each operation: half as long again.",
                us=_rounds(2, 4),
                cpu=1.5,
            ),
            shipped,
            cpu_shipped,
            "native, C++",
        ),
    ],
)

if __name__ == "__main__":
    main(STUDY)
