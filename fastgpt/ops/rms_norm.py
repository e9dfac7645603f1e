"""RMSNorm: LayerNorm without the mean and the bias.

    rstd = 1 / sqrt(sum_c x^2 / C + eps)   (rows,)
    xhat = x * rstd                        (rows, C)
    y    = xhat * w                        (rows, C)

Backward, with g = dy * w:

    dx = rstd * (g - xhat * sum_c (g * xhat) / C)
    dw = sum_rows dy * xhat                (C,)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.checks import check_floating, check_shape, last_dimension
from fastgpt.ops.registry import Cost, register, select


def reference(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


register("rms_norm", "eager", reference)


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
    return select("rms_norm", backend, x.device)(x, weight, eps=eps)


def cost(rows: int, width: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx. Weights and rstd are small.

    Flops per element: forward square, sum, two products; backward dy*w, two for xhat and dw's product, sum of
    dw, two for the row's sum, three for dx.
    """
    elements = rows * width
    flops, passes = (9, 3) if backward else (4, 2)
    return Cost(flops * elements, passes * elements * dtype.itemsize)
