"""Attention of one query to the first n positions of a cache, n being known to the device alone.

For each batch and head, with q (1, D), k and v (S, D):

    s_j = scale * sum_d q_d k_jd            j < n, else -inf       (S,)
    p_j = exp(s_j) / sum_j exp(s_j)
    o_d = sum_{j < n} p_j v_jd              whatever v_jd is where p_j is 0

`causal_attention` on k[:, :n] and v[:, :n] is the same, where n is a number of the host: the shapes, and with
them what is launched, then change with every token. Here they do not, so that a CUDA graph can be replayed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.ops.attention import WIDEST_HEAD, operands
from fastgpt.ops.checks import check_floating, check_ndim, check_shape
from fastgpt.ops.library import Kernels, Operator, add_triton
from fastgpt.ops.registry import Cost, register, select


def reference(q: Tensor, k: Tensor, v: Tensor, length: Tensor, *, scale: float | None = None) -> Tensor:
    seen = torch.arange(k.shape[1], device=k.device) < length  # (S,)
    # What is not seen may be NaN, which a weight of 0 would not keep out.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, 1 or S, D)
    k, v = (x.masked_fill(~seen[:, None], 0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None], scale=scale).transpose(1, 2)


register("decode_attention", "eager", reference)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float | None) -> Tensor:
    return q.new_empty(q.shape)


def _call(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, length: Tensor, *, scale: float | None = None
) -> Tensor:
    q, keys, values, scale = operands(q, k, v, scale)
    return kernels.forward(q, keys, values, length, scale)


DECODE_ATTENTION = Operator(
    name="decode_attention",
    forward="(Tensor q, Tensor k, Tensor v, Tensor length, float? scale) -> Tensor o",
    fake_forward=_fake_forward,
    call=_call,
)
add_triton(DECODE_ATTENTION, "attention")


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`softmax(scale * q @ k.T) @ v` for each head over the first `length` positions of k and v.

    Args:
        q: (B, 1, H, D), floating point, any strides: the last of those positions.
        k, v: (B, S, H, D). What stands from `length` on is not used, and may be NaN.
        length: () or (1,), int32 or int64, on the device of q, from 1 to S. Its value is read on the device
            alone: nobody waits for it, nor checks it.
        scale: factor on the scores; None is 1 / sqrt(D).
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        (B, 1, H, D), contiguous. It has no gradient.

    Raises:
        InputError: wrong dtypes, shapes that do not fit, tensors on different devices, a gradient is asked
            for.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762.
    """
    check_floating(q=q, k=k, v=v)
    check_ndim("q", q, 4, "(B, 1, H, D)")
    check_ndim("k", k, 4, "(B, S, H, D)")
    batch, _, heads, width = q.shape
    check_shape("q", q, (batch, 1, heads, width), "(B, 1, H, D)")
    check_shape("k", k, (batch, k.shape[1], heads, width), "(B, S, H, D) for q (B, 1, H, D)")
    check_shape("v", v, k.shape, "the shape of k")
    if length.dtype not in (torch.int32, torch.int64) or length.shape not in ((), (1,)):
        raise InputError(
            f"length is {length.dtype} of shape {tuple(length.shape)}: it must be int32 or int64 of shape () "
            "or (1,)"
        )
    if length.device != q.device:
        raise InputError(f"length is on {length.device}: it must be on {q.device}, where q is")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise InputError("decode_attention has no gradient: call it under torch.no_grad()")
    fits = 1 <= width <= WIDEST_HEAD
    return select("decode_attention", backend, k, fits=fits)(q, k, v, length, scale=scale).contiguous()


def cost(batch: int, keys: int, heads: int, width: int, dtype: torch.dtype) -> Cost:
    """Two products of D for each of `keys` keys seen; q, k and v are read once, o is written."""
    pairs = batch * heads * keys
    return Cost(4 * width * pairs, 2 * (batch * heads + pairs) * width * dtype.itemsize)
