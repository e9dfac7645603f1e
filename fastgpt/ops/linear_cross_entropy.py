"""The classifier's matrix product and the cross-entropy after it, as one operation.

    l = x W^T                     (rows, V), x (rows, C), W (V, C)
    loss = cross_entropy(l)       with all its options: see cross_entropy.py

Backward, with dl from there:

    dx = dl W                     (rows, C)
    dW = dl^T x                   (V, C), zero in rows from vocab_size on

An implementation may work on `chunk_rows` rows at a time, compute dl as soon as a chunk's logits are there,
and so never hold all the logits: at 32768 rows of 50304 columns they are 3.3 GB in bf16 and 6.6 GB in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.checks import (
    check_at_least,
    check_floating,
    check_indices,
    check_ndim,
    check_shape,
    last_dimension,
    out_of_range,
)
from fastgpt.ops.cross_entropy import check_options
from fastgpt.ops.cross_entropy import cost as cross_entropy_cost
from fastgpt.ops.cross_entropy import reference as cross_entropy_reference
from fastgpt.ops.registry import Cost, register, select


def reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_rows: int = 4096,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """The plain composition: it holds all the logits, whatever `chunk_rows` is."""
    return cross_entropy_reference(
        F.linear(x, weight),  # (..., V)
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        vocab_size=vocab_size,
    )


register("linear_cross_entropy", "eager", reference)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_rows: int = 4096,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy(x @ weight.T, targets)`, by implementations that need not hold all the logits.

    Args:
        x: (..., C), floating point.
        weight: (V, C).
        targets: (...), int64: 0..vocab_size-1, or ignore_index.
        chunk_rows: how many rows' logits an implementation may hold at a time, at least 1.
        ignore_index, label_smoothing, z_loss, reduction, vocab_size, backend: as in `cross_entropy`.

    Returns:
        As `cross_entropy`.

    Raises:
        InputError: as `cross_entropy`, and for chunk_rows less than 1.
    """
    check_floating(x=x, weight=weight)
    check_indices("targets", targets, "x", x)
    check_ndim("weight", weight, 2, "(V, C)")
    width = weight.shape[0]
    check_shape("weight", weight, (width, last_dimension("x", x)), "(V, C) for x (..., C)")
    check_shape("targets", targets, x.shape[:-1], "the shape of x less its last dimension")
    check_at_least("chunk_rows", chunk_rows, 1)
    size = check_options(width, label_smoothing, z_loss, reduction, vocab_size)
    try:
        return select("linear_cross_entropy", backend, x.device)(
            x,
            weight,
            targets,
            chunk_rows=chunk_rows,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            vocab_size=vocab_size,
        )
    except IndexError as error:
        raise out_of_range("targets", targets, size, also=ignore_index) from error


def cost(rows: int, width: int, vocab_size: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """One matrix product forward (2 rows C V flops), two backward, and the arithmetic of `cross_entropy`.

    Forward reads x, W and the targets and writes the losses; backward reads x, W, targets and lse and writes
    dx and dW. The logits need never reach memory; an implementation that computes them again in backward,
    instead of the gradient in forward, does 2 rows C V flops more than is counted here.
    """
    inputs = rows * width + vocab_size * width
    times = 2 if backward else 1
    loss = cross_entropy_cost(rows, vocab_size, dtype, backward=backward)
    return Cost(
        times * 2 * rows * width * vocab_size + loss.flops, times * inputs * dtype.itemsize + 12 * rows
    )
