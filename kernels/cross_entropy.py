"""Cross-entropy and its gradient, a row of logits per program.

For a row l of V columns, of which S count, with target y and e = label_smoothing:

    m   = max_{c < S} l_c,  t = sum_{c < S} exp(l_c - m),  lse = m + log t
    loss = (m - l_y) + log t - e sum_{c < S} (l_c - l_y) / S + z_loss lse^2         0 where y = ignore_index
    dl_c = g (exp(l_c - m) (1 + 2 z_loss lse) / t - (1 - e) [c = y] - e / S)        0 for c >= S

with g = dloss, for the mean over the number of rows that count. lse itself is never subtracted from: at
logits of 6e4 its rounding alone is worth 0.4 % of a probability.

Bytes, e an element's: the loss alone R V e; with the gradient 2 R V e, since the second look at a row comes
from the cache: 100 KB of bf16 at V = 50304, two rows an SM, 22 MB on an A100. It looks at the blocks that
were read last first.

Launch: a program per row, going through the columns in blocks of 16 elements a thread. m and t are kept for
every 16 bytes that a thread loads, so that a block costs no exchange between threads; they are merged once,
at the end of the row. Only the last block is masked. Count and sum over rows are one program each, in a
fixed order: 350 KB of targets at 43k rows.

A target outside 0..S-1 makes its row's loss and gradient NaN, and reads nothing; on CPU tensors it is an
IndexError.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.examples import Example, meta
from fastgpt.kernels.launch import chip, launch
from fastgpt.kernels.tune import tunable, tuned


class Config(NamedTuple):
    columns: int  # of a block
    registers: int | None = None  # a thread's limit for 2-byte logits; None is the compiler's choice


# 16 warps of 16 elements a thread: two 16-byte loads of bf16 each, 16 KB in flight for a program. The
# compiler takes 51 to 64 registers, with which two programs fit an SM: 32 KB, more than latency x bandwidth
# asks of an A100 (13 KB) or H100 (18), and rows of 22 and 26 MB at a time, which their 40 and 50 MB of L2
# hold until the second look. B200 asks for 38 KB and holds 126 MB: five programs of half the block, for which
# 48 registers make room, have 40 KB in flight and 74 MB of rows. (40 registers, for a third program of the
# whole block, spill with Triton 3.8, and not with 3.9.)
LAUNCH = {80: Config(8192), 90: Config(8192), 100: Config(4096, registers=48), 120: Config(8192)}
# For tune.py, 2-byte logits: programs of half and twice the block. With 40 registers 90 and 120 spill.
CANDIDATES = [Config(4096), Config(8192), Config(16384)]
PER_THREAD = 16
SUM_BLOCK, SUM_WARPS = 4096, 8  # rows at a time of the two sums over rows


@triton.jit
def _exp(x):
    """exp, with 0 for results under 1e-38: tl.exp spends three more instructions on those."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _columns(start, LANES: tl.constexpr, GROUP: tl.constexpr):
    """(LANES, GROUP): a thread loads GROUP neighbours, 16 bytes, at once."""
    return start + tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _load(row_ptr, cols, V, S, MASKED: tl.constexpr):
    if MASKED:
        # V bounds the access, since its divisibility keeps it 16 bytes wide; S, often odd, what was read.
        x = tl.load(row_ptr + cols, cols < V, other=0.0).to(tl.float32)
        x = tl.where(cols < S, x, float("-inf"))
    else:
        x = tl.load(row_ptr + cols).to(tl.float32)
    return x


@triton.jit
def _add_block(row_ptr, cols, V, S, shift, top, total, excess, SMOOTH: tl.constexpr, MASKED: tl.constexpr):
    """Take a block into each lane's maximum, sum of exponentials and, for SMOOTH, sum of l - shift."""
    x = _load(row_ptr, cols, V, S, MASKED)
    greater = tl.maximum(top, tl.max(x, 1))
    total = total * _exp(top - greater) + tl.sum(_exp(x - greater[:, None]), 1)
    if SMOOTH:
        distance = x - shift
        if MASKED:
            distance = tl.where(cols < S, distance, 0.0)
        excess += tl.sum(distance, 1)
    return greater, total, excess


@triton.jit
def _gradient(
    row_ptr, start, cols, V, S, y, m, scale, at_y, everywhere, SMOOTH: tl.constexpr, MASKED: tl.constexpr
):
    dl = _exp(_load(row_ptr, cols, V, S, MASKED) - m) * scale
    if SMOOTH:
        dl -= everywhere
    if (y >= start) & (y < start + cols.shape[0] * cols.shape[1]):  # one block of the row
        dl = tl.where(cols == y, at_y, dl)
    return dl


@triton.jit
def _row(
    logits_ptr,
    targets_ptr,
    dloss_ptr,
    count_ptr,
    loss_ptr,
    dlogits_ptr,
    V,
    S,
    logits_stride,
    dloss_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    SMOOTH: tl.constexpr,
    FILLED: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * GROUP
    row = tl.program_id(0).to(tl.int64)
    g = 1.0
    if dloss_ptr is not None:
        g = tl.load(dloss_ptr + row * dloss_stride)
    if FILLED:  # dlogits holds the gradient for g = 1 already  # noqa: SIM102 (decided when compiling)
        if g == 1.0:
            return
    y = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + row * logits_stride
    drow_ptr = dlogits_ptr
    if dlogits_ptr is not None:
        drow_ptr += row * V
    if y == ignore_index:
        if loss_ptr is not None:
            tl.store(loss_ptr + row, 0.0)
        if dlogits_ptr is not None:
            for start in range(0, V, BLOCK):
                cols = _columns(start, LANES, GROUP)
                tl.store(drow_ptr + cols, tl.zeros([LANES, GROUP], tl.float32), cols < V)
        return

    known = (y >= 0) & (y < S)
    l_y = tl.load(row_ptr + y, known, other=float("nan")).to(tl.float32)
    shift = tl.where(l_y == float("-inf"), 0.0, l_y)  # near the others, so that their sum loses no digits
    top = tl.full([LANES], -3.4028234663852886e38, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.zeros([LANES], tl.float32)
    excess = tl.zeros([LANES], tl.float32)
    full = S // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        cols = _columns(start, LANES, GROUP)
        top, total, excess = _add_block(row_ptr, cols, V, S, shift, top, total, excess, SMOOTH, False)
    for start in range(full, S, BLOCK):
        cols = _columns(start, LANES, GROUP)
        top, total, excess = _add_block(row_ptr, cols, V, S, shift, top, total, excess, SMOOTH, True)
    m = tl.max(top, 0)
    t = tl.sum(total * _exp(top - m), 0)
    log_t = tl.log(t)
    lse = m + log_t
    if loss_ptr is not None:
        loss = (m - l_y) + log_t
        if SMOOTH:
            loss -= label_smoothing * (tl.sum(excess, 0) / S)
        tl.store(loss_ptr + row, loss + z_loss * lse * lse)

    if dlogits_ptr is not None:
        if count_ptr is not None:
            g /= tl.load(count_ptr)
        scale = tl.where(known, g * (1.0 + 2.0 * z_loss * lse) / t, float("nan"))
        everywhere = g * label_smoothing / S
        # p - 1 before the rest: what is left when they cancel is exact, and at V = 1 it is 0.
        p_y = _exp(l_y - m) / t
        at_y = g * ((p_y - 1.0) + label_smoothing + p_y * (2.0 * z_loss * lse)) - everywhere
        y = y.to(tl.int32)
        for start in range(full, V, BLOCK):
            cols = _columns(start, LANES, GROUP)
            dl = _gradient(row_ptr, start, cols, V, S, y, m, scale, at_y, everywhere, SMOOTH, True)
            tl.store(drow_ptr + cols, tl.where(cols < S, dl, 0.0), cols < V)
        for number in range(1, S // BLOCK + 1):
            start = full - number * BLOCK
            cols = _columns(start, LANES, GROUP)
            dl = _gradient(row_ptr, start, cols, V, S, y, m, scale, at_y, everywhere, SMOOTH, False)
            tl.store(drow_ptr + cols, dl)


@triton.jit
def _count(targets_ptr, count_ptr, R, ignore_index, BLOCK: tl.constexpr):
    counted = tl.zeros([BLOCK], tl.int32)
    for start in range(0, R, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        y = tl.load(targets_ptr + rows, rows < R, other=ignore_index)
        counted += (y != ignore_index).to(tl.int32)
    tl.store(count_ptr, tl.sum(counted, 0).to(tl.float32))


@triton.jit
def _sum(losses_ptr, count_ptr, loss_ptr, R, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, R, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + rows, rows < R, other=0.0)
    loss = tl.sum(total, 0)
    if count_ptr is not None:
        loss /= tl.load(count_ptr)  # 0 / 0: NaN when no row counts
    tl.store(loss_ptr, loss)


def rows_of(logits: Tensor) -> Tensor:
    """(rows, V) with neighbouring columns side by side; a copy only where strides allow no view."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """IndexError for a target out of range, on the CPU: elsewhere it would wait for the device."""
    if targets.device.type == "cpu":
        outside = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
        if outside.any():
            raise IndexError


def count_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """How many rows count: a scalar in fp32, on the device."""
    count = torch.empty((), dtype=torch.float32, device=targets.device)
    launch(_count, (1,), targets, count, targets.numel(), ignore_index, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS)
    return count


def sum_losses(losses: Tensor, count: Tensor | None) -> Tensor:
    """The sum of the rows' losses, divided by `count`."""
    loss = torch.empty((), dtype=torch.float32, device=losses.device)
    launch(_sum, (1,), losses, count, loss, losses.numel(), BLOCK=SUM_BLOCK, num_warps=SUM_WARPS)
    return loss


@tunable
def loss_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    losses: Tensor | None = None,
    dlogits: Tensor | None = None,
    dloss: Tensor | None = None,
    count: Tensor | None = None,
    filled: bool = False,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
) -> None:
    """Write each row's loss to `losses` and its gradient to `dlogits`, where given.

    `logits` (rows, V) may have any row stride; `dlogits` (rows, V) is contiguous and may be `logits` itself.
    The gradient is for `dloss` (a scalar or one for each row; 1 if None), divided by `count` if given.
    `filled`: `dlogits` already holds the gradient for a `dloss` of 1, so that rows with that are left alone.
    """
    rows, width = logits.shape
    group = 16 // logits.element_size()
    config = tuned("loss_rows", LAUNCH[chip(logits.device).family], CANDIDATES if group == 8 else [])
    block = min(triton.next_power_of_2(max(vocab_size, 32 * group)), config.columns)
    launch(
        _row,
        (rows,),
        *(logits, targets, dloss, count, losses, dlogits, width, vocab_size, logits.stride(0)),
        0 if dloss is None or dloss.ndim == 0 else dloss.stride(0),  # 0 too for an expanded one
        *(ignore_index, label_smoothing, z_loss),
        SMOOTH=label_smoothing != 0,
        FILLED=filled,
        LANES=block // group,
        GROUP=group,
        num_warps=max(block // (32 * PER_THREAD), 1),
        maxnreg=config.registers if group == 8 else None,  # fp32 has twice the bytes in flight, and spills
    )


def cross_entropy_forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(targets, vocab_size, ignore_index)
    shape, targets = targets.shape, targets.reshape(-1).contiguous()
    rows = rows_of(logits)
    losses = torch.empty(shape, dtype=torch.float32, device=logits.device)
    count = count_rows(targets, ignore_index) if reduction == "mean" else None
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if with_gradient else None
    loss_rows(
        rows,
        targets,
        losses=losses,
        dlogits=dlogits,
        count=count,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        vocab_size=vocab_size,
    )
    loss = losses if reduction == "none" else sum_losses(losses, count)
    return (
        loss,
        losses.new_empty(0) if count is None else count,
        (logits.new_empty(0) if dlogits is None else dlogits),
    )


def cross_entropy_backward(
    dlogits: Tensor,
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    count: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
    filled: bool,
) -> None:
    loss_rows(
        rows_of(logits),
        targets.reshape(-1).contiguous(),
        dlogits=dlogits,
        dloss=dloss.reshape(-1) if dloss.ndim else dloss,
        count=None if count.ndim else count,
        filled=filled,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        vocab_size=vocab_size,
    )


def examples() -> Iterator[Example]:
    """GPT-2's padded vocabulary, and more rows of it than 32-bit offsets reach."""
    rows, width, size = 43_000, 50304, 50257
    targets, scalar = meta(rows, dtype=torch.int64), meta(dtype=torch.float32)
    both = "vector_load", "vector_store", "wide_rows"
    for name, dtype, smoothing, gradient in [
        ("loss", torch.bfloat16, 0.0, False),
        ("loss-and-gradient", torch.bfloat16, 0.0, True),
        ("loss-and-gradient-smooth", torch.bfloat16, 0.1, True),
        ("loss-and-gradient-float32", torch.float32, 0.0, True),
    ]:
        logits = meta(rows, width, dtype=dtype)
        yield Example(
            name,
            partial(cross_entropy_forward, logits, targets, -100, smoothing, 1e-4, "mean", size, gradient),
            {"_row": both if gradient else ("vector_load", "wide_rows")},
            every_chip=name == "loss-and-gradient",
        )
    logits = meta(rows, width)
    yield Example(
        "gradient",
        partial(
            cross_entropy_backward,
            *(logits, scalar, logits, targets, scalar, -100, 0.0, 1e-4, size, True),
        ),
        {"_row": both},
    )
