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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.errors import InputError
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
from fastgpt.ops.library import Kernels, Operator, add_native, add_triton, check_dtypes
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


def _call(
    kernels: Kernels,
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
    check_dtypes(x=x, weight=weight)
    if torch.is_autocast_enabled(x.device.type):  # as it does for F.linear
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise InputError(f"weight has dtype {weight.dtype}: it must be {x.dtype}, the dtype of x")
    # With "none" the gradient of weight needs each row's dloss before the sum over rows: it is for backward.
    now = torch.is_grad_enabled() and reduction != "none"
    return kernels.forward(
        x,
        weight,
        targets,
        None,
        chunk_rows,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        weight.shape[0] if vocab_size is None else vocab_size,
        now and x.requires_grad,
        now and weight.requires_grad,
    )[0]


def _fake_forward(
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
) -> tuple[Tensor, ...]:
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32)
    count = loss.new_empty(() if reduction == "mean" else 0)
    dx = x.new_empty(x.shape if x_gradient else 0)
    return loss, count, dx, loss.new_empty(vocab_size if weight_gradient else 0, x.shape[-1])


def _fake_backward(
    gradient: Tensor, dloss: Tensor | None, count: Tensor, rows: int, dtype: torch.dtype
) -> Tensor:
    return gradient.new_empty(rows, gradient.shape[-1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, targets, _, *ctx.options, ctx.reduction, ctx.vocab_size, _, _ = inputs
    _, count, dx, dw = output
    ctx.save_for_backward(*((x, weight, targets) if ctx.reduction == "none" else (count, dx, dw)))
    ctx.like_x, ctx.like_weight = (x.shape, x.dtype), (weight.shape[0], weight.dtype)
    ctx.mark_non_differentiable(count, dx, dw)
    ctx.set_materialize_grads(False)


def _gradients(kernels: Kernels, ctx: Any, dloss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 12
    for_x, for_weight, *_ = ctx.needs_input_grad
    scale: Tensor | None = dloss
    if ctx.reduction == "none":
        x, weight, targets = ctx.saved_tensors
        wanted = ctx.vocab_size, for_x, for_weight
        _, count, dx, dw = kernels.forward(x, weight, targets, dloss, *ctx.options, "none", *wanted)
        scale = None  # it is in them
    else:
        count, dx, dw = ctx.saved_tensors
    shape, dtype = ctx.like_x
    if for_x and scale is not None:
        dx = kernels.backward(dx.view(-1, shape[-1]), scale, count, shape[:-1].numel(), dtype).view(shape)
    if for_weight:
        dw = kernels.backward(dw, scale, count, *ctx.like_weight)
    return dx if for_x else None, dw if for_weight else None, *(None,) * 10


LINEAR_CROSS_ENTROPY = Operator(
    name="linear_cross_entropy",
    call=_call,
    forward="(Tensor x, Tensor weight, Tensor targets, Tensor? dloss, SymInt chunk_rows, int ignore_index, "
    "float label_smoothing, float z_loss, str reduction, SymInt vocab_size, bool x_gradient, "
    "bool weight_gradient) -> (Tensor loss, Tensor count, Tensor dx, Tensor dw)",
    fake_forward=_fake_forward,
    backward="(Tensor gradient, Tensor? dloss, Tensor count, SymInt rows, ScalarType dtype) -> Tensor scaled",
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
add_triton(LINEAR_CROSS_ENTROPY, "linear_cross_entropy")
add_native(LINEAR_CROSS_ENTROPY)


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
        return select("linear_cross_entropy", backend, x)(
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
