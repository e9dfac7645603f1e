"""The linear layer.

    y = x W^T + b        x (rows, K), W (N, K), b (N,), y (rows, N)

Backward:  dx = dy W,  dW = dy^T x,  db = sum_rows dy

The products are the libraries' own (cuBLAS, oneDNN, MKL). The native kernel chooses between them on a CPU
(csrc/cpu/product.cpp) and takes the whole layer, with its derivative, in one operator each way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.checks import check_floating, check_ndim, check_shape, last_dimension
from fastgpt.ops.library import Kernels, Operator, add_native, product_operands
from fastgpt.ops.registry import Cost, register, select


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


register("linear", "eager", reference)


def _call(kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return kernels.forward(*product_operands(x, weight, bias))


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    dw = x.new_empty(weight.shape if need_dw else 0)
    return dx, dw, x.new_empty(weight.shape[0] * need_db)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(kernels: Kernels, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    found = kernels.backward(dy, *ctx.saved_tensors, *needed)
    return tuple(gradient if need else None for gradient, need in zip(found, needed, strict=True))


LINEAR = Operator(
    name="linear",
    call=_call,
    forward="(Tensor x, Tensor weight, Tensor? bias) -> Tensor y",
    fake_forward=_fake_forward,
    backward="(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dw, bool need_db) -> (Tensor dx, "
    "Tensor dw, Tensor db)",
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
add_native(LINEAR)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: (..., K), floating point.
        weight: (N, K), as in `torch.nn.Linear`.
        bias: (N,) or None.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        (..., N).

    Raises:
        InputError: dtype not floating point, shapes that do not fit, tensors on different devices.
    """
    check_floating(x=x, weight=weight, bias=bias)
    check_ndim("weight", weight, 2, "(N, K)")
    check_shape("weight", weight, (weight.shape[0], last_dimension("x", x)), "(N, K) for x (..., K)")
    check_shape("bias", bias, (weight.shape[0],), "(N,) for weight (N, K)")
    return select("linear", backend, x)(x, weight, bias)


def cost(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, *, backward: bool = False
) -> Cost:
    """2 rows K N flops, with x, W and y moved once; backward two such products, of which dx and dW come."""
    product = 2 * rows * in_features * out_features
    inputs, outputs = rows * in_features + out_features * in_features, rows * out_features
    if backward:
        return Cost(2 * product, (2 * inputs + outputs) * dtype.itemsize)
    return Cost(product, (inputs + outputs) * dtype.itemsize)
