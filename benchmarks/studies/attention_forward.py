"""Causal attention, forward, from three kernels with the scores in memory to one pass over the keys.

    python benchmarks/studies/attention_forward.py

For each batch and head, with q, k, v of (T, D) and scale = 1 / sqrt(D):

    s_ij = scale q_i k_j  for j <= i, else -inf
    p_ij = exp(s_ij - max_j s_ij) / sum_j exp(s_ij - max_j s_ij)
    o_i  = sum_j p_ij v_j

The least: q, k and v are read once, o is written once; half of the pairs are seen. The kernels of this file
are for T in multiples of 128 and D of 16 to 128, a power of two, in bf16 or (interpreted) fp32.
docs/optimise/attention_forward.md tells the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt import ops
from fastgpt.benchmarks.studies.run import main
from fastgpt.benchmarks.studies.study import LAUNCH_S, Prediction, Size, Step, Study
from fastgpt.benchmarks.timing import random_tensor
from fastgpt.chips import Chip
from fastgpt.inspect.bounds import Work
from fastgpt.inspect.shipped import Call
from fastgpt.kernels.attention import attention_forward
from fastgpt.kernels.attention_tiles import Config
from fastgpt.kernels.launch import chip, launch

B, T, H, D = 8, 1024, 12, 64  # GPT-2 124M
ALL, SEEN = B * H * T * T, B * H * T * (T + 1) // 2  # pairs of a query and a key
ROWS = 2 * B * T * H * D  # bytes of q, k, v or o in bf16
LOG2E = tl.constexpr(1.4426950408889634)
FIRST = Config(64, 64, 4, 1)
QUERIES_AT_A_TIME, KEYS_AT_A_TIME = 64, 256  # of CPU forms

Results = tuple[Tensor]  # o, (B, T, H, D)


def inputs(size: Size, device: torch.device) -> list[Any]:
    """qkv, (B, T, 3, H, D)."""
    batch, length, heads, width = (B, T, H, D) if size == "gpt2" else (1, 256, 2, 16)
    if device.type == "cpu":
        batch = 1
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [random_tensor(batch, length, 3, heads, width, device=device, dtype=dtype)]


def reference(qkv: Tensor) -> Results:
    return (ops.causal_attention_qkvpacked(qkv, backend="eager"),)


# -- tiles ---------------------------------------------------------------------------------------------------


@triton.jit
def _head(ptr, bh, H, batch_stride, D: tl.constexpr):
    """Where the (T, D) matrix of a batch and head begins."""
    return ptr + tl.cast(bh // H, tl.int64) * batch_stride + bh % H * D


@triton.jit
def _tile(ptr, first, stride, ROWS: tl.constexpr, D: tl.constexpr):
    return ptr + (first + tl.arange(0, ROWS))[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def _hide(s, first_query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """-inf for keys that come after their query."""
    queries, keys = first_query + tl.arange(0, QUERIES), first_key + tl.arange(0, KEYS)
    return tl.where(keys[None, :] <= queries[:, None], s, -float("inf"))


def _parts(qkv: Tensor) -> tuple[list[Tensor], Tensor, tuple[Any, ...]]:
    """q, k and v, views; o; and what kernels want to know of them."""
    q, k, v = qkv.unbind(2)
    o = torch.empty(q.shape, dtype=qkv.dtype, device=qkv.device)
    return [q, k, v], o, (q.shape[2], q.shape[1], q.stride(0), q.stride(1), q.shape[3] ** -0.5)


# -- 1. scores and weights in memory -------------------------------------------------------------------------


@triton.jit
def _scores(
    q_ptr, k_ptr, s_ptr, H, T, batch_stride, stride, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    bh, query, key = tl.program_id(2), tl.program_id(1) * QUERIES, tl.program_id(0) * KEYS
    q = tl.load(_tile(_head(q_ptr, bh, H, batch_stride, D), query, stride, QUERIES, D))
    k = tl.load(_tile(_head(k_ptr, bh, H, batch_stride, D), key, stride, KEYS, D))
    s = _hide(tl.dot(q, tl.trans(k)) * scale, query, key, QUERIES, KEYS)
    tl.store(_tile(s_ptr + tl.cast(bh, tl.int64) * T * T + key, query, T, QUERIES, KEYS), s)


@triton.jit
def _softmax(s_ptr, p_ptr, T, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * T + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < T
    s = tl.load(s_ptr + at, mask, other=-float("inf")).to(tl.float32)
    p = tl.exp(s - tl.max(s, 0))
    tl.store(p_ptr + at, p / tl.sum(p, 0), mask)


@triton.jit
def _weigh(
    p_ptr, v_ptr, o_ptr, H, T, batch_stride, stride,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    bh, query = tl.program_id(1), tl.program_id(0) * QUERIES
    p_ptr += tl.cast(bh, tl.int64) * T * T
    v_ptr = _head(v_ptr, bh, H, batch_stride, D)
    acc = tl.zeros([QUERIES, D], tl.float32)
    for key in range(0, T, KEYS):
        p = tl.load(_tile(p_ptr + key, query, T, QUERIES, KEYS))
        acc = tl.dot(p, tl.load(_tile(v_ptr, key, stride, KEYS, D)), acc)
    tl.store(_tile(_head(o_ptr, bh, H, T * H * D, D), query, H * D, QUERIES, D), acc)


def in_memory(qkv: Tensor) -> Results:
    (q, k, v), o, (heads, length, batch_stride, stride, scale) = _parts(qkv)
    rows, _, warps, stages = FIRST[:4]
    matrices = len(q) * heads
    blocks, sizes = length // rows, {"D": q.shape[3], "QUERIES": rows, "KEYS": rows}
    options = {**sizes, "num_warps": warps, "num_stages": stages}
    scores = torch.empty(matrices, length, length, dtype=q.dtype, device=q.device)
    weights = torch.empty_like(scores)
    args = (q, k, scores, heads, length, batch_stride, stride, scale)
    launch(_scores, (blocks, blocks, matrices), *args, **options)
    block = triton.next_power_of_2(length)
    launch(_softmax, (matrices * length,), scores, weights, length, BLOCK=block, num_warps=4)
    launch(_weigh, (blocks, matrices), weights, v, o, heads, length, batch_stride, stride, **options)
    return (o,)


# -- 2. the scores twice, and nowhere in memory --------------------------------------------------------------


@triton.jit
def _maxima(
    q_ptr, k_ptr, m_ptr, H, T, batch_stride, stride, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    bh, query = tl.program_id(1), tl.program_id(0) * QUERIES
    k_ptr = _head(k_ptr, bh, H, batch_stride, D)
    q = tl.load(_tile(_head(q_ptr, bh, H, batch_stride, D), query, stride, QUERIES, D))
    m = tl.full([QUERIES], -float("inf"), tl.float32)
    for key in range(0, T, KEYS):
        s = tl.dot(q, tl.trans(tl.load(_tile(k_ptr, key, stride, KEYS, D)))) * scale
        m = tl.maximum(m, tl.max(_hide(s, query, key, QUERIES, KEYS), 1))
    tl.store(m_ptr + bh * T + query + tl.arange(0, QUERIES), m)


@triton.jit
def _weigh_by_maxima(
    q_ptr, k_ptr, v_ptr, m_ptr, o_ptr, H, T, batch_stride, stride, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    bh, query = tl.program_id(1), tl.program_id(0) * QUERIES
    k_ptr, v_ptr = _head(k_ptr, bh, H, batch_stride, D), _head(v_ptr, bh, H, batch_stride, D)
    q = tl.load(_tile(_head(q_ptr, bh, H, batch_stride, D), query, stride, QUERIES, D))
    m = tl.load(m_ptr + bh * T + query + tl.arange(0, QUERIES))
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    for key in range(0, T, KEYS):
        s = tl.dot(q, tl.trans(tl.load(_tile(k_ptr, key, stride, KEYS, D)))) * scale
        p = tl.exp(_hide(s, query, key, QUERIES, KEYS) - m[:, None])
        total += tl.sum(p, 1)
        v = tl.load(_tile(v_ptr, key, stride, KEYS, D))
        acc = tl.dot(p.to(v.dtype), v, acc)
    o_ptr = _head(o_ptr, bh, H, T * H * D, D)
    tl.store(_tile(o_ptr, query, H * D, QUERIES, D), acc / total[:, None])


def scores_twice(qkv: Tensor) -> Results:
    (q, k, v), o, about = _parts(qkv)
    rows, keys, warps, stages = FIRST[:4]
    heads, length = about[:2]
    maxima = torch.empty(len(q), heads, length, dtype=torch.float32, device=q.device)
    options = {"D": q.shape[3], "QUERIES": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}
    grid = length // rows, len(q) * heads
    launch(_maxima, grid, q, k, maxima, *about, **options)
    launch(_weigh_by_maxima, grid, q, k, v, maxima, o, *about, **options)
    return (o,)


# -- 3 to 8. online softmax ----------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, m, total, q, k_ptr, v_ptr, query, start, stop, stride, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    """Take keys start..stop-1 into o (`acc`), the maximum m and the sum `total`: see kernels/attention.py."""
    for key in range(start, stop, KEYS):
        s = tl.dot(q, tl.trans(tl.load(_tile(k_ptr, key, stride, KEYS, D))))
        if MASKED:
            s = _hide(s, query, key, QUERIES, KEYS)
        if EXP == "exp":
            s *= scale
            greater = tl.maximum(m, tl.max(s, 1))
            p = tl.exp(s - greater[:, None])
            a = tl.exp(m - greater)
        elif EXP == "exp2":  # m is not scaled: the weight of the maximum is 2^0
            greater = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2((s - greater[:, None]) * (scale * LOG2E))
            a = tl.exp2((m - greater) * (scale * LOG2E))
        else:  # m is scaled, one product for a row
            greater = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
            p = tl.exp2(tl.fma(s, scale * LOG2E, -greater[:, None]))
            a = tl.exp2(m - greater)
        total = total * a + tl.sum(p, 1)
        m = greater
        v = tl.load(_tile(v_ptr, key, stride, KEYS, D))
        acc = tl.dot(p.to(v.dtype), v, acc * a[:, None])
    return acc, m, total


@triton.jit
def _online(
    q_ptr, k_ptr, v_ptr, o_ptr, H, T, batch_stride, stride, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SKIP: tl.constexpr, EXP: tl.constexpr,
):  # fmt: skip
    bh, query = tl.program_id(1), tl.program_id(0) * QUERIES
    k_ptr, v_ptr = _head(k_ptr, bh, H, batch_stride, D), _head(v_ptr, bh, H, batch_stride, D)
    q = tl.load(_tile(_head(q_ptr, bh, H, batch_stride, D), query, stride, QUERIES, D))
    m = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    diagonal, stop = 0, T
    if SKIP:
        diagonal, stop = query // KEYS * KEYS, query + QUERIES
        acc, m, total = _attend(
            acc, m, total, q, k_ptr, v_ptr, query, 0, diagonal, stride, scale, D, QUERIES, KEYS, False, EXP
        )
    acc, m, total = _attend(
        acc, m, total, q, k_ptr, v_ptr, query, diagonal, stop, stride, scale, D, QUERIES, KEYS, True, EXP
    )
    o_ptr = _head(o_ptr, bh, H, T * H * D, D)
    tl.store(_tile(o_ptr, query, H * D, QUERIES, D), acc / total[:, None])


def online(
    config: Callable[[int], Config], *, skip: bool = True, exp: str = "exp2"
) -> Callable[..., Results]:
    """`config`: from a chip's family the tile and the launch."""

    def run(qkv: Tensor) -> Results:
        parts, o, about = _parts(qkv)
        rows, keys, warps, stages = config(chip(qkv.device).family)[:4]
        grid = qkv.shape[1] // rows, len(qkv) * qkv.shape[3]
        options = {"D": qkv.shape[4], "QUERIES": rows, "KEYS": keys, "SKIP": skip, "EXP": exp}
        launch(_online, grid, *parts, o, *about, **options, num_warps=warps, num_stages=stages)
        return (o,)

    return run


def _first(family: int) -> Config:
    return FIRST


def _pipelined(family: int) -> Config:
    return FIRST._replace(stages=3)


def _tall(family: int) -> Config:
    """As kernels/attention.py has it."""
    return Config(128, 64, 4 if family == 80 else 8, 3)


def _square(family: int) -> Config:
    """sm_120 has too little shared memory for three stages of it."""
    return Config(128, 128, 8, 3 if family < 120 else 2)


# -- 9 -------------------------------------------------------------------------------------------------------


def shipped(qkv: Tensor) -> Results:
    return (attention_forward(qkv, None, None, None, 0.0, None, None)[0],)


# -- on a CPU ------------------------------------------------------------------------------------------------


def cpu_in_memory(qkv: Tensor) -> Results:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, T, D)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(later, -torch.inf)
    return ((scores.softmax(3) @ v).transpose(1, 2).contiguous(),)


def cpu_by_queries(*, skip: bool) -> Callable[..., Results]:
    """Some queries at a time, whose scores stay in the cache; with `skip` without the keys after them."""

    def run(qkv: Tensor) -> Results:
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        o = torch.empty(qkv.shape[:2] + qkv.shape[3:])  # (B, T, H, D)
        length = q.shape[2]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        for first in range(0, length, QUERIES_AT_A_TIME):
            rows = slice(first, first + QUERIES_AT_A_TIME)
            keys = slice(0, rows.stop if skip else length)
            scores = (q[:, :, rows] @ k[:, :, keys].transpose(2, 3)).mul_(q.shape[3] ** -0.5)
            weights = scores.masked_fill_(later[rows, keys], -torch.inf).softmax(3)
            o[:, rows] = (weights @ v[:, :, keys]).transpose(1, 2)
        return (o,)

    return run


def cpu_online(qkv: Tensor) -> Results:
    """Some keys at a time too."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    o = torch.empty(qkv.shape[:2] + qkv.shape[3:])
    length, scale = q.shape[2], q.shape[3] ** -0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for first in range(0, length, QUERIES_AT_A_TIME):
        rows = slice(first, first + QUERIES_AT_A_TIME)
        m = torch.full((*q.shape[:2], QUERIES_AT_A_TIME, 1), -torch.inf)
        total, acc = torch.zeros_like(m), torch.zeros_like(q[:, :, rows])
        for key in range(0, length, KEYS_AT_A_TIME):
            keys = slice(key, key + KEYS_AT_A_TIME)
            s = (q[:, :, rows] @ k[:, :, keys].transpose(2, 3)).mul_(scale)
            s.masked_fill_(later[rows, keys], -torch.inf)
            greater = torch.maximum(m, s.amax(3, keepdim=True))
            p, a = s.sub_(greater).exp_(), (m - greater).exp_()
            total, acc, m = total * a + p.sum(3, keepdim=True), acc * a + p @ v[:, :, keys], greater
        o[:, rows] = (acc / total).transpose(1, 2)
    return (o,)


def cpu_shipped(qkv: Tensor) -> Results:
    return (torch.ops.fastgpt_native.attention_forward(qkv, None, None, None, 0.0, None, None)[0],)


# -- the study -----------------------------------------------------------------------------------------------


def _work(call: Call) -> Work | None:
    """Every tensor once, and the products; None is what the package knows of its own kernel."""
    if call.kernel in (_scores, _maxima, _weigh):
        pairs, products = ALL, 1
    elif call.kernel in (_weigh_by_maxima, _online):
        pairs, products = SEEN if call.arguments().get("SKIP") else ALL, 2
    else:
        return None
    tensors = [x for x in call.arguments().values() if isinstance(x, Tensor)]
    flops = products * 2 * D * pairs
    return Work(flops, sum(x.numel() * x.element_size() for x in tensors), flops)


def _least(moved: float, products: int, pairs: int, launches: int = 1) -> Callable[[Chip], float]:
    """Microseconds of what takes longest: bytes, products of 2 D flops a pair, exponentials, launches."""

    def us(chip: Chip) -> float:
        flops = products * 2 * D * pairs
        exponentials = pairs / (chip.limits.lanes["sfu"] * chip.sms * chip.clock_hz)
        peak = chip.peaks["bf16"] or float("inf")
        return 1e6 * max(moved / chip.bandwidth, flops / peak, exponentials, launches * LAUNCH_S)

    return us


def _step(
    name: str, change: str, text: str, us: Any, run: Any,
    cpu: Any = None, form: str = "", times: Any = None, refused: str = "",
) -> Step:  # fmt: skip
    return Step(name, change, Prediction(text, us=us, cpu=times), run, cpu, form, work=_work, refused=refused)


STUDY = Study(
    name="attention_forward",
    sizes=f"{B} sequences of {T} tokens, {H} heads of {D}, bf16",
    inputs=inputs,
    reference=reference,
    peers={"torch: scaled_dot_product_attention": reference},
    steps=[
        _step(
            "scores in memory",
            "three kernels: s = q k^T, p = softmax(s), o = p v.",
            "s and p are 201 MB each, written once and read once, and q, k, v and o are 50 MB: 856 MB, 255 "
            "us on an H100.",
            _least(8 * ALL + 4 * ROWS, 2, ALL, 3),
            in_memory,
            cpu_in_memory,
            "matmul, softmax, matmul",
        ),
        _step(
            "scores twice",
            "no matrix of T x T: one kernel finds each row's maximum, the other makes the scores again for "
            "the sum and o.",
            "76 MB instead of 856, for 6 D flops a pair instead of 4 D: 38.7 Gflop, 39 us at an H100's peak. "
            "On the CPU three of four passes over 50 MB of scores stay in the cache.",
            _least(6 * ROWS, 3, ALL, 2),
            scores_twice,
            cpu_by_queries(skip=False),
            f"the same, {QUERIES_AT_A_TIME} queries at a time",
            2.0,
        ),
        _step(
            "online softmax",
            "one pass: where a block of keys has a greater maximum, sum and o so far are scaled down to it.",
            "two products a pair instead of three: 26 us for the products on an H100, and as much for 101 "
            "million exponentials. On the CPU the scores were in the cache already, and there are more and "
            "smaller operations.",
            _least(4 * ROWS, 2, ALL),
            online(_first, skip=False, exp="exp"),
            cpu_online,
            f"{QUERIES_AT_A_TIME} queries by {KEYS_AT_A_TIME} keys at a time",
            0.9,
        ),
        _step(
            "keys that are seen",
            "blocks of keys after the last query are left out, and only blocks on the diagonal are masked.",
            "half of the pairs, half of the time: on an H100 13 us of products, and with 50 MB memory binds, "
            "15 us. A program does from 1 to 16 blocks now.",
            _least(4 * ROWS, 2, SEEN),
            online(_first, exp="exp"),
            cpu_by_queries(skip=True),
            f"{QUERIES_AT_A_TIME} queries at a time, keys up to the last",
            1.9,
        ),
        _step(
            "base 2, scaled once",
            "2^(c (s - m)) with c = log2(e) scale: a difference, a product and an exp2, where exp makes "
            "another product and takes three instructions more for results under 1e-38.",
            "four of about 13 instructions a pair fewer; bytes and products as before.",
            _least(4 * ROWS, 2, SEEN),
            online(_first),
        ),
        _step(
            "three stages",
            "keys and values of the next two blocks are on their way while this one is multiplied.",
            "a block no longer waits for its loads, some 500 clocks of each round: only latency falls.",
            _least(4 * ROWS, 2, SEEN),
            online(_pipelined),
        ),
        _step(
            "128 queries",
            "tiles of 128 x 64 and 8 warps (A100: 4), the shipped ones: half of the reads of k and v.",
            "k and v are asked for 8 times a head instead of 16, 113 MB instead of 214 where half is seen; "
            "memory's bytes are as before.",
            _least(4 * ROWS, 2, SEEN),
            online(_tall),
        ),
        _step(
            "128 keys",
            "tiles of 128 x 128: half of the rounds, and of the maxima, scalings and barriers.",
            "fewer instructions, but 64 scores and 32 of o a thread: more than 128 registers, so that one "
            "program fits an SM, and nobody multiplies while it waits.",
            _least(4 * ROWS, 2, SEEN),
            online(_square),
        ),
        _step(
            "an fma for the exponent",
            "back to 64 keys, and 2^(c s - c m): c m is one product for a row, c s - c m one fma a pair.",
            "an instruction of about 9 a pair fewer: it helps where instructions bind, not on an H100.",
            _least(4 * ROWS, 2, SEEN),
            online(_tall, exp="fma"),
            refused="the weight of the maximum is 1 but for what rounding c m leaves",
        ),
        _step(
            "the longest rows first",
            "the shipped kernel: back to 2^(c (s - m)), whose weight of the maximum is exactly 1; programs "
            "with the most keys start first; any T, padded widths, lse.",
            "the ceiling of step 7: none of this is in the loop, and no bound knows how a launch ends. On "
            "the CPU C++ has its tiles in L1, and no tensor for each operation.",
            _least(4 * ROWS, 2, SEEN),
            shipped,
            cpu_shipped,
            "native, C++",
            2.0,
        ),
    ],
)

if __name__ == "__main__":
    main(STUDY)
