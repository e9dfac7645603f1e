"""Causal attention, forward: FlashAttention-2 (Dao, arXiv 2307.08691) on packed or strided q, k, v.

Query i, at position t(i) = Tk - Tq + i, sees keys t(i) - window < j <= t(i). For a block of queries, going
through blocks of keys from left to right, with s = q k^T and c = log2(e) scale, scores in base 2 being c s:

    m' = max(m, max_j s)          a = 2^(c (m - m'))
    total = a total + sum_j 2^(c (s - m'))
    o = a o + (z 2^(c (s - m'))) v                   z: dropout
    after the last block   o = o / total,   lse = c m + log2 total, in base 2 too

The weight of a row's maximum is then exactly 1. With 2^(c s - c m), an instruction less, it is off by what
rounding c m leaves, and 1 in o's product, whose operands are bf16: where two maxima share a row, all the
ties in the rounding of o go the same way, row by row (docs/stability.md).

           keys ->
    q  [M][ ][ ][M]             M: at the window's edge or on the diagonal: masked
    |      [M][ ][ ][M]         [ ]: seen whole: no mask, no bounds
    v          [M][ ][ ][M]     the rest: neither read nor computed

lse in base 2 is rounded once, where a natural one is rounded three times until backward has it in base 2
again: at lse = 7 that is 2e-7 of every weight of the row, as much as all other errors in fp32.

Bytes: e (2 Tq + 2 Tk) D + 4 Tq per head (q, o, k, v once; lse): the blocks of queries of a head run next to
each other, so that its k and v come from L2 after the first. Flops: 4 D for each pair seen.

Launch: a program per head and block of queries, the longest rows of a head first, so that the short ones fill
the tail. Only the two kinds of blocks above are masked, each in a loop of its own.

Few queries against many keys (decoding) leave most of a chip idle in that scheme: there each program takes a
share of the keys and writes its m, total and o, and a second kernel adds up the shares, in order:

    m = max_s m_s,   total = sum_s 2^(m_s - m) total_s,   o = sum_s 2^(m_s - m) o_s / total

`decode_attention` has the number of keys on the device: the shares are those of a full cache, so that the
launch is the same for every token and can be replayed. A share past the number reads no keys, and leaves
m = -inf and total = 0, which add nothing.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_backward import attention_backward as attention_backward
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
from fastgpt.kernels.examples import Example, meta
from fastgpt.kernels.launch import chip, launch
from fastgpt.kernels.tune import tunable, tuned

# Every size of GPT-2 has heads of 64. 128 queries are two warpgroups of 64 rows, what wgmma and tcgen05
# multiply; on H100 two such programs fit an SM: one's softmax runs beside the other's products. On A100 4
# warps of 32 rows read each key from shared memory half as often as 8, and still leave room for two programs.
# 32 keys a step at 256: o alone takes 64 registers a thread. sm_120 has 99 KB of shared memory: two stages at
# 128.
_BASE = {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)}
HALVES: Table = {
    80: _BASE | {64: Config(128, 64, 4, 3)},
    90: _BASE,
    100: _BASE,
    120: _BASE | {128: Config(128, 64, 8, 2)},
}
# 64 rows are 16 for each of 4 warps, and with 8 each product would be made twice: Triton deals rows in
# sixteens. Steps of 64 spill on sm_120.
DROPOUT = Config(64, 32, 4, 3)
# For tune.py: other numbers of stages, and tiles of a warpgroup.
CANDIDATES = [Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(128, 64, 8, 4), Config(64, 64, 4, 3)]
# The three products of tf32 hold both halves of q in registers: smaller tiles, and at 256 parts of a row.
FP32 = {64: Config(32, 32, 4, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 32, 8, 1, chunk=64)}
# Told no limit, Triton takes 146 registers on sm_100. With 111, which spill nothing, two programs of 8 warps
# fit an SM: computed, 14.5 us instead of 19.3 at GPT-2's size (docs/optimise/attention_forward.md).
TWO_PROGRAMS = 128
FEW_QUERIES = 16  # the least rows that tensor cores multiply
SPLIT_KEYS = 256  # the least worth a program of its own
MOST_SHARES = 64  # as many as a program of `_attention_combine` holds in registers, at any head size


@triton.jit
def _attend(
    acc,
    m,
    total,
    q,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    q_stride,
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
    """Take the keys start..stop-1 into o (`acc`), m and total.

    q is a tile or, where CHUNK < BLOCK_D, a pointer to the matrix.
    """
    for first in range(start, stop, KEYS):
        if CHUNK < BLOCK_D:
            s = dot_rows(q, first_query, Tq, q_stride, k_ptr, first, Tk, k_stride, QUERIES, KEYS, D, CHUNK)
        else:
            k = load_tile(k_ptr, first, Tk, k_stride, KEYS, D, BLOCK_D, MASKED)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            positions = offset + first_query + tl.arange(0, QUERIES)[:, None]
            s = tl.where(
                seen(positions, first + tl.arange(0, KEYS)[None, :], window, WINDOWED), s, -float("inf")
            )
        m_next = tl.maximum(m, tl.max(s, 1))
        if MASKED:  # a row that has seen no key yet: 2^(-inf - 0) = 0, where -inf - -inf would be NaN
            anchor = tl.where(m_next == -float("inf"), 0.0, m_next)
        else:
            anchor = m_next
        p = tl.exp2((s - anchor[:, None]) * scale2)
        a = tl.exp2((m - anchor) * scale2)
        total = tl.fma(total, a, tl.sum(p, 1))
        acc = acc * a[:, None]
        m = m_next
        if seed_ptr is not None:
            p = tl.where(kept(seed_ptr, bh, first_query, first, dropout_p, QUERIES, KEYS), p, 0.0)
        v = load_tile(v_ptr, first, Tk, v_stride, KEYS, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m, total


@triton.jit
def _attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    parts_ptr,
    stats_ptr,
    seed_ptr,
    length_ptr,
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    BH,
    H,
    Tq,
    Tk,
    window,
    begin,
    share,
    scale,
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    if length_ptr is not None:
        Tk = tl.load(length_ptr).to(tl.int32)
    blocks = tl.cdiv(Tq, QUERIES)
    bh = tl.program_id(0) // blocks
    b, h = bh // H, bh % H
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    offset = Tk - Tq
    q_ptr += head_start(b, h, q_batch_stride, q_head_stride)
    k_ptr += head_start(b, h, k_batch_stride, k_head_stride)
    v_ptr += head_start(b, h, v_batch_stride, v_head_stride)
    if CHUNK < BLOCK_D:
        q = q_ptr
    else:
        q = load_tile(q_ptr, first_query, Tq, q_stride, QUERIES, D, BLOCK_D, True)

    first_position = offset + first_query
    start = 0
    stop = tl.minimum(first_position + QUERIES, Tk)
    if parts_ptr is not None:
        start = begin + tl.program_id(1) * share
        stop = tl.minimum(stop, start + share)
    if WINDOWED:
        start = tl.maximum(start, tl.maximum(first_position - window + 1, 0) // KEYS * KEYS)
    # Keys from `diagonal` on are hidden from some query; those before `edge` too, being out of its window.
    diagonal = tl.maximum(tl.minimum((first_position + 1) // KEYS * KEYS, stop // KEYS * KEYS), start)
    edge = start
    scale2 = scale * LOG2E
    m = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if WINDOWED:
        edge = tl.cdiv(tl.maximum(first_position + QUERIES - window, 0), KEYS) * KEYS
        edge = tl.minimum(tl.maximum(edge, start), diagonal)
        acc, m, total = _attend(
            acc, m, total, q, k_ptr, v_ptr, k_stride, v_stride, q_stride, start, edge, first_query, offset,
            Tq, Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES, KEYS, True, True, CHUNK,
        )  # fmt: skip
    acc, m, total = _attend(
        acc, m, total, q, k_ptr, v_ptr, k_stride, v_stride, q_stride, edge, diagonal, first_query, offset, Tq,
        Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES, KEYS, False, WINDOWED, CHUNK,
    )  # fmt: skip
    acc, m, total = _attend(
        acc, m, total, q, k_ptr, v_ptr, k_stride, v_stride, q_stride, diagonal, stop, first_query, offset, Tq,
        Tk, window, scale2, seed_ptr, bh, dropout_p, D, BLOCK_D, QUERIES, KEYS, True, WINDOWED, CHUNK,
    )  # fmt: skip

    queries = first_query + tl.arange(0, QUERIES)
    rows = tl.cast(bh, tl.int64) * Tq + queries
    m *= scale2
    if parts_ptr is not None:  # o: (S, BH, Tq, D); m and total: (2, S, BH, Tq)
        part = tl.cast(tl.program_id(1), tl.int64) * BH * Tq
        store_tile(parts_ptr + (part + bh * Tq) * D, acc, first_query, Tq, D, QUERIES, D, BLOCK_D)
        tl.store(stats_ptr + part + rows, m, queries < Tq)
        tl.store(stats_ptr + (part + tl.num_programs(1) * BH * Tq) + rows, total, queries < Tq)
    else:
        tl.store(lse_ptr + rows, m + tl.log2(total), queries < Tq)
        if seed_ptr is not None:
            total *= 1 - dropout_p
        o_ptr += head_start(b, h, tl.cast(Tq, tl.int64) * H * D, D)
        store_tile(o_ptr, acc / total[:, None], first_query, Tq, H * D, QUERIES, D, BLOCK_D)


@triton.jit
def _attention_combine(
    parts_ptr,
    stats_ptr,
    o_ptr,
    lse_ptr,
    BH,
    H,
    Tq,
    S,
    dropout_p,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)  # of (BH, Tq)
    shares = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    part = tl.cast(shares, tl.int64) * BH * Tq + row
    m_s = tl.load(stats_ptr + part, shares < S, other=-float("inf"))
    total_s = tl.load(stats_ptr + tl.cast(S, tl.int64) * BH * Tq + part, shares < S, other=0.0)
    mask = (shares < S)[:, None] & (dims < D)[None, :]
    o_s = tl.load(parts_ptr + part[:, None] * D + dims[None, :], mask, other=0.0)
    m = tl.max(m_s, 0)
    weight = tl.exp2(m_s - m)
    total = tl.sum(weight * total_s, 0)
    o = tl.sum(weight[:, None] * o_s, 0) / (total * (1 - dropout_p))
    tl.store(lse_ptr + row, m + tl.log2(total))
    b, h, i = row // Tq // H, row // Tq % H, row % Tq
    tl.store(o_ptr + ((b * Tq + i) * H + h) * D + dims, o.to(o_ptr.dtype.element_ty), dims < D)


@tunable
def attention_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(o, lse); q alone is packed qkv."""
    return _forward(q, k, v, seed, None, dropout_p, scale, window)


def decode_attention_forward(q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float | None) -> Tensor:
    return _forward(q, k, v, None, length, 0.0, scale, None)[0]


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seed: Tensor | None,
    length: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """With a `length` on the device, only so many of the Tk keys count; the launch depends on Tk alone."""
    q, k, v = split_packed(q, k, v)
    B, Tq, H, D = q.shape
    Tk = k.shape[1]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    windowed = window is not None and window < Tk
    config = choose(HALVES, FP32, q, dropout=None if seed is None else DROPOUT)
    registers = most_registers(
        q,
        crowded=seed is not None or Tq <= FEW_QUERIES or windowed or q.dtype == torch.float32,
        widest=80 if seed is not None and windowed else 48,
    )
    if Tq > FEW_QUERIES and has_alternatives(q, seed, windowed):
        config = tuned("attention_forward", config, CANDIDATES)
        if chip(q.device).family == 100 and config.warps == 8:
            registers = TWO_PROGRAMS
    if windowed and D > 64:  # a third loop, with masks
        config = config._replace(step=min(config.step, 32), stages=min(config.stages, 2))
    window = window if windowed else Tk
    begin, share, splits = 0, Tk, 1
    if Tq <= FEW_QUERIES:
        config = config._replace(rows=FEW_QUERIES, warps=config.warps if config.rows == FEW_QUERIES else 4)
        if seed is not None:  # never when generating; a second stage and 4 warps spill up to 24 bytes
            config = config._replace(stages=1, warps=8)
        begin = (
            max(Tk - Tq - window + 1, 0) // config.step * config.step
        )  # the first key seen, or a little before
        programs = min(triton.cdiv(2 * chip(q.device).sms, max(B * H, 1)), MOST_SHARES)
        share = max(triton.cdiv(Tk - begin, programs), SPLIT_KEYS)
        share = triton.cdiv(share, config.step) * config.step
        splits = max(triton.cdiv(Tk - begin, share), 1)
    parts = stats = None
    if splits > 1:
        parts = torch.empty((splits, B * H, Tq, D), dtype=torch.float32, device=q.device)
        stats = torch.empty((2, splits, B * H, Tq), dtype=torch.float32, device=q.device)
    launch(
        _attention_forward,
        (B * H * triton.cdiv(Tq, config.rows), splits),
        *(q, k, v, o, lse, parts, stats, seed, length),
        *(*strides(q), *strides(k), *strides(v)),
        *(B * H, H, Tq, Tk, window, begin, share, D**-0.5 if scale is None else scale, dropout_p),
        D=D,
        BLOCK_D=block_d(D),
        QUERIES=config.rows,
        KEYS=config.step,
        CHUNK=config.chunk,
        WINDOWED=windowed,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=registers,
    )
    if parts is not None:
        launch(
            _attention_combine,
            (B * H * Tq,),
            *(parts, stats, o, lse, B * H, H, Tq, splits, dropout_p),
            D=D,
            BLOCK_D=block_d(D),
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=min(max(triton.next_power_of_2(splits) * block_d(D) // 512, 1), 8),
        )
    return o, lse


def examples() -> list[Example]:
    """Every launch choice at widths that fill their tiles and that do not, with dropout, a window, both."""
    bf16, fp32 = torch.bfloat16, torch.float32
    cores = ("tensor_cores", "vector_load")
    requires: dict[tuple[Any, ...], dict[str, tuple[str, ...]]] = {
        ("forward", 64, bf16, False, False): {"_attention_forward": cores},
        ("backward", 64, bf16, False, False): {
            "_attention_backward_queries": cores,
            "_attention_backward_keys": cores,
        },
        **{
            (direction, 64, bf16, False, False): {
                "_attention_forward": ("vector_load",),
                "_attention_combine": ("vector_load",),
            }
            for direction in ("decode", "static")
        },
    }
    # What GPT-2 launches on each chip, and of the rest what is nearest to a spill, on one.
    every_chip = {*requires, ("backward", 64, bf16, True, False)}
    quick = {
        ("forward", 64, bf16, True, True),
        ("forward", 160, fp32, True, True),
        ("forward", 128, bf16, False, True),
        ("backward", 64, fp32, False, False),
        ("backward", 80, bf16, True, True),
        ("backward", 160, fp32, True, True),
    }
    found = []
    cases = itertools.product(
        ("forward", "backward", "decode", "static"),
        (16, 32, 48, 64, 80, 128, 160, 256),
        (bf16, torch.float16, fp32),
        (False, True),
        (False, True),
    )
    for case in cases:
        direction, width, dtype, dropout, windowed = case
        if dtype == torch.float16 and (width not in (64, 128, 256) or dropout != windowed):
            continue  # bf16 with another instruction for a product and a conversion
        if width == 32 and dtype != fp32:
            continue  # no choice of its own
        if direction == "static" and (dropout or windowed):
            continue  # it has neither
        name = f"{direction} {width} {str(dtype).removeprefix('torch.')}"
        found.append(
            Example(
                name + " dropout" * dropout + " window" * windowed,
                partial(_example, *case),
                requires.get(case, {}),
                every_chip=case in every_chip,
                slow=case not in quick,
            )
        )
    return found


def _example(direction: str, width: int, dtype: torch.dtype, dropout: bool, windowed: bool) -> Any:
    """GPT-2's smallest, but for the width; decoding with a cache, also one that a CUDA graph can read."""
    qkv, o = meta(8, 1024, 3, 12, width, dtype=dtype), meta(8, 1024, 12, width, dtype=dtype)
    seed = meta(1, dtype=torch.int64) if dropout else None
    options = (seed, 0.1 if dropout else 0.0, None, 256 if windowed else None)
    if direction == "forward":
        return attention_forward(qkv, None, None, *options)
    if direction == "backward":
        lse = meta(8, 12, 1024, dtype=torch.float32)
        return attention_backward(o, qkv, None, None, o, lse, *options)
    if direction == "static":
        return decode_attention_forward(qkv[:, :1, 0], o, o, meta(1, dtype=torch.int64), None)
    return attention_forward(qkv[:, :1, 0], o, o, *options)
