"""LayerNorm, and LayerNorm fused with the residual addition before it.

    mean = sum_c x / C                     (rows,)
    var  = sum_c (x - mean)^2 / C          (rows,)    biased, as in PyTorch
    rstd = 1 / sqrt(var + eps)             (rows,)
    xhat = (x - mean) * rstd               (rows, C)
    y    = xhat * w + b                    (rows, C)

Backward, with g = dy * w:

    dx = rstd * (g - sum_c g / C - xhat * sum_c (g * xhat) / C)
    dw = sum_rows dy * xhat                (C,)
    db = sum_rows dy                       (C,)

`add_layer_norm` takes x + residual for x, and returns that sum too; its gradient is dx plus the gradient of
the returned sum, for both addends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.checks import check_floating, check_shape, last_dimension
from fastgpt.ops.library import Kernels, Operator, add_native, add_triton, check_dtypes
from fastgpt.ops.registry import Cost, register, select


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return reference(summed, weight, bias, eps=eps), summed


register("layer_norm", "eager", reference)
register("add_layer_norm", "eager", add_reference)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    statistic = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)  # y, mean, rstd


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0] * has_bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)


def _gradients(kernels: Kernels, ctx: Any, dy: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    dx, dw, db = kernels.backward(dy, *ctx.saved_tensors, ctx.has_bias)
    return dx, dw, db if ctx.has_bias else None, None


def _call(
    kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    check_dtypes(x=x, weight=weight, bias=bias)
    return kernels.forward(x, weight, bias, eps)[0]


def _add_fake_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, mean, rstd = _fake_forward(summed, weight, bias, eps)
    return y, summed, mean, rstd


def _add_fake_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, ...]:
    return _fake_backward(dy, summed, weight, mean, rstd, has_bias)


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, _ = inputs
    _, summed, mean, rstd = output
    ctx.save_for_backward(summed, weight, mean, rstd)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # an output that nothing uses costs no pass over zeros


def _add_gradients(
    kernels: Kernels, ctx: Any, dy: Tensor | None, dsummed: Tensor | None, *_: object
) -> tuple[Tensor | None, ...]:
    if dy is None:  # only the sum was used
        return dsummed, dsummed, None, None, None
    dx, dw, db = kernels.backward(dy, dsummed, *ctx.saved_tensors, ctx.has_bias)
    return dx, dx, dw, db if ctx.has_bias else None, None


def _add_call(
    kernels: Kernels,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    check_dtypes(x=x, residual=residual, weight=weight, bias=bias)
    y, summed, _, _ = kernels.forward(x, residual, weight, bias, eps)
    return y, summed


LAYER_NORM = Operator(
    name="layer_norm",
    forward="(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool has_bias) "
    "-> (Tensor dx, Tensor dw, Tensor db)",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
    call=_call,
)
ADD_LAYER_NORM = Operator(
    name="add_layer_norm",
    forward="(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) "
    "-> (Tensor y, Tensor summed, Tensor mean, Tensor rstd)",
    backward="(Tensor dy, Tensor? dsummed, Tensor summed, Tensor weight, Tensor mean, Tensor rstd, "
    "bool has_bias) -> (Tensor dx, Tensor dw, Tensor db)",
    fake_forward=_add_fake_forward,
    fake_backward=_add_fake_backward,
    save=_add_save,
    gradients=_add_gradients,
    call=_add_call,
)
add_triton(LAYER_NORM, "layer_norm")
add_triton(ADD_LAYER_NORM, "layer_norm")
add_native(LAYER_NORM)
add_native(ADD_LAYER_NORM)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """Normalise the last dimension: `(x - mean) / sqrt(var + eps) * weight + bias`.

    Args:
        x: (..., C), floating point.
        weight: (C,).
        bias: (C,) or None.
        eps: added to the variance.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        (..., C).

    Raises:
        InputError: dtype not floating point, shapes that do not fit, tensors on different devices.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450; equal to
    `torch.nn.functional.layer_norm`.
    """
    _check(x, weight, bias)
    return select("layer_norm", backend, x)(x, weight, bias, eps=eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`summed = x + residual; return layer_norm(summed), summed`, in one pass.

    Args:
        x, residual: (..., C), floating point.
        weight, bias, eps, backend: as in `layer_norm`.

    Returns:
        (normalised, summed), each (..., C).

    Raises:
        InputError: as `layer_norm`.
    """
    check_floating(x=x, residual=residual)
    check_shape("residual", residual, x.shape, "the shape of x")
    _check(x, weight, bias)
    return select("add_layer_norm", backend, x)(x, residual, weight, bias, eps=eps)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(x=x, weight=weight, bias=bias)
    width = (last_dimension("x", x),)
    check_shape("weight", weight, width, "the last dimension of x")
    check_shape("bias", bias, width, "the last dimension of x")


def cost(rows: int, width: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx. Weights and statistics are small.

    Flops per element: forward sum, difference, square, sum, two for xhat (the difference again, rstd), w, b;
    backward xhat (2), dw (2), db (1), g (1), the row's two sums (3), dx (4).
    """
    elements = rows * width
    flops, passes = (13, 3) if backward else (8, 2)
    return Cost(flops * elements, passes * elements * dtype.itemsize)


def add_cost(rows: int, width: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Forward reads x and residual and writes y and their sum; backward reads the sum, dy and the gradient of
    the sum, and writes the one gradient both addends share. One addition more than `layer_norm` each way.
    """
    elements = rows * width
    addition = Cost(elements, (1 if backward else 2) * elements * dtype.itemsize)
    return cost(rows, width, dtype, backward=backward) + addition
