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

import torch
import torch.nn.functional as F
from torch import Tensor

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

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450; equal to `torch.nn.functional.layer_norm`.
    """
    return select("layer_norm", backend, x.device)(x, weight, bias, eps=eps)


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
    """
    return select("add_layer_norm", backend, x.device)(x, residual, weight, bias, eps=eps)


def cost(rows: int, width: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx. Weights and statistics are small."""
    elements = rows * width
    per_element = (13, 3) if backward else (8, 2)
    return Cost(per_element[0] * elements, per_element[1] * elements * dtype.itemsize)
