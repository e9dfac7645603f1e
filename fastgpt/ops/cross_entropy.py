"""Cross-entropy from logits, with padded vocabulary columns, ignored rows, label smoothing and z-loss.

For each row n of logits l (rows, V), with target y, S = vocab_size and e = label_smoothing:

    lse = log sum_{c < S} exp l_c
    loss = (1 - e) (lse - l_y) + e (lse - sum_{c < S} l_c / S) + z_loss * lse^2       0 where y = ignore_index
    mean = sum_n loss / (rows not ignored), NaN when there are none

Backward, for a row that is not ignored, with g = dloss (divided by the count for the mean) and c < S:

    p_c = exp(l_c - lse)
    dl_c = g (p_c (1 + 2 z_loss lse) - (1 - e) [c = y] - e / S)

and dl is exactly 0 in ignored rows and in columns c >= S, whatever those columns hold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.ops.checks import (
    check_at_least,
    check_choice,
    check_floating,
    check_indices,
    check_shape,
    last_dimension,
    out_of_range,
)
from fastgpt.ops.library import Kernels, Operator, add_native, add_triton, check_dtypes
from fastgpt.ops.registry import Cost, register, select


def reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    if vocab_size is not None and vocab_size < logits.shape[-1]:
        logits = logits[..., :vocab_size]  # a view; its gradient is zero in the columns left out
    if logits.dtype != torch.float64:
        logits = logits.float()
    rows = logits.reshape(-1, logits.shape[-1])  # (rows, S)
    flat = targets.reshape(-1)  # (rows,)
    loss = F.cross_entropy(
        rows, flat, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss:
        counted = flat != ignore_index
        penalty = z_loss * rows.logsumexp(-1).square().masked_fill(~counted, 0.0)  # (rows,)
        if reduction != "none":
            penalty = penalty.sum()
        if reduction == "mean":
            penalty = penalty / counted.sum()
        loss = loss + penalty
    return loss.view(targets.shape) if reduction == "none" else loss


register("cross_entropy", "eager", reference)


def _call(
    kernels: Kernels,
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    check_dtypes(logits=logits)
    size = logits.shape[-1] if vocab_size is None else vocab_size
    # A traced backward may not write into what forward made: there, it computes the gradient.
    now = torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling()
    return kernels.forward(logits, targets, ignore_index, label_smoothing, z_loss, reduction, size, now)[0]


def _fake_forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    vocab_size: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32)
    count = loss.new_empty(() if reduction == "mean" else 0)
    return loss, count, logits.new_empty(logits.shape if with_gradient else 0)


def _fake_backward(dlogits: Tensor, *_: object) -> None:
    pass


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *ctx.options, _, ctx.vocab_size, with_gradient = inputs
    _, count, dlogits = output
    ctx.save_for_backward(logits, targets, count)
    # Handed out once, to the first backward, which may write into it; a second one allocates its own. A
    # tracer's stand-in for a tensor is of another type, and not to be written into.
    ctx.dlogits = [dlogits] if with_gradient and type(dlogits) is Tensor else []
    ctx.mark_non_differentiable(count, dlogits)
    ctx.set_materialize_grads(False)  # no zeros for the gradients of dlogits


def _gradients(kernels: Kernels, ctx: Any, dloss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 8
    logits, targets, count = ctx.saved_tensors
    filled = bool(ctx.dlogits)
    dlogits = ctx.dlogits.pop() if filled else logits.new_empty(logits.shape)
    kernels.backward(dlogits, dloss, logits, targets, count, *ctx.options, ctx.vocab_size, filled)
    return dlogits, *(None,) * 7


CROSS_ENTROPY = Operator(
    name="cross_entropy",
    call=_call,
    forward="(Tensor logits, Tensor targets, int ignore_index, float label_smoothing, float z_loss, "
    "str reduction, SymInt vocab_size, bool with_gradient) -> (Tensor loss, Tensor count, Tensor dlogits)",
    fake_forward=_fake_forward,
    backward="(Tensor(a!) dlogits, Tensor dloss, Tensor logits, Tensor targets, Tensor count, "
    "int ignore_index, float label_smoothing, float z_loss, SymInt vocab_size, bool filled) -> ()",
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
add_triton(CROSS_ENTROPY, "cross_entropy")
add_native(CROSS_ENTROPY)


def check_options(
    width: int, label_smoothing: float, z_loss: float, reduction: str, vocab_size: int | None
) -> int:
    """Check the options of both losses for logits (..., width); returns the number of columns that count."""
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing is {label_smoothing}: it must be from 0 to 1")
    check_at_least("z_loss", z_loss, 0)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if vocab_size is None:
        vocab_size = width
    if not 1 <= vocab_size <= width:
        raise InputError(f"vocab_size is {vocab_size}: it must be from 1 to {width}, the columns there are")
    return vocab_size


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Negative log-likelihood of the targets under softmax(logits), in fp32 whatever the dtype of the logits.

    Args:
        logits: (..., V), floating point.
        targets: (...), int64: 0..vocab_size-1, or ignore_index.
        ignore_index: rows with this target count for nothing.
        label_smoothing: share of the target spread evenly over the vocabulary, 0 to 1.
        z_loss: adds z_loss * logsumexp(logits)^2 to each row that counts.
        reduction: "mean" over the rows that count (NaN when there are none), "sum", or "none".
        vocab_size: columns from here on are padding: no probability, no gradient, no part in label smoothing,
            whatever they hold. None is V.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        A scalar, or (...) for "none" with 0 at ignored rows: float64 for float64 logits, else float32.

    Raises:
        InputError: wrong dtypes, shapes that do not fit, tensors on different devices, an option out of
            range; a target out of range on a CPU. On CUDA such a target is a device-side assertion, as in
            PyTorch, with eager, and a NaN loss with kernels, which never read it.

    Source: equal to `torch.nn.functional.cross_entropy` on `logits[..., :vocab_size].float()` where that has
    the option; z-loss from Chowdhery et al., "PaLM", arXiv 2204.02311.
    """
    check_floating(logits=logits)
    check_indices("targets", targets, "logits", logits)
    width = last_dimension("logits", logits)
    check_shape("targets", targets, logits.shape[:-1], "the shape of logits less the vocabulary")
    size = check_options(width, label_smoothing, z_loss, reduction, vocab_size)
    try:
        return select("cross_entropy", backend, logits)(
            logits,
            targets,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            vocab_size=vocab_size,
        )
    except IndexError as error:
        raise out_of_range("targets", targets, size, also=ignore_index) from error


def cost(rows: int, vocab_size: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Forward reads the logits and targets (int64) and writes one loss (fp32) a row; backward reads logits
    again, targets and lse (fp32) and writes the gradient. An implementation that writes the gradient in the
    forward pass moves the backward's bytes then, and nothing afterwards.

    Flops per logit: forward maximum, difference, exponential, sum; backward difference, exponential, product
    with the row's factor.
    """
    elements = rows * vocab_size
    flops, passes = (3, 2) if backward else (4, 1)
    return Cost(flops * elements, passes * elements * dtype.itemsize + 12 * rows)
