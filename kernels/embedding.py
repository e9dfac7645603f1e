"""Token embedding plus position embedding.

    y_btc = Wt[idx_bt, c] + Wp[start + t, c]

    dWt[n, c] = sum over (b, t) with idx_bt = n of dy_btc
    dWp[start + t, c] = sum_b dy_btc

dWt without atomics: the tokens are sorted, stably, so that those of one value are neighbours in a fixed
order, a run. Runs are as uneven as words: in English text one token in twenty is a comma. So that no program
has a long one to itself, the sorted tokens are cut into chunks of CHUNK; the part of a run that lies in one
chunk is summed by one program, and written to dWt if it is the whole run. Of the runs that cross an edge, at
most one enters a chunk and one leaves it: those parts go to two rows of partial sums, and a second kernel
adds up the parts of a run, in order, from the chunk that it begins in.

Bytes, e an element's: forward 2 B T C e + T C e (a row of Wt for each token, y, Wp), backward 2 B T C e
(dy for each gradient) and the two gradients, of which dWt's zeros are most: V C e.

Launch: forward a tile of tokens x columns per program. Backward a program per GROUP of sorted tokens and
block of columns, for the parts that begin there; a program per position and block of columns for dWp.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.examples import MEMORY_BOUND, Example, meta
from fastgpt.kernels.launch import chip, launch, tile


class Config(NamedTuple):
    elements: int  # of a tile
    per_thread: int


COLUMNS = 1024  # of a tile at most: GPT-2's 768 in one, 1600 in two
# Memory-bound: bytes in flight count (see layer_norm.py). Rows of Wt are scattered, but of 1.5 KB or more.
FORWARD = {80: Config(1024, 8), 90: Config(1024, 8), 100: Config(2048, 16), 120: Config(1024, 8)}
# Four rows of 1024 columns at a time, 16 elements a thread: four loads in flight before the first sum.
BACKWARD = Config(4096, 16)
# The longest part of a run. 64 rows are 16 tiles one after another, some 15 us: less than the memory takes
# for a batch of 64k tokens. Partial sums are 8 C bytes a chunk at most, a sixteenth of dy in bf16.
CHUNK = 64
# About as long as a run is on average in such a batch: a program a token would mostly find nothing to do, and
# a program a chunk would go through its runs one after another.
GROUP = 8


@triton.jit
def _embedding_forward(
    idx_ptr, wt_ptr, wp_ptr, y_ptr, start, N, T, V, C, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(C, BLOCK)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_in, col_in = rows < N, cols < C
    mask = row_in[:, None] & col_in[None, :]
    token = tl.load(idx_ptr + rows, row_in, other=0)
    known = (token >= 0) & (token < V)  # a token out of range reads nothing, and gives NaN
    at = token[:, None] * C + cols[None, :]
    y = tl.load(wt_ptr + at, mask & known[:, None], other=float("nan")).to(tl.float32)
    at = (start + rows % T)[:, None] * C + cols[None, :]
    y += tl.load(wp_ptr + at, mask, other=0.0).to(tl.float32)
    at = rows[:, None] * C + cols[None, :]
    tl.store(y_ptr + at, y, mask)


@triton.jit
def _tokens_backward(
    dy_ptr,
    tokens_ptr,
    order_ptr,
    dwt_ptr,
    partials_ptr,
    N,
    V,
    C,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of runs that begin among this program's sorted tokens."""
    blocks = tl.cdiv(C, BLOCK)
    group = tl.program_id(0) // blocks * GROUP
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    col_in = cols < C
    for i in range(group, tl.minimum(group + GROUP, N)):
        within = i % CHUNK
        token = tl.load(tokens_ptr + i)
        before = tl.load(tokens_ptr + i - 1, i > 0, other=-1)
        if ((within == 0) | (before != token)) & (token >= 0) & (token < V):
            places = within + tl.arange(0, CHUNK)  # in the chunk
            same = (places < CHUNK) & (i - within + places < N)
            same &= tl.load(tokens_ptr + i - within + places, same, other=-1) == token
            count = tl.sum(same.to(tl.int32), 0)
            sums = tl.zeros([ROWS, BLOCK], tl.float32)
            for first in range(0, count, ROWS):
                parts = first + tl.arange(0, ROWS)
                row_in = parts < count
                rows = tl.load(order_ptr + i + parts, row_in, other=0)  # int64
                at = rows[:, None] * C + cols[None, :]
                mask = row_in[:, None] & col_in[None, :]
                sums += tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
            dw = tl.sum(sums, 0)
            after = tl.load(tokens_ptr + i + count, i + count < N, other=-1)
            if (before != token) & (after != token):
                tl.store(dwt_ptr + token.to(tl.int64) * C + cols, dw, col_in)
            else:  # row 0 of a chunk for the run at its beginning, row 1 for the one that leaves it
                row = tl.cast(i // CHUNK, tl.int64) * 2 + tl.where(within == 0, 0, 1)
                tl.store(partials_ptr + row * C + cols, dw, col_in)


@triton.jit
def _runs_backward(
    tokens_ptr, dwt_ptr, partials_ptr, N, V, C, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The whole run that begins in this program's chunk and leaves it, if there is one."""
    blocks = tl.cdiv(C, BLOCK)
    chunk = tl.program_id(0) // blocks
    chunks = tl.cdiv(N, CHUNK)
    end = (chunk + 1) * CHUNK
    if end >= N:
        return
    token = tl.load(tokens_ptr + end - 1)
    if tl.load(tokens_ptr + end) != token:
        return
    if (token < 0) | (token >= V):
        return
    whole = tl.load(tokens_ptr + chunk * CHUNK) == token
    if whole & (tl.load(tokens_ptr + chunk * CHUNK - 1, chunk > 0, other=-1) == token):
        return  # it began in a chunk before
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    col_in = cols < C
    row = chunk.to(tl.int64) * 2 + tl.where(whole, 0, 1)
    start = tl.load(partials_ptr + row * C + cols, col_in, other=0.0)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    first = chunk + 1
    more = True
    while more:
        parts = first + tl.arange(0, ROWS)
        same = tl.load(tokens_ptr + parts * CHUNK, parts < chunks, other=-1) == token
        mask = same[:, None] & col_in[None, :]
        at = parts.to(tl.int64)[:, None] * (2 * C) + cols[None, :]
        sums += tl.load(partials_ptr + at, mask, other=0.0)
        first += ROWS
        more = tl.sum(same.to(tl.int32), 0) == ROWS
    tl.store(dwt_ptr + token.to(tl.int64) * C + cols, start + tl.sum(sums, 0), col_in)


@triton.jit
def _positions_backward(dy_ptr, dwp_ptr, start, B, T, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(C, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    col_in = cols < C
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, B, ROWS):
        b = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (b < B)[:, None] & col_in[None, :]
        at = (b * T + t)[:, None] * C + cols[None, :]
        sums += tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
    tl.store(dwp_ptr + (start + t) * C + cols, tl.sum(sums, 0), col_in)


def _tile(width: int, config: Config) -> tuple[dict[str, int], int]:
    """(constants of the tile, blocks of columns)."""
    t = tile(width, elements=config.elements, per_thread=config.per_thread, widest=COLUMNS)
    return {"ROWS": t.rows, "BLOCK": t.columns, "num_warps": t.warps}, triton.cdiv(width, t.columns)


def embedding_forward(idx: Tensor, token_weight: Tensor, position_weight: Tensor, start: int) -> Tensor:
    idx, token_weight, position_weight = (x.contiguous() for x in (idx, token_weight, position_weight))
    vocab_size, width = token_weight.shape
    if idx.device.type == "cpu" and ((idx < 0) | (idx >= vocab_size)).any():
        raise IndexError("idx is out of range")
    dtype = torch.promote_types(token_weight.dtype, position_weight.dtype)
    y = torch.empty((*idx.shape, width), dtype=dtype, device=idx.device)
    options, blocks = _tile(width, FORWARD[chip(idx.device).family])
    launch(
        _embedding_forward,
        (triton.cdiv(idx.numel(), options["ROWS"]) * blocks,),
        *(idx, token_weight, position_weight, y, start, idx.numel(), idx.shape[1], vocab_size, width),
        **options,
    )
    return y


def embedding_backward(
    dy: Tensor,
    idx: Tensor,
    vocab_size: int,
    block_size: int,
    start: int,
    token_dtype: torch.dtype,
    position_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(dWt, dWp)."""
    dy = dy.contiguous()
    batch, length, width = dy.shape
    dwt = torch.zeros((vocab_size, width), dtype=token_dtype, device=dy.device)
    dwp = torch.zeros((block_size, width), dtype=position_dtype, device=dy.device)
    options, blocks = _tile(width, BACKWARD)
    # Sorting 32-bit keys takes half the passes of 64-bit ones; a token out of range stays one.
    tokens, order = idx.flatten().clamp(-1, vocab_size).to(torch.int32).sort(stable=True)
    count = tokens.numel()
    chunks = triton.cdiv(count, CHUNK)
    partials = torch.empty((chunks, 2, width), dtype=torch.float32, device=dy.device)
    sizes = (count, vocab_size, width)
    launch(
        _tokens_backward,
        (triton.cdiv(count, GROUP) * blocks,),
        *(dy, tokens, order, dwt, partials, *sizes),
        GROUP=GROUP,
        CHUNK=CHUNK,
        **options,
    )
    launch(_runs_backward, (chunks * blocks,), *(tokens, dwt, partials, *sizes), CHUNK=CHUNK, **options)
    launch(_positions_backward, (length * blocks,), *(dy, dwp, start, batch, length, width), **options)
    return dwt, dwp


def examples() -> Iterator[Example]:
    """GPT-2's narrowest and widest, which takes two blocks of columns."""
    for width, dtype in [(768, torch.bfloat16), (1600, torch.float32)]:
        idx = meta(8, 1024, dtype=torch.int64)
        wt, wp, dy = (meta(*shape, width, dtype=dtype) for shape in [(50257,), (1024,), (8, 1024)])
        forward = partial(embedding_forward, idx, wt, wp, 0)
        backward = partial(embedding_backward, dy, idx, 50257, 1024, 0, dtype, dtype)
        first = width == 768
        yield Example(f"embedding-forward-{width}", forward, {"_embedding_forward": MEMORY_BOUND}, first)
        requires = ("vector_load", "wide_offsets")  # a thread has 4 columns of the sums: 8 bytes of bf16
        names = ("_tokens_backward", "_runs_backward", "_positions_backward")
        yield Example(f"embedding-backward-{width}", backward, dict.fromkeys(names, requires), first)
