"""Causal self-attention, with query i aligned to the bottom right: it sees keys j <= Tk - Tq + i.

For each batch b and head h, with q (Tq, D), k and v (Tk, D), position t(i) = Tk - Tq + i, and a window of w
keys counting oneself (no window: w = Tk):

    s_ij = scale * sum_d q_id k_jd          where t(i) - w < j <= t(i), else -inf       (Tq, Tk)
    lse_i = log sum_j exp s_ij                                                          (Tq,)
    p_ij = exp(s_ij - lse_i)
    o_id = sum_j z_ij p_ij v_jd             z_ij = 1, or with dropout 0 or 1 / (1 - dropout_p)

Backward, with delta_i = sum_d do_id o_id:

    dv_jd = sum_i z_ij p_ij do_id
    dp_ij = z_ij sum_d do_id v_jd
    ds_ij = p_ij (dp_ij - delta_i)
    dq_id = scale * sum_j ds_ij k_jd
    dk_jd = scale * sum_i ds_ij q_id

Kernels save lse in base 2, log2(e) times the one above, which they need not convert again.

Tq == Tk is training; one query against a cache (Tq == 1) and chunked prefill (1 < Tq < Tk) are the same
operation. `torch.nn.functional.scaled_dot_product_attention(is_causal=True)` aligns to the top left instead:
the two agree only where Tq == Tk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.ops.checks import check_at_least, check_dropout, check_floating, check_ndim, check_shape
from fastgpt.ops.library import Kernels, Operator, add_native, add_triton, check_dtypes
from fastgpt.ops.registry import Cost, register, select

WIDEST_HEAD = 256  # as far as the registers of a program hold q, o and their gradients


def reference(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    if k is None or v is None:  # packed: q is (B, T, 3, H, D)
        q, k, v = q.unbind(2)  # views, (B, T, H, D)
    tq, tk = q.shape[1], k.shape[1]
    mask = None
    causal = False
    if window is not None and window < tk:
        position = torch.arange(tk - tq, tk, device=q.device)[:, None]  # (Tq, 1)
        key = torch.arange(tk, device=q.device)  # (Tk,)
        mask = (key <= position) & (key > position - window)  # (Tq, Tk)
    elif tq == tk:
        causal = True
    elif tq > 1:  # a single query sees every key
        mask = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2).contiguous()  # (B, Tq, H, D)


register("attention", "eager", reference)


def _fake_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    (batch, tq), (heads, width) = q.shape[:2], q.shape[-2:]
    o = q.new_empty((batch, tq, heads, width))
    return o, q.new_empty((batch, heads, tq), dtype=torch.float32)


def _fake_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    o: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dk, dv = (q.new_empty(0 if x is None else x.shape) for x in (k, v))
    return q.new_empty(q.shape), dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, seed, *ctx.options = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, seed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for lse


def _gradients(kernels: Kernels, ctx: Any, do: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    packed = ctx.saved_tensors[1] is None
    dq, dk, dv = kernels.backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, None if packed else dk, None if packed else dv, None, None, None, None


def _call(
    kernels: Kernels,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    q, k, v, scale = operands(q, k, v, scale)
    seed = None
    if dropout_p:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
    return kernels.forward(q, k, v, seed, dropout_p, scale, window)[0]


def operands(
    q: Tensor, k: Tensor | None, v: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None, float | None]:
    """Cast under autocast, checked, and with a scale that is positive, for a kernel.

    Raises:
        InputError: dtypes that differ or that kernels do not take, or wider heads.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:  # as scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), None if k is None else k.to(dtype), None if v is None else v.to(dtype)
    check_dtypes(**{"qkv" if k is None else "q": q}, k=k, v=v)
    for name, x in (("k", k), ("v", v)):
        if x is not None and x.dtype != q.dtype:
            raise InputError(f"{name} has dtype {x.dtype}: it must be {q.dtype}, the dtype of q")
    if not 1 <= q.shape[-1] <= WIDEST_HEAD:
        raise InputError(
            f"the head size is {q.shape[-1]}: kernels take 1 to {WIDEST_HEAD}; use backend='eager' for others"
        )
    if scale is not None and scale <= 0:  # kernels scale the greatest score, which must remain the greatest
        q = q * (-1.0 if scale else 0.0)
        scale = -scale or 1.0
    return q, k, v, scale


# q without k and v is packed qkv, (B, T, 3, H, D), and so is its gradient: with q, k and v as views of it,
# autograd would have to copy three gradients into one. lse is in base 2: m + log2 sum_j 2^(s2_ij - m).
ATTENTION = Operator(
    name="attention",
    forward="(Tensor q, Tensor? k, Tensor? v, Tensor? seed, float dropout_p, float? scale, SymInt? window) "
    "-> (Tensor o, Tensor lse)",
    backward="(Tensor do, Tensor q, Tensor? k, Tensor? v, Tensor o, Tensor lse, Tensor? seed, "
    "float dropout_p, float? scale, SymInt? window) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
    call=_call,
)
add_triton(ATTENTION, "attention")
add_native(ATTENTION)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`softmax(scale * q @ k.T, masked) @ v` for each head, query i seeing keys j <= Tk - Tq + i.

    Args:
        q: (B, Tq, H, D), floating point, any strides.
        k, v: (B, Tk, H, D), Tk >= Tq: the last Tq keys are those of the queries' own positions.
        dropout_p: probability of dropping an attention weight, 0 <= dropout_p < 1. It applies whenever it is
            not 0: pass 0 when not training.
        scale: factor on the scores; None is 1 / sqrt(D).
        window: how many keys a query sees, itself included; None is all of them.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        (B, Tq, H, D), contiguous.

    Raises:
        InputError: dtype not floating point, shapes that do not fit, tensors on different devices, more
            queries than keys, dropout_p or window out of range.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; windows as in Beltagy et al.,
    "Longformer", arXiv 2004.05150.
    """
    check_floating(q=q, k=k, v=v)
    check_ndim("q", q, 4, "(B, Tq, H, D)")
    check_ndim("k", k, 4, "(B, Tk, H, D)")
    batch, tq, heads, width = q.shape
    check_shape("k", k, (batch, k.shape[1], heads, width), "(B, Tk, H, D) for q (B, Tq, H, D)")
    check_shape("v", v, k.shape, "the shape of k")
    if k.shape[1] < tq:
        raise InputError(f"k has {k.shape[1]} positions: it must have at least q's {tq}")
    return _attend(q, k, v, dropout_p, scale, window, backend)


def causal_attention_qkvpacked(
    qkv: Tensor,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`causal_attention` on the output of one projection, without splitting it into copies.

    Args:
        qkv: (B, T, 3, H, D), floating point: q, k and v along dimension 2.
        dropout_p, scale, window, backend: as in `causal_attention`.

    Returns:
        (B, T, H, D), contiguous.

    Raises:
        InputError: as `causal_attention`.
    """
    check_floating(qkv=qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise InputError(f"qkv has shape {tuple(qkv.shape)}: it must be (B, T, 3, H, D)")
    return _attend(qkv, None, None, dropout_p, scale, window, backend)


def _attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window: int | None,
    backend: str | None,
) -> Tensor:
    check_dropout("dropout_p", dropout_p)
    if window is not None:
        check_at_least("window", window, 1)
    function = select("attention", backend, q, fits=1 <= q.shape[-1] <= WIDEST_HEAD)
    return function(q, k, v, dropout_p=dropout_p, scale=scale, window=window)


def cost(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    backward: bool = False,
) -> Cost:
    """Matrix products over the (query, key) pairs that are seen, about half of them where Tq == Tk.

    A pair costs 4 D flops forward (q k and p v) and 10 D backward: s again, dp, dv, dq and dk, usual for
    implementations that save only lse. The softmax is not counted. Forward reads q, k, v and writes o and
    lse (fp32); backward reads q, k, v, o, do and lse and writes dq, dk and dv.
    """
    window = keys if window is None else min(window, keys)

    def seen(positions: int) -> int:
        """Keys seen by all queries at the first `positions` positions: sum of min(window, 1 + position)."""
        growing = min(positions, window)
        return growing * (growing + 1) // 2 + (positions - growing) * window

    pairs = batch * heads * (seen(keys) - seen(keys - queries))
    q_elements = batch * queries * heads * width
    kv_elements = 2 * batch * min(keys, queries + window - 1) * heads * width
    lse_bytes = 4 * batch * queries * heads
    if backward:
        moved = 4 * q_elements + 2 * kv_elements  # q, o, do, dq; k and v, dk and dv
        return Cost(10 * width * pairs, moved * dtype.itemsize + lse_bytes)
    return Cost(4 * width * pairs, (2 * q_elements + kv_elements) * dtype.itemsize + lse_bytes)
