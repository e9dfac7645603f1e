"""Token embedding plus position embedding.

    y_btc = Wt[idx_bt, c] + Wp[start + t, c]          (B, T, C), Wt (V, C), Wp (block, C)

Backward:

    dWt[n, c] = sum over (b, t) with idx_bt = n of dy_btc           (V, C)
    dWp[start + t, c] = sum_b dy_btc, and 0 in the other rows       (block, C)
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
    out_of_range,
)
from fastgpt.ops.library import Kernels, Operator, add_native, add_triton, check_dtypes
from fastgpt.ops.registry import Cost, register, select


def reference(idx: Tensor, token_weight: Tensor, position_weight: Tensor, *, start: int = 0) -> Tensor:
    return (
        F.embedding(idx, token_weight) + position_weight[start : start + idx.shape[1]]
    )  # (B, T, C) + (T, C)


register("embedding", "eager", reference)


def _call(
    kernels: Kernels, idx: Tensor, token_weight: Tensor, position_weight: Tensor, *, start: int = 0
) -> Tensor:
    check_dtypes(token_weight=token_weight, position_weight=position_weight)
    return kernels.forward(idx, token_weight, position_weight, start)


def _fake_forward(idx: Tensor, token_weight: Tensor, position_weight: Tensor, start: int) -> Tensor:
    dtype = torch.promote_types(token_weight.dtype, position_weight.dtype)
    return token_weight.new_empty((*idx.shape, token_weight.shape[1]), dtype=dtype)


def _fake_backward(
    dy: Tensor,
    idx: Tensor,
    vocab_size: int,
    block_size: int,
    start: int,
    token_dtype: torch.dtype,
    position_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    width = dy.shape[-1]
    dwt = dy.new_empty((vocab_size, width), dtype=token_dtype)
    return dwt, dy.new_empty((block_size, width), dtype=position_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    idx, token_weight, position_weight, start = inputs
    ctx.save_for_backward(idx)
    ctx.sizes = token_weight.shape[0], position_weight.shape[0], start
    ctx.dtypes = token_weight.dtype, position_weight.dtype


def _gradients(kernels: Kernels, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dwt, dwp = kernels.backward(dy, *ctx.saved_tensors, *ctx.sizes, *ctx.dtypes)
    return None, dwt, dwp, None


EMBEDDING = Operator(
    name="embedding",
    forward="(Tensor idx, Tensor token_weight, Tensor position_weight, SymInt start) -> Tensor",
    backward="(Tensor dy, Tensor idx, SymInt vocab_size, SymInt block_size, SymInt start, "
    "ScalarType token_dtype, ScalarType position_dtype) -> (Tensor dwt, Tensor dwp)",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
    call=_call,
)
add_triton(EMBEDDING, "embedding")
add_native(EMBEDDING)


def embedding(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    *,
    start: int = 0,
    backend: str | None = None,
) -> Tensor:
    """`token_weight[idx] + position_weight[start : start + T]`.

    Args:
        idx: (B, T), int64, values in 0..V-1.
        token_weight: (V, C), floating point.
        position_weight: (block, C), floating point.
        start: position of the first column of idx; not 0 when decoding against a cache.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        (B, T, C).

    Raises:
        InputError: wrong dtypes, shapes that do not fit, tensors on different devices, positions beyond the
            table; an index out of range on a CPU. On CUDA, where nobody waits to look, `eager` is stopped
            by PyTorch's device-side assertion, and `triton` gives NaN for that token.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).
    """
    check_floating(token_weight=token_weight, position_weight=position_weight)
    check_indices("idx", idx, "token_weight", token_weight)
    check_ndim("idx", idx, 2, "(B, T)")
    check_ndim("token_weight", token_weight, 2, "(V, C)")
    check_ndim("position_weight", position_weight, 2, "(block, C)")
    block = position_weight.shape[0]
    check_shape("position_weight", position_weight, (block, token_weight.shape[1]), "(block, C)")
    check_at_least("start", start, 0)
    if start + idx.shape[1] > block:
        raise InputError(
            f"idx has {idx.shape[1]} positions from start = {start}: position_weight has only {block}"
        )
    try:
        elements = idx.numel() * token_weight.shape[1]
        function = select("embedding", backend, token_weight, elements=elements)
        return function(idx, token_weight, position_weight, start=start)
    except IndexError as error:
        raise out_of_range("idx", idx, token_weight.shape[0]) from error


def cost(
    batch: int,
    length: int,
    width: int,
    dtype: torch.dtype,
    *,
    vocab_size: int,
    block_size: int,
    backward: bool = False,
) -> Cost:
    """Forward reads idx, one token row for each and every position row once, and writes y.

    Backward reads idx and dy and writes both gradients, which are as large as their tables.
    """
    elements = batch * length * width
    if backward:
        moved = elements + (vocab_size + block_size) * width
        return Cost(2 * elements, moved * dtype.itemsize + 8 * batch * length)
    moved = 2 * elements + length * width
    return Cost(elements, moved * dtype.itemsize + 8 * batch * length)
