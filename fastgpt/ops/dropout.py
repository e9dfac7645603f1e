"""Dropout fused with the residual addition after it.

    y = z * x + residual          z = 0 with probability p, else 1 / (1 - p), elementwise; z = 1 in evaluation

Backward:

    dx = z * dy,  dresidual = dy
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.checks import check_dropout, check_floating, check_shape
from fastgpt.ops.library import Kernels, Operator, add_native, add_triton, check_dtypes
from fastgpt.ops.registry import Cost, register, select


def reference(x: Tensor, residual: Tensor, *, p: float, training: bool = True) -> Tensor:
    return F.dropout(x, p, training) + residual


register("dropout_add", "eager", reference)


def _call(kernels: Kernels, x: Tensor, residual: Tensor, *, p: float, training: bool = True) -> Tensor:
    check_dtypes(x=x, residual=residual)
    if p == 0 or not training:
        return x + residual
    # From PyTorch's generator and on the device, where a CUDA graph advances it at each replay.
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=x.device)
    return kernels.forward(x, residual, seed, p)


def _fake_forward(x: Tensor, residual: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _fake_backward(dy: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return dy.new_empty(dy.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, seed, ctx.p = inputs
    ctx.save_for_backward(seed)
    ctx.dtypes = x.dtype, residual.dtype


def _gradients(kernels: Kernels, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x_dtype, residual_dtype = ctx.dtypes
    return kernels.backward(dy, *ctx.saved_tensors, ctx.p, x_dtype), dy.to(residual_dtype), None, None


DROPOUT_ADD = Operator(
    name="dropout_add",
    forward="(Tensor x, Tensor residual, Tensor seed, float p) -> Tensor",
    backward="(Tensor dy, Tensor seed, float p, ScalarType dtype) -> Tensor",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
    call=_call,
)
add_triton(DROPOUT_ADD, "dropout")
add_native(DROPOUT_ADD)


def dropout_add(
    x: Tensor, residual: Tensor, *, p: float, training: bool = True, backend: str | None = None
) -> Tensor:
    """`dropout(x, p) + residual` in one pass.

    Args:
        x: any shape, floating point.
        residual: the shape of x.
        p: probability of dropping an element of x, 0 <= p < 1; the others are scaled by 1 / (1 - p).
        training: False adds x as it is.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        The shape of x.

    Raises:
        InputError: dtype not floating point, shapes that differ, tensors on different devices, p out of
            range.

    Source: Srivastava et al., "Dropout", JMLR 15, 2014. The random numbers, though not their law, depend on
    the implementation; `torch.manual_seed` makes them repeatable.
    """
    check_floating(x=x, residual=residual)
    check_shape("residual", residual, x.shape, "the shape of x")
    check_dropout("p", p)
    return select("dropout_add", backend, x)(x, residual, p=p, training=training)


def cost(elements: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Forward reads x and residual and writes y; backward reads dy and writes dx, dresidual being dy itself.

    Flops are the scaling and the addition; random numbers are not counted, and no mask is stored.
    """
    flops, passes = (1, 2) if backward else (2, 3)
    return Cost(flops * elements, passes * elements * dtype.itemsize)
