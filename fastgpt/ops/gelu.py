"""GELU, and GELU fused with the bias addition or the whole linear layer before it.

    tanh form:  u = k (x + a x^3),  k = sqrt(2 / pi),  a = 0.044715        GPT-2's
                y = x (1 + tanh u) / 2
    erf form:   y = x (1 + erf(x / sqrt 2)) / 2                            approximate="none"

Backward, elementwise:

    tanh form:  y' = (1 + tanh u) / 2 + x (1 - tanh^2 u) k (1 + 3 a x^2) / 2
    erf form:   y' = (1 + erf(x / sqrt 2)) / 2 + x exp(-x^2 / 2) / sqrt(2 pi)
    dx = dy * y'

`bias_gelu` takes h = x + b for x:             dh = dy * y'(h), dx = dh, db = sum_rows dh          (C,)
`linear_gelu` takes h = x W^T + b, (rows, N):  dx = dh W, dW = dh^T x, db = sum_rows dh
with x (rows, K), W (N, K), b (N,). Only the pre-activation h (and x, W) is saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.checks import check_choice, check_floating, check_ndim, check_shape, last_dimension
from fastgpt.ops.library import (
    Kernels,
    Operator,
    add_native,
    add_triton,
    check_dtypes,
    product_operands,
)
from fastgpt.ops.registry import Cost, register, select

APPROXIMATE = ("tanh", "none")


def reference(x: Tensor, *, approximate: str = "tanh") -> Tensor:
    return F.gelu(x, approximate=approximate)


def bias_reference(x: Tensor, bias: Tensor, *, approximate: str = "tanh") -> Tensor:
    return reference(x + bias, approximate=approximate)


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh"
) -> Tensor:
    return reference(F.linear(x, weight, bias), approximate=approximate)


register("gelu", "eager", reference)
register("bias_gelu", "eager", bias_reference)
register("linear_gelu", "eager", linear_reference)


def _call(kernels: Kernels, x: Tensor, *, approximate: str = "tanh") -> Tensor:
    check_dtypes(x=x)
    return kernels.forward(x, approximate)


def _fake_forward(x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _gradients(kernels: Kernels, ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return kernels.backward(dy, *ctx.saved_tensors, ctx.approximate), None


def _bias_call(kernels: Kernels, x: Tensor, bias: Tensor, *, approximate: str = "tanh") -> Tensor:
    check_dtypes(x=x, bias=bias)
    return kernels.forward(x, bias, approximate)


def _bias_fake_forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, bias.dtype))


def _bias_fake_backward(dy: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _bias_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _bias_gradients(kernels: Kernels, ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    dx, db = kernels.backward(dy, *ctx.saved_tensors, ctx.approximate)
    return dx, db, None


def _linear_call(
    kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh"
) -> Tensor:
    x, weight, bias = product_operands(x, weight, bias)
    recorded = (t.requires_grad for t in (x, weight, bias) if t is not None)
    save = torch.is_grad_enabled() and any(recorded)
    return kernels.forward(x, weight, bias, approximate, save)[0]


def _linear_fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, save: bool
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else 0)


def _linear_fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    approximate: str,
    has_bias: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    dw = x.new_empty(weight.shape if need_dw else 0)
    return dx, dw, x.new_empty(weight.shape[0] * has_bias)


def _linear_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.approximate, _ = inputs
    _, h = output
    ctx.save_for_backward(x, weight, h)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # no zeros for h


def _linear_gradients(kernels: Kernels, ctx: Any, dy: Tensor, _: object) -> tuple[Tensor | None, ...]:
    need_dx, need_dw = ctx.needs_input_grad[:2]
    dx, dw, db = kernels.backward(dy, *ctx.saved_tensors, ctx.approximate, ctx.has_bias, need_dx, need_dw)
    return dx if need_dx else None, dw if need_dw else None, db if ctx.has_bias else None, None, None


GELU = Operator(
    name="gelu",
    call=_call,
    forward="(Tensor x, str approximate) -> Tensor y",
    fake_forward=_fake_forward,
    backward="(Tensor dy, Tensor x, str approximate) -> Tensor dx",
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
BIAS_GELU = Operator(
    name="bias_gelu",
    call=_bias_call,
    forward="(Tensor x, Tensor bias, str approximate) -> Tensor y",
    fake_forward=_bias_fake_forward,
    backward="(Tensor dy, Tensor x, Tensor bias, str approximate) -> (Tensor dx, Tensor db)",
    fake_backward=_bias_fake_backward,
    save=_bias_save,
    gradients=_bias_gradients,
)
LINEAR_GELU = Operator(
    name="linear_gelu",
    call=_linear_call,
    forward="(Tensor x, Tensor weight, Tensor? bias, str approximate, bool save) -> (Tensor y, Tensor h)",
    fake_forward=_linear_fake_forward,
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor h, str approximate, bool has_bias, bool need_dx, "
    "bool need_dw) -> (Tensor dx, Tensor dw, Tensor db)",
    fake_backward=_linear_fake_backward,
    save=_linear_save,
    gradients=_linear_gradients,
)
add_triton(GELU, "gelu")
add_triton(BIAS_GELU, "gelu")
add_triton(LINEAR_GELU, "linear_gelu")
add_native(GELU)
add_native(BIAS_GELU)
add_native(LINEAR_GELU)


def gelu(x: Tensor, *, approximate: str = "tanh", backend: str | None = None) -> Tensor:
    """Gaussian error linear unit, `x * P(N(0, 1) <= x)`, elementwise.

    Args:
        x: any shape, floating point.
        approximate: "tanh" (GPT-2's) or "none", the exact erf form.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        The shape and dtype of x.

    Raises:
        InputError: dtype not floating point, unknown `approximate`.

    Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415; equal to
    `torch.nn.functional.gelu`.
    """
    check_floating(x=x)
    check_choice("approximate", approximate, APPROXIMATE)
    return select("gelu", backend, x)(x, approximate=approximate)


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "tanh", backend: str | None = None) -> Tensor:
    """`gelu(x + bias)` in one pass.

    Args:
        x: (..., C), floating point.
        bias: (C,).
        approximate, backend: as in `gelu`.

    Returns:
        (..., C).

    Raises:
        InputError: dtype not floating point, shapes that do not fit, tensors on different devices, unknown
            `approximate`.
    """
    check_floating(x=x, bias=bias)
    check_shape("bias", bias, (last_dimension("x", x),), "the last dimension of x")
    check_choice("approximate", approximate, APPROXIMATE)
    return select("bias_gelu", backend, x)(x, bias, approximate=approximate)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """`gelu(x @ weight.T + bias)`, with the bias and GELU in the matrix product's epilogue.

    Args:
        x: (..., K), floating point.
        weight: (N, K), as in `torch.nn.Linear`.
        bias: (N,) or None.
        approximate, backend: as in `gelu`.

    Returns:
        (..., N).

    Raises:
        InputError: as `bias_gelu`.
    """
    check_floating(x=x, weight=weight, bias=bias)
    check_ndim("weight", weight, 2, "(N, K)")
    check_shape("weight", weight, (weight.shape[0], last_dimension("x", x)), "(N, K) for x (..., K)")
    check_shape("bias", bias, (weight.shape[0],), "(N,) for weight (N, K)")
    check_choice("approximate", approximate, APPROXIMATE)
    return select("linear_gelu", backend, x)(x, weight, bias, approximate=approximate)


def _flops(approximate: str, backward: bool) -> int:
    """Arithmetic per element as the equations above are best factored; tanh, erf and exp count as one."""
    if approximate == "tanh":  # u: 4, tanh: 1, y: 3; y' reuses u, tanh and x^2
        return 16 if backward else 8
    return 11 if backward else 5


def cost(elements: int, dtype: torch.dtype, *, approximate: str = "tanh", backward: bool = False) -> Cost:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    passes = 3 if backward else 2
    return Cost(_flops(approximate, backward) * elements, passes * elements * dtype.itemsize)


def bias_cost(
    rows: int, width: int, dtype: torch.dtype, *, approximate: str = "tanh", backward: bool = False
) -> Cost:
    """The traffic of `gelu`, bias and db being small; one addition more forward, two backward (h and db)."""
    elements = rows * width
    additions = Cost((2 if backward else 1) * elements, 0)
    return cost(elements, dtype, approximate=approximate, backward=backward) + additions


def linear_cost(
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    *,
    approximate: str = "tanh",
    backward: bool = False,
) -> Cost:
    """One matrix product forward (2 rows K N flops), two backward (dx and dW), and `bias_gelu`'s arithmetic.

    Forward reads x and W and writes y and the saved h; backward reads dy, h, x and W and writes dx and dW.
    """
    inputs = rows * in_features + out_features * in_features
    outputs = rows * out_features
    product = 2 * rows * in_features * out_features
    flops = (2 if backward else 1) * product
    elementwise = bias_cost(rows, out_features, dtype, approximate=approximate, backward=backward).flops
    moved = 2 * outputs + (2 if backward else 1) * inputs
    return Cost(flops + elementwise, moved * dtype.itemsize)
