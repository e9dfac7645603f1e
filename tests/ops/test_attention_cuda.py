"""What is special to attention in CUDA C++: tiles of 16 bits and their masks, fp32, shares of keys, dropout's
numbers, and rows that are not aligned. On the CPU in the emulator, and on a GPU where there is one.

test_table.py has the accuracy, repeatability, strides and composition that all operations share.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import cuda_emulator
import numpy as np
import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops.library import native_missing

from . import attention_calls
from .helpers import assert_accurate

device = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "native" if device == "cuda" else "emulated"
missing = native_missing("attention", torch.device(device)) if device == "cuda" else cuda_emulator.absent()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    if BACKEND == "emulated" and missing is None:
        cuda_emulator.loaded()


@pytest.fixture
def any_schedule() -> Iterator[None]:
    yield
    cuda_emulator.set_schedule(os.environ.get("FASTGPT_EMULATOR_SCHEDULE", "greedy"))


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


run = functools.partial(attention_calls.run, backend=BACKEND)
compare = functools.partial(attention_calls.compare, backend=BACKEND)


# Blocks have 128 rows, at heads of 256 64; tiles 64, 32 or 16; in fp32 16 or 8 rows and tiles of 32. T: full
# blocks; blocks and tiles with one row; several. D: 64, 128 and 256 fill their tiles, 80 and 96 do not; 20
# and 1 are padded to a multiple of 8. Windows: narrower than a tile; one key; whole tiles between the masked
# ones; the last that hides anything.
@pytest.mark.parametrize(
    ("length", "heads", "width", "dtype", "options"),
    [
        (128, 1, 64, BF16, {}),
        (257, 2, 64, BF16, {}),
        (257, 1, 64, FP16, {"window": 200}),
        (257, 1, 64, BF16, {"window": 70}),
        (70, 2, 16, BF16, {"window": 1}),
        (130, 1, 64, FP16, {"window": 129}),
        (66, 3, 80, BF16, {"scale": 0.5, "window": 3}),
        (129, 1, 96, FP16, {}),
        (193, 1, 128, BF16, {"window": 100}),
        (65, 1, 256, FP16, {"window": 33}),
        (65, 2, 160, BF16, {}),
        (40, 2, 20, BF16, {}),
        (40, 1, 1, FP16, {}),
        (49, 2, 64, FP32, {"window": 20}),
        (35, 1, 65, FP32, {}),
        (33, 1, 256, FP32, {}),
        (70, 1, 3, FP32, {"scale": 0.5}),
    ],
    ids=str,
)
def test_packed(length: int, heads: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    qkv = randn(1, length, 3, heads, width, dtype=dtype)
    compare([qkv], randn(1, length, heads, width, dtype=dtype), **options)


# Prefill in chunks: queries end with the keys, whatever the tile in which they start. With a window, the
# first keys are seen by none. 67 of 100: of a tile a warp sees its first key alone, with its last query.
# 70 of 100: it sees all of a tile but for the last key, which its first query does not see.
@pytest.mark.parametrize(
    ("tq", "tk", "width", "window"),
    [
        (130, 300, 64, None),
        (67, 100, 64, None),
        (70, 100, 64, None),
        (20, 150, 64, 50),
        (130, 200, 128, 129),
        (17, 300, 256, 10),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_fewer_queries_than_keys(
    tq: int, tk: int, width: int, window: int | None, dtype: torch.dtype
) -> None:
    q, k, v, do = (randn(1, n, 1, width, dtype=dtype) for n in (tq, tk, tk, tq))
    compare([q, k, v], do, window=window)


# At least 256 keys a share: none, several, the last with one key and seen by the last query alone; a window
# inside a share and over two.
@pytest.mark.parametrize(
    ("tq", "tk", "window"), [(1, 250, None), (1, 900, None), (16, 641, None), (3, 900, 400), (2, 900, 5)]
)
@pytest.mark.parametrize("width", [64, 80])
def test_decoding(tq: int, tk: int, window: int | None, width: int) -> None:
    """A cache that is not full: what lies beyond is not read."""
    cache = randn(2, 2, tk + 64, 1, width)
    cache[:, :, tk:] = torch.nan
    k, v = cache[:, :, :tk].unbind(0)
    compare([randn(2, tq, 1, width), k, v], randn(2, tq, 1, width), window=window)


def test_shares_and_whole_rows_agree() -> None:
    """17 queries are too many to share the keys; lse too is the same but for the order of its sum."""
    q, k, v = randn(1, 17, 1, 64), randn(1, 700, 1, 64), randn(1, 700, 1, 64)
    forward = getattr(torch.ops, f"fastgpt_{BACKEND}").attention_forward
    _, whole = forward(q, k, v, None, 0.0, None, None)
    _, shared = forward(q[:, 1:], k, v, None, 0.0, None, None)
    # A sum of 700 weights, each rounded, in two orders: 700 eps of it at most, and log2 of that.
    torch.testing.assert_close(shared, whole[..., 1:], rtol=0, atol=700 * 2**-24 * math.log2(math.e))


@pytest.mark.parametrize("tq", [70, 3])
def test_a_bad_query_spoils_itself_alone(tq: int) -> None:
    q, k, v = randn(1, tq, 1, 64), randn(1, 600, 1, 64), randn(1, 600, 1, 64)
    q[0, 1] = torch.nan
    o = ops.causal_attention(q, k, v, backend=BACKEND)
    assert o[0, 1].isnan().all()
    assert o[0, :1].isfinite().all()
    assert o[0, 2:].isfinite().all()


# Not 1e3 in fp32: backward has an lse of thousands, rounded, in the exponent of every weight.
@pytest.mark.parametrize(("factor", "dtype"), [(1e3, BF16), (1e-20, BF16), (1e-20, FP32)], ids=str)
def test_large_and_small_scores(factor: float, dtype: torch.dtype) -> None:
    """One-hot and uniform weights: no overflow on the way."""
    q, k, v = randn(3, 1, 70, 1, 16, dtype=dtype).unbind(0)
    compare([factor * q, k, v], randn(1, 70, 1, 16, dtype=dtype))


def test_layouts() -> None:
    """Heads that share keys (stride 0), a strided last dimension, a transposed layout: aligned and not."""
    q = randn(1, 2, 20, 16).transpose(1, 2)
    k = randn(1, 20, 1, 16).expand(1, 20, 2, 16)
    v = randn(1, 20, 16, 2).transpose(2, 3)
    compare([q, k, v], randn(1, 20, 1, 1).expand(1, 20, 2, 16))
    odd = randn(1, 20, 2, 19)[..., 1:17]
    compare([odd, odd, odd], randn(1, 20, 2, 16))
    qkv = randn(1 + 20 * 3 * 2 * 16)[1:].view(1, 20, 3, 2, 16)
    compare([qkv], randn(1 + 20 * 2 * 16)[1:].view(1, 20, 2, 16))


def factors(heads: int, tq: int, tk: int, seed: int, p: float) -> Tensor:
    """z by its definition: word key % 4 of Philox's counter (query, key / 4, head). (1, H, Tq, Tk)"""
    word = np.uint64(0xFFFFFFFF)
    shape = (heads, tq, tk // 4 + 1)
    head, query, four = (x.astype(np.uint64) for x in np.indices(shape))
    c = [query, four, head, np.zeros(shape, np.uint64)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [
            (b >> shift) ^ c[1] ^ np.uint64(key[0]),
            b & word,
            (a >> shift) ^ c[3] ^ np.uint64(key[1]),
            a & word,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    words = np.stack(c, -1).reshape(heads, tq, -1)[..., :tk].astype(np.uint32).view(np.int32)
    uniform = np.where(words < 0, ~words, words).astype(np.float32) * np.float32(4.6566127342e-10)
    return torch.from_numpy((uniform >= np.float32(p)) / (1 - p))[None].to(device)


@pytest.mark.parametrize(
    ("tq", "tk", "window", "dtype", "width"),
    [
        (96, 96, None, BF16, 64),
        (70, 70, 40, FP16, 128),
        (33, 90, None, BF16, 256),
        (3, 600, None, BF16, 64),
        (41, 60, 20, FP32, 24),
    ],
    ids=str,
)
def test_dropout(tq: int, tk: int, window: int | None, dtype: torch.dtype, width: int) -> None:
    """What is dropped follows from seed, head, query and key, as in the other kernels; backward drops it."""
    p = 0.25
    inputs = [randn(1, n, 2, width, dtype=dtype) for n in (tq, tk, tk)]
    do = randn(1, tq, 2, width, dtype=dtype)
    torch.manual_seed(6)
    z = factors(2, tq, tk, int(torch.randint(2**63 - 1, (1,), device=device)), p)
    hidden = ~torch.ones(tq, tk, dtype=torch.bool, device=device).tril(tk - tq)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(tk - tq - window)

    def equations(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        s = (q @ k.mT / math.sqrt(width)).masked_fill(hidden, -math.inf)
        o = ((z.to(dtype) * s.softmax(-1)) @ v).transpose(1, 2)
        return [o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))]

    results = []
    for _ in range(2):
        torch.manual_seed(6)
        results.append(run(inputs, do, window=window, dropout_p=p))
    for a, b, e, o in zip(*results, equations(dtype), equations(torch.float64), strict=True):
        assert torch.equal(a, b)
        assert_accurate(a, e, o.cpu())


@pytest.mark.skipif(BACKEND != "emulated", reason="a GPU has its own schedule")
@pytest.mark.parametrize(
    ("tq", "tk", "width", "dtype", "dropout_p"),
    [
        (130, 130, 64, BF16, 0.1),
        (70, 100, 128, FP16, 0.0),
        (33, 70, 256, BF16, 0.0),
        (3, 600, 64, BF16, 0.0),
        (20, 70, 24, FP32, 0.1),
    ],
    ids=str,
)
def test_every_schedule_gives_the_same(
    tq: int, tk: int, width: int, dtype: torch.dtype, dropout_p: float, any_schedule: None
) -> None:
    q, k, v, do = (randn(1, n, 1, width, dtype=dtype) for n in (tq, tk, tk, tq))
    results = []
    for schedule in cuda_emulator.SCHEDULES:
        cuda_emulator.set_schedule(schedule)
        torch.manual_seed(1)
        results.append(run([q, k, v], do, dropout_p=dropout_p))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_operators_check_what_the_public_function_does() -> None:
    forward = getattr(torch.ops, f"fastgpt_{BACKEND}").attention_forward
    x = randn(1, 2, 1, 257)
    with pytest.raises(ValueError, match="the head size is 257: kernels take 1 to 256"):
        forward(x, x, x, None, 0.0, None, None)
    q, k = randn(1, 2, 1, 16), randn(1, 2, 1, 16, dtype=FP16)
    with pytest.raises(
        ValueError, match="q, k and v have dtypes BFloat16, Half and Half: they must be the same"
    ):
        forward(q, k, k, None, 0.0, None, None)


MUTANTS = {
    "csrc/cuda/attention_forward.cuh": [
        ("total[r][i] *= shrink;", "", "tests/ops/test_attention_cuda.py -k packed"),
        (
            "ptx::exp2(shares.maxima[share * rows + row] - m);",
            "1.0f;",
            "tests/ops/test_attention_cuda.py -k decoding",
        ),
    ],
    "csrc/cuda/attention_backward.cuh": [
        (
            "zp = kept(n, e) ? zp * kept_scale : 0.0f;",
            "zp = kept(n, e) ? zp : 0.0f;",
            "tests/ops/test_attention_cuda.py -k dropout",
        ),
        ("dk_acc[0][n][e] *= a.scale;", ";", "tests/ops/test_attention_cuda.py -k packed"),
    ],
    "csrc/cuda/attention_pairs.cuh": [
        ("last_key > first_position - window;", "last_key > first_position - window + 1;"),
    ],
    "csrc/cuda/attention_tiles.cuh": [
        (
            "chunk * kChunk < D ? limit - first : 0",
            "limit - first",
            "tests/ops/test_attention_cuda.py -k packed",
        ),
    ],
    "csrc/cuda/attention_fp32.cuh": [
        (
            "total[r] = fmaf(total[r], shrink, s[r]);",
            "total[r] += s[r];",
            "tests/ops/test_attention_cuda.py -k packed",
        ),
        ("s[r] = z * p;", "s[r] = p;", "tests/ops/test_attention_cuda.py -k dropout"),
    ],
}
