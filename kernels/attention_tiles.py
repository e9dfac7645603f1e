"""What the attention kernels share: reading tiles, which pairs are seen or dropped, and tile sizes.

Matrix products take their operands in the dtype of the inputs and accumulate in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import chip

LOG2E = tl.constexpr(1.4426950408889634)
# Products of fp32 tiles: each operand as a sum of two tf32 numbers, three products on the tensor cores, which
# keep 21 bits or more of 24; PyTorch's memory-efficient attention does the same. One tf32 product, the
# default of `tl.dot`, keeps 10, and "ieee", on the FMA units, spills: it holds whole rows of operands in
# registers.
PRECISION = tl.constexpr("tf32x3")
# Philox with 7 rounds passes BigCrush (Salmon et al., 2011); 10, its default, is a safety margin.
ROUNDS = tl.constexpr(7)


@triton.jit
def head_start(batch, head, batch_stride, head_stride):
    """Offset of the (T, D) matrix of one batch and head."""
    return tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def load_tile(
    ptr,
    first,
    limit,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Rows first, first + 1, ... of a (limit, D) matrix, zero past D and, if BOUNDED, past `limit`.

    The first row's offset is 64-bit, and a scalar; within the tile 32 bits are enough.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    at = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    if BOUNDED:
        mask = (rows < limit - first)[:, None]
        if D < BLOCK_D:
            mask = mask & (dims < D)[None, :]
        x = tl.load(at, mask, other=0.0)
    elif D < BLOCK_D:
        x = tl.load(at, (dims < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def load_columns(ptr, first, limit, stride, column, ROWS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns `column` to column + CHUNK - 1 of such rows, zero past D and past `limit`."""
    rows = tl.arange(0, ROWS)
    dims = column + tl.arange(0, CHUNK)
    at = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    return tl.load(at, (rows < limit - first)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def dot_rows(
    a_ptr,
    a_first,
    a_limit,
    a_stride,
    b_ptr,
    b_first,
    b_limit,
    b_stride,
    A: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """a b^T, (A, B), for A rows of one matrix and B of another, CHUNK columns at a time.

    A loop that is not unrolled: a's rows are the same in each step of the loop around this one, and the
    compiler would keep them in registers, where the tf32 halves of rows of 256 take all that there are.
    """
    product = tl.zeros([A, B], tl.float32)
    for column in range(0, D, CHUNK):
        a = load_columns(a_ptr, a_first, a_limit, a_stride, column, A, D, CHUNK)
        b = load_columns(b_ptr, b_first, b_limit, b_stride, column, B, D, CHUNK)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def store_tile(ptr, x, first, limit, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    at = ptr + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), (rows < limit - first)[:, None] & (dims < D)[None, :])


@triton.jit
def seen(positions, keys, window, WINDOWED: tl.constexpr):
    """Whether queries at `positions` see `keys`; the two broadcast to a tile."""
    visible = keys <= positions
    if WINDOWED:
        visible = visible & (keys > positions - window)
    return visible


@triton.jit
def kept(seed_ptr, head, first_query, first_key, dropout_p, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which weights of a (QUERIES, KEYS) tile dropout keeps, a function of seed, head, query and key alone.

    A Philox counter is (query, key / 4, head): its four words belong to four neighbouring keys. Every kernel
    draws the same, whatever its tiles, if their first key is a multiple of 4.
    """
    queries = first_query + tl.arange(0, QUERIES)[:, None]
    fours = first_key // 4 + tl.arange(0, KEYS // 4)[None, :]
    zeros = queries * 0 + fours * 0
    a, b, c, d = tl.philox(tl.load(seed_ptr), queries + zeros, fours + zeros, head + zeros, zeros, ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(QUERIES, KEYS)  # keys in the order a, b, c, d
    return tl.uint_to_uniform_float(words) >= dropout_p


class Config(NamedTuple):
    """A program's own rows (queries, or keys for dk and dv), the rows of a step of its loop, and how.

    `chunk` is how many columns of q and k, and of do and v, are multiplied at a time: 256 is all.
    """

    rows: int
    step: int
    warps: int
    stages: int
    chunk: int = 256


class Strides(NamedTuple):
    """Of a (B, T, H, D) tensor, in elements; D's is 1."""

    batch: int
    token: int
    head: int


def strides(x: Tensor) -> Strides:
    return Strides(*x.stride()[:3])


def dense_heads(x: Tensor) -> Tensor:
    """x itself if the elements of a head are neighbours, as in every view of packed qkv or of a cache."""
    return x if x.stride(-1) == 1 else x.contiguous()


def split_packed(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (B, T, H, D) each with dense heads; q alone is all three, (B, T, 3, H, D)."""
    if k is None or v is None:
        q, k, v = dense_heads(q).unbind(2)
    return dense_heads(q), dense_heads(k), dense_heads(v)


def block_d(width: int) -> int:
    """Tiles are a power of two wide, and 16 is the least that tensor cores multiply."""
    return max(16, triton.next_power_of_2(width))


Table = dict[int, dict[int, Config]]


def choose(
    halves: Table,
    fp32: dict[int, Config],
    x: Tensor,
    *,
    dropout: Config | None,
    half_step: bool = False,
) -> Config:
    """The launch of a kernel for the dtype and the head size of x on its chip.

    Drawing the numbers of dropout takes about as many registers as the scores themselves: heads up to 64 in 2
    bytes get `dropout`, others half the rows. `half_step` is for what else would spill: 32 at least, since of
    tiles with more columns than rows Triton deals the columns to the warps, where of others each warp holds
    all columns of its rows.
    """
    table = fp32 if x.dtype == torch.float32 else halves[chip(x.device).family]
    width = block_d(x.shape[-1])
    config = table[min(limit for limit in table if width <= limit)]
    if dropout is not None:
        if table is not fp32 and width <= 64:
            return dropout
        config = config._replace(rows=max(config.rows // 2, 16))
    return config._replace(step=max(config.step // 2, 32)) if half_step else config


def most_registers(x: Tensor, *, crowded: bool, widest: int = 48) -> int | None:
    """`maxnreg` of a launch on heads of x: all that a thread can have where heads are narrow and `crowded`.

    Told no limit, ptxas keeps to what lets one program more fit an SM (80, 96, 128 or 168 registers with 4
    warps), even where it then spills: 8 to 24 bytes at up to `widest` channels, in fp32 up to 80; at which
    differs between versions of Triton.
    """
    return 255 if crowded and x.shape[-1] <= (80 if x.dtype == torch.float32 else widest) else None


def has_alternatives(q: Tensor, seed: Tensor | None, windowed: bool) -> bool:
    """Whether tuning has other choices: for heads of 64, GPT-2's at every size, in 2 bytes.

    Dropout, a window and wider heads take the registers that another choice would need.
    """
    return q.element_size() == 2 and q.shape[-1] == 64 and seed is None and not windowed
