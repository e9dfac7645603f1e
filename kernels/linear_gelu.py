"""The first linear layer of the MLP with the bias addition and GELU in its epilogue.

    h = x W^T + b            x (M, K), W (N, K), b (N,), h (M, N); summed over K in fp32
    y = gelu(h)              of the fp32 sum; only the h that is saved for backward is rounded

    dh = dy * gelu'(h),  db = sum_rows dh        one elementwise pass: kernels/gelu.py
    dx = dh W,  dW = dh^T x                      plain products: cuBLAS, through torch

Bytes, e an element's: (M K + N K + M N) e forward, and M N e more where h is saved; flops 2 M N K. At GPT-2's
sizes in bf16 writing y and h takes almost as long as the product itself, so h is written once, in the
output's dtype, and not at all where nothing needs a gradient.

Launch: a program per tile of M x N. Tiles are numbered in groups of GROUP tiles of rows, down the rows first:
those that run at the same time then form a block near a square, which needs the least of x and W in L2. The
loop over K is pipelined through shared memory, `stages` deep.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.examples import Example, meta
from fastgpt.kernels.gelu import bias_gelu_backward, gate, gelu_backward
from fastgpt.kernels.launch import chip, launch
from fastgpt.kernels.tune import tunable, tuned

GROUP = 8  # tiles of rows: 8 x 16 of them are one wave of 128 tiles


class Config(NamedTuple):
    rows: int
    columns: int
    k: int
    warps: int
    stages: int


# 16-bit inputs. A tile of m x n reads m + n elements for m n products: the rate of the tensor cores and L2's
# bandwidth an SM say how large it must be.
#   80: 128 x 128 needs 32 of the 47 bytes a clock that L2 gives an SM. 48 KB of shared memory let two
#       programs share the SM: one multiplies while the other writes y and h, which takes as long for K = 768.
#   90: twice the tensor cores' rate on less L2 bandwidth: 128 x 256, by two warp groups.
#   100: as 90, with the accumulators in tensor memory until 8 warps read them out.
#   120: 99 KB of shared memory, so three stages for two programs; slower tensor cores than the A100's.
HALF = {
    80: Config(128, 128, 32, warps=4, stages=4),
    90: Config(128, 256, 64, warps=8, stages=3),
    100: Config(128, 256, 64, warps=8, stages=3),
    120: Config(128, 128, 32, warps=4, stages=3),
}
# For tune.py: other shapes of a tile, and more or less in flight for each.
_SMALL = [
    Config(128, 128, 32, 4, 3),
    Config(128, 128, 32, 8, 4),
    Config(128, 64, 32, 4, 4),
    Config(128, 256, 32, 8, 3),
]
_LARGE = [
    Config(128, 256, 64, 8, 4),
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 64, 4, 4),
]
CANDIDATES = {80: _SMALL, 90: _LARGE, 100: _LARGE, 120: _SMALL}
# fp32, by FMA or tf32 tensor cores: operands take twice the shared memory, and those of FMA registers too.
FLOAT = Config(64, 64, 32, warps=4, stages=3)
# Decoding: reading W is all the work, so by as many programs as possible; an mma takes 16 rows at least.
FEW_ROWS = 16
FEW = Config(FEW_ROWS, 32, 128, warps=4, stages=3)


@triton.jit
def _epilogue(h, b_ptr, y_ptr, h_ptr, rows, row_in, N, TANH: tl.constexpr):
    """Bias, GELU and the writes, for at most 32 columns at a time: a whole tile does not fit the registers.

    Pointers are to the first column; `rows` are the offsets of the rows; N columns are left.
    """
    COLUMNS: tl.constexpr = h.shape[1]
    if COLUMNS > 32:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(h.reshape(h.shape[0], 2, HALF).permute(0, 2, 1))
        _epilogue(left, b_ptr, y_ptr, h_ptr, rows, row_in, N, TANH)
        if b_ptr is not None:
            b_ptr += HALF
        if h_ptr is not None:
            h_ptr += HALF
        _epilogue(right, b_ptr, y_ptr + HALF, h_ptr, rows, row_in, N - HALF, TANH)
    else:
        cols = tl.arange(0, COLUMNS)[None, :]
        mask = row_in & (cols < N)
        if b_ptr is not None:
            h += tl.load(b_ptr + cols, cols < N, other=0.0).to(tl.float32)
        if h_ptr is not None:
            tl.store(h_ptr + rows + cols, h, mask)
        tl.store(y_ptr + rows + cols, h * gate(h, TANH), mask)


@triton.jit
def _linear_gelu(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    h_ptr,
    M,
    N,
    K,
    w_n_stride,
    w_k_stride,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    within = tl.program_id(0) % (GROUP * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP, GROUP)  # the last group may be lower
    tile_m = group * GROUP + within % group_rows
    tile_n = within // group_rows
    # 64-bit offsets of the tile, in scalars, and 32-bit ones within it: half the registers of 64-bit tensors.
    first_row, first_col = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    rows, cols, ks = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)
    row_in, col_in = rows < M - first_row, cols < N - first_col
    x_ptr += first_row * K
    w_ptr += first_col * w_n_stride
    x_at = rows * K + ks[None, :]
    w_at = cols * w_n_stride + ks[:, None] * w_k_stride
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if WHOLE:  # K is a multiple of BLOCK_K: masks that do not change in the loop
            x = tl.load(x_ptr + x_at, row_in, other=0.0)
            w = tl.load(w_ptr + w_at, col_in, other=0.0)
        else:
            x = tl.load(x_ptr + x_at, row_in & (ks < K - start)[None, :], other=0.0)
            w = tl.load(w_ptr + w_at, col_in & (ks < K - start)[:, None], other=0.0)
        h = tl.dot(x, w, h, input_precision=PRECISION)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K * w_k_stride
    y_ptr += first_row * N + first_col
    if h_ptr is not None:
        h_ptr += first_row * N + first_col
    if b_ptr is not None:
        b_ptr += first_col
    _epilogue(h, b_ptr, y_ptr, h_ptr, rows * N, row_in, N - first_col, TANH)


@tunable
def linear_gelu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, save: bool
) -> tuple[Tensor, Tensor]:
    """(y, h); h has shape (0,) unless `save`."""
    x = x.contiguous()
    if 1 not in weight.stride():  # rows or columns of W in one piece: a transposed view is read as it is
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    h = torch.empty_like(y) if save else x.new_empty(0)
    M = x.shape[:-1].numel()
    c = _config(x, M)
    launch(
        _linear_gelu,
        (triton.cdiv(M, c.rows) * triton.cdiv(N, c.columns),),
        *(x, weight, bias, y, h if save else None, M, N, K, *weight.stride()),
        TANH=approximate == "tanh",
        PRECISION=_precision() if x.dtype == torch.float32 else "tf32",  # 16 bits have one
        WHOLE=K % c.k == 0,
        BLOCK_M=c.rows,
        BLOCK_N=c.columns,
        BLOCK_K=c.k,
        GROUP=GROUP,
        num_warps=c.warps,
        num_stages=c.stages,
        enable_fp_fusion=True,  # sums within a thread only: no lanes that could disagree
    )
    return y, h


def _config(x: Tensor, rows: int) -> Config:
    if rows <= FEW_ROWS:
        return FEW
    if x.dtype == torch.float32:
        return FLOAT
    family = chip(x.device).family
    return tuned("linear_gelu", HALF[family], CANDIDATES[family])


def _precision() -> str:
    """For fp32: cuBLAS's, so tf32 only where the user allows it, and fused multiply-adds otherwise."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def linear_gelu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    approximate: str,
    has_bias: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db), each of shape (0,) where it is not needed."""
    if has_bias:
        dh, db = bias_gelu_backward(dy, h, None, approximate)
    else:
        dh, db = gelu_backward(dy, h, approximate), h.new_empty(0)
    dx, dw = x.new_empty(0), weight.new_empty(0)
    (N, K), M = weight.shape, x.shape[:-1].numel()
    dh = dh.view(M, N)
    with torch.autocast(
        x.device.type, enabled=False
    ):  # backward inside an autocast region casts nothing again
        if need_dx:
            dx = (dh @ weight).view(x.shape)
        if need_dw:
            dw = dh.T @ x.reshape(M, K)
    return dx, dw, db


def examples() -> Iterator[Example]:
    """GPT-2's smallest and largest MLP, with W as torch.nn.Linear and Hugging Face's Conv1D store it."""
    for rows, width, dtype in [
        (8192, 768, torch.bfloat16),
        (8192, 1600, torch.float16),
        (8192, 784, torch.bfloat16),  # not a multiple of any tile
        (8192, 768, torch.float32),
        (1, 768, torch.bfloat16),  # decoding
    ]:
        training, half = rows > FEW_ROWS, dtype != torch.float32
        requires = ["vector_load"] + ["vector_store"] * training + ["tensor_cores"] * (training and half)
        x, b = meta(rows, width, dtype=dtype), meta(4 * width, dtype=dtype)
        for layout, w in [
            ("linear", meta(4 * width, width, dtype=dtype)),
            ("conv1d", meta(width, 4 * width, dtype=dtype).T),
        ]:
            yield Example(
                f"{layout}-{rows}x{width}-{str(dtype).removeprefix('torch.')}",
                partial(linear_gelu_forward, x, w, b, "tanh", training),
                {"_linear_gelu": tuple(requires)},
                every_chip=width == 768,
            )
    x, w = meta(8192, 768), meta(3072, 768)
    yield Example(
        "erf-no-bias", partial(linear_gelu_forward, x, w, None, "none", True), {"_linear_gelu": ()}, True
    )
    h = meta(8192, 3072)
    yield Example(
        "backward",
        partial(bias_gelu_backward, h, h, None, "tanh"),
        {"_bias_gelu_backward": ("vector_load", "vector_store", "wide_offsets")},
        every_chip=True,
    )
