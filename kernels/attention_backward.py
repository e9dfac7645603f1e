"""Causal attention, backward: two kernels that recompute the weights from lse, without atomics.

    s2 = log2(e) scale q k^T,   p = 2^(s2 - lse)      lse in base 2; p = 0 where hidden
    delta_i = sum_d do_id o_id
    ds = p (z (do v^T) - delta)                               z: dropout, drawn again
    dq = scale ds k,   dk = scale ds^T q,   dv = (z p)^T do

The first kernel has a block of queries and goes through the keys it sees: dq, and delta, which it makes from
the do that it holds anyway and leaves for the second. That one has a block of keys and goes through the
queries that see it: dk and dv. Each sum has one owner and one order, so every bit is the same on each run.

           keys ->                          keys ->
    q  [M][ ][ ][M]   a program: a row      M           M: on the diagonal or at the window's edge:
    |      [M][ ][ ][M]   of blocks         [ ] M          masked
    v          [M][ ][ ][M]                 [ ][ ] M    a program: a column of blocks

Flops: 14 D a pair seen, s and dp being made in both kernels, against 10 D for one kernel that would add dq
with atomics. Bytes: as one kernel plus q, do, k and v once more, e (2 Tq + 2 Tk) D per head.

The gradients go wherever their strides say: for packed qkv into one (B, T, 3, H, D), without a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_tiles import (
    LOG2E,
    PRECISION,
    Config,
    Table,
    block_d,
    choose,
    dot_rows,
    has_alternatives,
    head_start,
    kept,
    load_tile,
    most_registers,
    seen,
    split_packed,
    store_tile,
    strides,
)
from fastgpt.kernels.launch import FAMILIES, chip, launch
from fastgpt.kernels.tune import tunable, tuned

# 128 own rows and 64 of a step at GPT-2's 64; wider heads half of either: dk and dv, or dq, q and do, grow
# with the width. At 256 nothing is left for a second stage. In fp32 above 64 no row fits: see `dot_rows`.
_QUERIES = {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(32, 32, 8, 1)}
_KEYS = {64: Config(128, 64, 8, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)}
QUERIES_HALVES: Table = dict.fromkeys(FAMILIES, _QUERIES)
KEYS_HALVES: Table = dict.fromkeys(FAMILIES, _KEYS)
# As for forward. A second stage of dk and dv spills on sm_80 and sm_100.
QUERIES_DROPOUT = Config(64, 32, 4, 2)
KEYS_DROPOUT = Config(64, 32, 4, 1)
# For tune.py: a stage more, half a step, half the rows.
CANDIDATES = [Config(128, 64, 8, 3), Config(128, 32, 8, 2), Config(64, 64, 8, 2)]
# Up to 32, where 32 rows would each be whole in a warp, that spills; 4 warps for dq at 64 spill on sm_100.
_FP32_NARROW, _FP32_WIDE = Config(16, 32, 4, 1), Config(16, 32, 8, 1, chunk=64)
QUERIES_FP32 = {32: _FP32_NARROW, 64: Config(32, 32, 8, 1), 256: _FP32_WIDE}
KEYS_FP32 = {32: _FP32_NARROW, 64: Config(32, 32, 4, 1), 256: _FP32_WIDE}


@triton.jit
def _add_dq(
    dq,
    q,
    do,
    lse,
    delta,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    q_stride,
    do_stride,
    start,
    stop,
    first_query,
    offset,
    Tq,
    Tk,
    window,
    scale2,
    seed_ptr,
    bh,
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the share of keys start..stop-1 to dq, less the scale.

    q and do are tiles or, where CHUNK < BLOCK_D, pointers to the matrices.
    """
    for first in range(start, stop, KEYS):
        if CHUNK < BLOCK_D:
            s = dot_rows(q, first_query, Tq, q_stride, k_ptr, first, Tk, k_stride, QUERIES, KEYS, D, CHUNK)
            dp = dot_rows(do, first_query, Tq, do_stride, v_ptr, first, Tk, v_stride, QUERIES, KEYS, D, CHUNK)
        else:
            k = load_tile(k_ptr, first, Tk, k_stride, KEYS, D, BLOCK_D, MASKED)
            v = load_tile(v_ptr, first, Tk, v_stride, KEYS, D, BLOCK_D, MASKED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(tl.fma(s, scale2, -lse[:, None]))
        if MASKED:
            positions = offset + first_query + tl.arange(0, QUERIES)[:, None]
            p = tl.where(seen(positions, first + tl.arange(0, KEYS)[None, :], window, WINDOWED), p, 0.0)
        if CHUNK >= BLOCK_D:
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if seed_ptr is not None:
            keep = kept(seed_ptr, bh, first_query, first, dropout_p, QUERIES, KEYS)
            dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
        ds = p * (dp - delta[:, None])
        if CHUNK < BLOCK_D:
            k = load_tile(k_ptr, first, Tk, k_stride, KEYS, D, BLOCK_D, MASKED)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _attention_backward_queries(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    seed_ptr,
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    dq_batch_stride,
    dq_stride,
    dq_head_stride,
    H,
    Tq,
    Tk,
    window,
    scale,
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    blocks = tl.cdiv(Tq, QUERIES)
    bh = tl.program_id(0) // blocks
    b, h = bh // H, bh % H
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    offset = Tk - Tq
    q_ptr += head_start(b, h, q_batch_stride, q_head_stride)
    k_ptr += head_start(b, h, k_batch_stride, k_head_stride)
    v_ptr += head_start(b, h, v_batch_stride, v_head_stride)
    dq_ptr += head_start(b, h, dq_batch_stride, dq_head_stride)
    row_stride = H * D  # of o and do, which are contiguous
    o_head = head_start(b, h, tl.cast(Tq, tl.int64) * row_stride, D)

    do = load_tile(do_ptr + o_head, first_query, Tq, row_stride, QUERIES, D, BLOCK_D, True)
    o = load_tile(o_ptr + o_head, first_query, Tq, row_stride, QUERIES, D, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    queries = first_query + tl.arange(0, QUERIES)
    rows = tl.cast(bh, tl.int64) * Tq + queries
    tl.store(delta_ptr + rows, delta, queries < Tq)
    lse = tl.load(lse_ptr + rows, queries < Tq, other=0.0)
    if CHUNK < BLOCK_D:
        q = q_ptr
        do = do_ptr + o_head
    else:
        q = load_tile(q_ptr, first_query, Tq, q_stride, QUERIES, D, BLOCK_D, True)

    first_position = offset + first_query
    start = 0
    stop = tl.minimum(first_position + QUERIES, Tk)
    if WINDOWED:
        start = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS
    # Keys from `diagonal` on are hidden from some query; those before `edge` too, being out of its window.
    diagonal = (first_position + 1) // KEYS * KEYS
    edge = start
    scale2 = scale * LOG2E
    dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if WINDOWED:
        edge = tl.cdiv(tl.maximum(first_position + QUERIES - window, 0), KEYS) * KEYS
        edge = tl.minimum(edge, diagonal)
        dq = _add_dq(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, q_stride, row_stride, start, edge,
            first_query, offset, Tq, Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES, KEYS,
            True, True, CHUNK,
        )  # fmt: skip
    dq = _add_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, q_stride, row_stride, edge, diagonal,
        first_query, offset, Tq, Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES, KEYS,
        False, WINDOWED, CHUNK,
    )  # fmt: skip
    dq = _add_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, q_stride, row_stride, diagonal, stop,
        first_query, offset, Tq, Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES, KEYS, True,
        WINDOWED, CHUNK,
    )  # fmt: skip
    store_tile(dq_ptr, dq * scale, first_query, Tq, dq_stride, QUERIES, D, BLOCK_D)


@triton.jit
def _add_dk_dv(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    q_stride,
    do_stride,
    k_stride,
    v_stride,
    start,
    stop,
    first_key,
    offset,
    Tq,
    Tk,
    window,
    scale2,
    seed_ptr,
    bh,
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the share of queries start..stop-1 to dk, less the scale, and dv.

    Tiles are transposed, (KEYS, QUERIES): p^T and ds^T are then left operands as they come from the first
    products, without a way through shared memory. k and v are tiles or, where CHUNK < BLOCK_D,
    pointers to the matrices.
    """
    for first in range(start, stop, QUERIES):
        if CHUNK < BLOCK_D:
            s = dot_rows(k, first_key, Tk, k_stride, q_ptr, first, Tq, q_stride, KEYS, QUERIES, D, CHUNK)
            dp = dot_rows(v, first_key, Tk, v_stride, do_ptr, first, Tq, do_stride, KEYS, QUERIES, D, CHUNK)
        else:
            q = load_tile(q_ptr, first, Tq, q_stride, QUERIES, D, BLOCK_D, True)
            do = load_tile(do_ptr, first, Tq, do_stride, QUERIES, D, BLOCK_D, True)
        queries = first + tl.arange(0, QUERIES)
        # Rows past Tq: lse = inf makes p = 0, and the zeros of q and do make the rest 0.
        lse = tl.load(lse_ptr + queries, queries < Tq, other=float("inf"))
        delta = tl.load(delta_ptr + queries, queries < Tq, other=0.0)
        if CHUNK >= BLOCK_D:
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(tl.fma(s, scale2, -lse[None, :]))
        if MASKED:
            keys = first_key + tl.arange(0, KEYS)[:, None]
            p = tl.where(seen(offset + queries[None, :], keys, window, WINDOWED), p, 0.0)
        if CHUNK >= BLOCK_D:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        zp = p
        if seed_ptr is not None:
            keep = tl.trans(kept(seed_ptr, bh, first, first_key, dropout_p, QUERIES, KEYS))
            factor = 1 / (1 - dropout_p)
            zp = tl.where(keep, p * factor, 0.0)
            dp = tl.where(keep, dp * factor, 0.0)
        if CHUNK < BLOCK_D:
            do = load_tile(do_ptr, first, Tq, do_stride, QUERIES, D, BLOCK_D, True)
        dv = tl.dot(zp.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if CHUNK < BLOCK_D:
            q = load_tile(q_ptr, first, Tq, q_stride, QUERIES, D, BLOCK_D, True)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attention_backward_keys(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    seed_ptr,
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    dk_batch_stride,
    dk_stride,
    dk_head_stride,
    H,
    Tq,
    Tk,
    window,
    scale,
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    blocks = tl.cdiv(Tk, KEYS)
    bh = tl.program_id(0) // blocks
    b, h = bh // H, bh % H
    first_key = tl.program_id(0) % blocks * KEYS  # the first keys are seen by the most queries
    offset = Tk - Tq
    q_ptr += head_start(b, h, q_batch_stride, q_head_stride)
    k_ptr += head_start(b, h, k_batch_stride, k_head_stride)
    v_ptr += head_start(b, h, v_batch_stride, v_head_stride)
    gradient = head_start(b, h, dk_batch_stride, dk_head_stride)
    do_stride = H * D
    do_ptr += head_start(b, h, tl.cast(Tq, tl.int64) * do_stride, D)
    lse_ptr += tl.cast(bh, tl.int64) * Tq
    delta_ptr += tl.cast(bh, tl.int64) * Tq
    if CHUNK < BLOCK_D:
        k = k_ptr
        v = v_ptr
    else:
        k = load_tile(k_ptr, first_key, Tk, k_stride, KEYS, D, BLOCK_D, True)
        v = load_tile(v_ptr, first_key, Tk, v_stride, KEYS, D, BLOCK_D, True)

    # Queries before `whole` do not see all keys of the block; those from `edge` on neither.
    start = tl.maximum(first_key - offset, 0) // QUERIES * QUERIES
    whole = tl.cdiv(tl.maximum(first_key + KEYS - 1 - offset, 0), QUERIES) * QUERIES
    stop = Tq
    if WINDOWED:
        stop = tl.maximum(tl.minimum(first_key + KEYS - 1 + window - offset, Tq), 0)
    whole = tl.minimum(whole, stop)
    edge = stop
    scale2 = scale * LOG2E
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dk, dv = _add_dk_dv(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, k_stride, v_stride, start,
        whole, first_key, offset, Tq, Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES, KEYS,
        True, WINDOWED, CHUNK,
    )  # fmt: skip
    if WINDOWED:
        edge = tl.maximum(first_key + window - offset, 0) // QUERIES * QUERIES
        edge = tl.minimum(tl.maximum(edge, whole), stop)
    dk, dv = _add_dk_dv(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, k_stride, v_stride, whole, edge,
        first_key, offset, Tq, Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES, KEYS, False,
        WINDOWED, CHUNK,
    )  # fmt: skip
    if WINDOWED:
        dk, dv = _add_dk_dv(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, k_stride, v_stride, edge,
            stop, first_key, offset, Tq, Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES,
            KEYS, True, True, CHUNK,
        )  # fmt: skip
    store_tile(dk_ptr + gradient, dk * scale, first_key, Tk, dk_stride, KEYS, D, BLOCK_D)
    store_tile(dv_ptr + gradient, dv, first_key, Tk, dk_stride, KEYS, D, BLOCK_D)


@tunable
def attention_backward(
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
    """(dq, dk, dv); for q alone, packed qkv, (dqkv, nothing, nothing)."""
    if packed := k is None:
        gradients = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        result = gradients, q.new_empty(0), q.new_empty(0)
        dq, dk, dv = gradients.unbind(2)
    q, k, v = split_packed(q, k, v)
    do = do.contiguous()
    if not packed:
        dq, dk, dv = result = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    B, Tq, H, D = q.shape
    Tk = k.shape[1]
    delta = torch.empty_like(lse)
    windowed = window is not None and window < Tk
    inputs = *strides(q), *strides(k), *strides(v)
    sizes = H, Tq, Tk, window if windowed else Tk, D**-0.5 if scale is None else scale, dropout_p
    constants = {"D": D, "BLOCK_D": block_d(D), "WINDOWED": windowed}
    registers = most_registers(q, crowded=seed is not None or windowed)
    dropout = None if seed is None else QUERIES_DROPOUT
    # At 48 a second stage spills on sm_120, and with Triton 3.8 at 64 too.
    if dropout is not None and (block_d(D) > D or chip(q.device).family == 120):
        dropout = dropout._replace(stages=1)
    config = choose(QUERIES_HALVES, QUERIES_FP32, q, dropout=dropout, half_step=seed is not None)
    if windowed and q.dtype == torch.float32:  # 32 rows spill 24 bytes on sm_100 at 64
        config = config._replace(rows=16)
    if has_alternatives(q, seed, windowed):
        config = tuned("attention_backward_queries", config, CANDIDATES)
    launch(
        _attention_backward_queries,
        (B * H * triton.cdiv(Tq, config.rows),),
        *(do, q, k, v, o, lse, delta, dq, seed, *inputs, *strides(dq), *sizes),
        QUERIES=config.rows,
        KEYS=config.step,
        CHUNK=config.chunk,
        **constants,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=registers,
    )
    dropout = None if seed is None else KEYS_DROPOUT
    half_step = windowed or seed is not None or block_d(D) > D
    config = choose(KEYS_HALVES, KEYS_FP32, q, dropout=dropout, half_step=half_step)
    if has_alternatives(q, seed, windowed):
        config = tuned("attention_backward_keys", config, CANDIDATES)
    launch(
        _attention_backward_keys,
        (B * H * triton.cdiv(Tk, config.rows),),
        *(do, q, k, v, lse, delta, dk, dv, seed, *inputs, *strides(dk), *sizes),
        QUERIES=config.step,
        KEYS=config.rows,
        CHUNK=config.chunk,
        **constants,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=registers,
    )
    return result
