"""The classifier and the cross-entropy after it, a chunk of rows at a time: cuBLAS or oneDNN multiplies, and
`cross_entropy.py` turns each chunk's logits into losses and, in place, into their gradient.

    for each chunk of n rows:    l = x W^T        (n, V)
                                 l -> dl          for a dloss of 1, not yet divided by the count
                                 dx = dl W        (n, C)
                                 dW += dl^T x     (V, C) in fp32
    backward:                    dx, dW times dloss / count, rounded to the dtypes of x and W

Held at a time: n V logits, and from forward to backward dx and dW in fp32. Flops: the three products, 6 R C V
for R rows; nothing is computed twice. With reduction "none" dW needs each row's dloss before the sum over
rows: then forward computes losses only, and backward does all of this with the dloss that it has, 8 R C V.

That dl is for a dloss of 1 is what fp16 needs: divided by a count of 32768, the probabilities of most of the
50304 tokens would be less than its smallest number.

A chunk's own bytes, on top of its products: logits written, read, dl written and read twice, 5 n V e, and
8 V C for reading and writing dW. In chunks of 4096 rows at GPT-2's size (C = 768, bf16) that is 2.1 GB and
0.3 GB, in chunks of 256 rows 0.13 GB and 0.3 GB: small chunks move dW for nothing.

Launch of `_scale`: one program for every BLOCK elements of dx or dW.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.cross_entropy import check_targets, count_rows, loss_rows, sum_losses
from fastgpt.kernels.examples import MEMORY_BOUND, Example, meta
from fastgpt.kernels.launch import launch

PADDING = 64  # columns: rows of logits then begin at a cache line's start, as matrix products want them
BLOCK, WARPS = 2048, 4  # 16 elements a thread: two 16-byte loads of bf16, four of fp32


@triton.jit
def _scale(x_ptr, dloss_ptr, count_ptr, y_ptr, N, SIZE, BLOCK: tl.constexpr):
    """y = x dloss / count for the first N elements, 0 for the others of SIZE."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + at, at < N, other=0.0).to(tl.float32)
    factor = 1.0
    if dloss_ptr is not None:
        factor = tl.load(dloss_ptr).to(tl.float32)
    if count_ptr is not None:
        count = tl.load(count_ptr)
        factor = tl.where(count > 0, factor / count, 0.0)  # x is 0 where no row counts, and 0 / 0 is not
    # The others are 0 even where dloss is infinite or NaN.
    tl.store(y_ptr + at, tl.where(at < N, y * factor, 0.0), at < SIZE)


def _padded(weight: Tensor, vocab_size: int) -> Tensor:
    """The rows of `weight` that count, and rows of zeros up to a multiple of PADDING.

    The rows of padding that `weight` itself has may hold NaN, which 0 * NaN would carry from there to dx.
    """
    rows = triton.cdiv(vocab_size, PADDING) * PADDING
    if rows == vocab_size:
        return weight[:rows]
    padded = weight.new_zeros(rows, weight.shape[1])
    padded[:vocab_size] = weight[:vocab_size]
    return padded


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b in fp32, or total = a @ b for the first. With `out`, autocast leaves dtypes alone."""
    beta = 0 if first else 1
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:  # no such product on CPU tensors, which come here under the interpreter only
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dloss: Tensor | None,
    chunk_rows: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    x_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, count, dx, dW); dW (vocab_size, C) in fp32, gradients for `dloss`, one for each row, or 1."""
    check_targets(targets, vocab_size, ignore_index)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    dx = x.new_empty(x.shape if x_gradient else 0)
    w = _padded(weight, vocab_size)
    rows, width = targets.numel(), x.shape[-1]
    total = torch.empty((w.shape[0] if weight_gradient else 0, width), dtype=torch.float32, device=x.device)
    if rows == 0:
        total.zero_()
    flat, flat_dx, flat_losses = x.reshape(rows, width), dx.view(-1, width), losses.view(-1)
    flat_targets = targets.reshape(-1).contiguous()
    flat_dloss = None if dloss is None else dloss.reshape(-1)
    chunks = triton.cdiv(rows, chunk_rows)
    size = triton.cdiv(rows, max(chunks, 1))  # all about as long: a short last one costs what a long one does
    buffer = x.new_empty(size, w.shape[0])
    for start in range(0, rows, max(size, 1)):
        part = slice(start, start + size)
        chunk = flat[part]  # (n, C)
        logits = buffer[: chunk.shape[0]]  # (n, V), soon dl
        torch.mm(chunk, w.t(), out=logits)
        loss_rows(
            logits,
            flat_targets[part],
            losses=flat_losses[part],
            dlogits=logits if x_gradient or weight_gradient else None,
            dloss=None if flat_dloss is None else flat_dloss[part],
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            vocab_size=vocab_size,
        )
        if x_gradient:
            torch.mm(logits, w, out=flat_dx[part])
        if weight_gradient:
            _add_product(total, logits.t(), chunk, first=start == 0)
    count = count_rows(flat_targets, ignore_index) if reduction == "mean" else None
    loss = losses if reduction == "none" else sum_losses(losses, count)
    return loss, losses.new_empty(0) if count is None else count, dx, total[:vocab_size]


def linear_cross_entropy_backward(
    gradient: Tensor, dloss: Tensor | None, count: Tensor, rows: int, dtype: torch.dtype
) -> Tensor:
    """gradient * dloss / count in `dtype`, with zeros below it up to `rows` rows."""
    y = torch.empty((rows, gradient.shape[-1]), dtype=dtype, device=gradient.device)
    launch(
        _scale,
        (triton.cdiv(y.numel(), BLOCK),),
        *(gradient, dloss, None if count.ndim else count, y, gradient.numel(), y.numel()),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return y


def examples() -> Iterator[Example]:
    """GPT-2's smallest, two chunks."""
    x, targets = meta(8192, 768), meta(8192, dtype=torch.int64)
    dw, scalar = meta(50257, 768, dtype=torch.float32), meta(dtype=torch.float32)
    yield Example(
        "forward",
        partial(
            linear_cross_entropy_forward,
            *(x, meta(50304, 768), targets, None, 4096, -100, 0.0, 0.0, "mean", 50257, True, True),
        ),
        {"_row": ("vector_load", "vector_store", "wide_rows")},
        every_chip=True,
    )
    yield Example(
        "backward",
        partial(linear_cross_entropy_backward, dw, scalar, scalar, 50304, torch.bfloat16),
        {"_scale": MEMORY_BOUND},
        every_chip=True,
    )
