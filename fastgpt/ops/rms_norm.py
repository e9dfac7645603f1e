"""RMSNorm: LayerNorm without the mean and the bias.

    rstd = 1 / sqrt(sum_c x^2 / C + eps)   (rows,)
    xhat = x * rstd                        (rows, C)
    y    = xhat * w                        (rows, C)

Backward, with g = dy * w:

    dx = rstd * (g - xhat * sum_c (g * xhat) / C)
    dw = sum_rows dy * xhat                (C,)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.checks import check_floating, check_shape, last_dimension
from fastgpt.ops.library import Kernels, Operator, add_native, add_triton, check_dtypes
from fastgpt.ops.registry import Cost, register, select


def reference(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


register("rms_norm", "eager", reference)


def _call(kernels: Kernels, x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    check_dtypes(x=x, weight=weight)
    return kernels.forward(x, weight, eps)[0]


def _fake_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)


def _gradients(kernels: Kernels, ctx: Any, dy: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    return *kernels.backward(dy, *ctx.saved_tensors), None


RMS_NORM = Operator(
    name="rms_norm",
    call=_call,
    forward="(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    fake_forward=_fake_forward,
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dw)",
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
add_triton(RMS_NORM, "rms_norm")
add_native(RMS_NORM)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Scale the last dimension to unit root mean square: `x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: (..., C), floating point.
        weight: (C,).
        eps: added to the mean square.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        (..., C).

    Raises:
        InputError: dtype not floating point, shapes that do not fit, tensors on different devices.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467; equal to
    `torch.nn.functional.rms_norm`.
    """
    check_floating(x=x, weight=weight)
    check_shape("weight", weight, (last_dimension("x", x),), "the last dimension of x")
    return select("rms_norm", backend, x)(x, weight, eps=eps)


def cost(rows: int, width: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx. Weights and rstd are small.

    Flops per element: forward square, sum, two products; backward dy*w, two for xhat and dw's product, sum of
    dw, two for the row's sum, three for dx.
    """
    elements = rows * width
    flops, passes = (9, 3) if backward else (4, 2)
    return Cost(flops * elements, passes * elements * dtype.itemsize)
