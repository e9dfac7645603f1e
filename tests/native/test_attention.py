"""What is special to attention in C++ on the CPU: blocks of 64 queries, tiles of 64 keys, chunks of 512 keys
when decoding, the division among threads, and dropout's random numbers.

tests/ops/test_table.py has the accuracy, strides and composition that all operations share, at small shapes;
tests/ops/test_native.py the instruction sets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops import attention_calls
from ops.attention_calls import Recorded
from ops.helpers import DTYPES, assert_accurate
from torch import Tensor

from fastgpt import ops
from fastgpt.ops.library import native_missing, triton_missing

if missing := native_missing("attention", torch.device("cpu")):
    pytest.skip(missing, allow_module_level=True)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


run = functools.partial(attention_calls.run, backend="native")
compare = functools.partial(attention_calls.compare, backend="native")


# T: one block, full; the next all but empty; three. D: vectors of 4, 8 and 16 full, and not; the widest.
# Windows: narrower than a group of queries, wider than a tile, all but one key.
@dtypes
@pytest.mark.parametrize(
    ("length", "heads", "width", "options"),
    [
        (64, 2, 64, {}),
        (65, 2, 32, {}),
        (190, 1, 80, {}),
        (130, 1, 17, {}),
        (3, 25, 16, {}),
        (33, 1, 256, {}),
        (70, 1, 1, {}),
        (257, 1, 16, {"window": 5}),
        (257, 1, 64, {"window": 100}),
        (130, 1, 16, {"window": 129}),
        (66, 1, 16, {"scale": 0.5, "window": 3}),
    ],
)
def test_packed(length: int, heads: int, width: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    compare(
        [randn(1, length, 3, heads, width, dtype=dtype)],
        randn(1, length, heads, width, dtype=dtype),
        **options,
    )


# Chunked prefill: queries end with the keys, wherever in a tile they start.
@dtypes
@pytest.mark.parametrize(
    ("tq", "tk", "window"), [(130, 300, None), (20, 150, 50), (130, 200, 129), (17, 300, 10), (5, 600, None)]
)
def test_fewer_queries_than_keys(tq: int, tk: int, window: int | None, dtype: torch.dtype) -> None:
    q, k, v, do = (randn(1, n, 2, 16, dtype=dtype) for n in (tq, tk, tk, tq))
    compare([q, k, v], do, window=window)


# One chunk, several, the last with one key; a chunk that the first query does not see; a window inside one
# chunk and over two.
@dtypes
@pytest.mark.parametrize(
    ("tq", "tk", "window"), [(1, 300, None), (1, 1300, None), (4, 1025, None), (3, 1100, 600), (2, 700, 5)]
)
def test_decoding(tq: int, tk: int, window: int | None, dtype: torch.dtype) -> None:
    """A cache that is not full: what lies beyond is not read."""
    cache = randn(2, 2, tk + 100, 2, 64, dtype=dtype)
    cache[:, :, tk:] = torch.nan
    k, v = cache[:, :, :tk].unbind(0)
    compare([randn(2, tq, 2, 64, dtype=dtype), k, v], randn(2, tq, 2, 64, dtype=dtype), window=window)


@pytest.mark.parametrize(("tq", "tk"), [(1, 700), (3, 600), (5, 70), (70, 70)])
def test_lse(tq: int, tk: int) -> None:
    """In base 2, as the gradient and the other kernels have it."""
    q, k, v = (randn(2, n, 3, 32) for n in (tq, tk, tk))
    _, lse = torch.ops.fastgpt_native.attention_forward(q, k, v, None, 0.0, 0.3, None)
    s = 0.3 * torch.einsum("bihd,bjhd->bhij", q.double(), k.double())
    s.masked_fill_(~torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq), -math.inf)
    # s2 is a sum of 32 products, each rounded: errors of an ulp of the greatest partial sums, about 16.
    torch.testing.assert_close(lse.double(), s.logsumexp(-1) * math.log2(math.e), rtol=0, atol=16 * 2**-23)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("tq", "tk", "heads"), [(300, 300, 1), (130, 300, 2), (2, 1500, 1)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_threads_do_not_change_the_result(
    tq: int, tk: int, heads: int, window: int | None, dropout_p: float
) -> None:
    """A head to a thread, or heads cut into blocks of queries and of keys: the same bits."""
    q, k, v, do = (randn(1, n, heads, 20) for n in (tq, tk, tk, tq))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append(run([q, k, v], do, window=window, dropout_p=dropout_p))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def philox(seed: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox 4x32 of 7 rounds, from the paper (Salmon et al., SC 2011)."""
    c, key, word = list(counter), [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(7):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ key[0], second & word, (first >> 32) ^ c[3] ^ key[1], first & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return c


def factors(B: int, tq: int, tk: int, H: int, seed: int, p: float) -> Tensor:
    """z by its definition: word key % 4 of the counter (query, key / 4, head) decides. (B, H, Tq, Tk)"""
    z = torch.zeros(B * H, tq, tk, dtype=torch.float64)
    for head in range(B * H):
        for i in range(tq):
            for j in range(tk):
                w = philox(seed, (i, j // 4, head, 0))[j % 4]
                z[head, i, j] = (w ^ 0xFFFFFFFF if w >> 31 else w) * 4.6566127342e-10 >= p
    return z.view(B, H, tq, tk) / (1 - p)


@pytest.mark.parametrize(("tq", "tk", "window"), [(70, 70, None), (70, 70, 30), (9, 40, None), (20, 90, 33)])
@dtypes
def test_dropout(tq: int, tk: int, window: int | None, dtype: torch.dtype) -> None:
    """What is dropped is a function of seed and place alone, and backward drops what forward dropped."""
    p = 0.25
    inputs = [randn(1, n, 2, 24, dtype=dtype) for n in (tq, tk, tk)]
    do = randn(1, tq, 2, 24, dtype=dtype)
    torch.manual_seed(6)
    seed = int(torch.randint(2**63 - 1, (1,)))
    z = factors(1, tq, tk, 2, seed, p)
    hidden = ~torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(tk - tq - window)

    def equations(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        s = (q @ k.mT / math.sqrt(24)).masked_fill(hidden, -math.inf)
        o = ((z.to(dtype) * s.softmax(-1)) @ v).transpose(1, 2)
        return [o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))]

    torch.manual_seed(6)
    actual = run(inputs, do, window=window, dropout_p=p)
    for a, e, o in zip(actual, equations(dtype), equations(torch.float64), strict=True):
        assert_accurate(a, e, o)


def test_dropout_is_that_of_triton() -> None:
    """One seed drops the same in every kernel. Equal weights (q = 0) and one-hot values show what."""
    if reason := triton_missing(torch.device("cpu")):
        pytest.skip(reason)
    zero, eye = torch.zeros(1, 70, 2, 70), torch.eye(70)[None, :, None].expand(1, 70, 2, 70)
    z = []
    for backend in ("native", "triton"):
        torch.manual_seed(3)
        z.append(ops.causal_attention(zero, zero, eye, dropout_p=0.3, backend=backend) > 0)
    assert torch.equal(*z)


@dtypes
def test_one_key(dtype: torch.dtype) -> None:
    """The weight is 1: o is v, dv is do, dq and dk are 0, exactly, whatever the other queries see."""
    q, k, v, do = (randn(2, 70, 3, 40, dtype=dtype) for _ in range(4))
    o, dq, dk, dv = run([q, k, v], do, window=1)
    assert torch.equal(o, v)
    assert torch.equal(dv, do)
    assert not dq.any()
    assert not dk.any()
    o, dq, _, _ = run([q, k, v], do)
    assert torch.equal(o[:, 0], v[:, 0])
    assert not dq[:, 0].any()


@pytest.mark.parametrize("factor", [1e3, 1e-20])
def test_large_and_small_scores(factor: float) -> None:
    """One-hot and uniform weights: no overflow on the way."""
    q, k, v = randn(3, 1, 70, 1, 16).unbind(0)
    compare([factor * q, k, v], randn(1, 70, 1, 16))


@pytest.mark.parametrize("tk", [70, 600])
def test_a_bad_query_spoils_itself_alone(tk: int) -> None:
    k, v = randn(2, 1, tk, 1, 16).unbind(0)
    for tq in (3, 70):
        q = randn(1, tq, 1, 16)
        q[0, 1] = torch.nan
        o = ops.causal_attention(q, k, v, backend="native")
        assert o[0, 1].isnan().all()
        assert o[0, :1].isfinite().all()
        assert o[0, 2:].isfinite().all()


def test_no_keys_and_no_queries() -> None:
    """No batches, heads or queries: empty, and the gradients of keys that nothing sees are 0."""
    for shape in [(0, 5, 2, 16), (2, 5, 0, 16), (2, 0, 2, 16)]:
        o, *grads = run([randn(*shape)] * 3, randn(*shape))
        assert o.shape == shape
        assert all(x.shape == shape for x in grads)
    _, _, dk, dv = run([randn(1, 0, 2, 16), randn(1, 5, 2, 16), randn(1, 5, 2, 16)], randn(1, 0, 2, 16))
    assert not dk.any()
    assert not dv.any()


def test_packed_makes_no_copies() -> None:
    """Around the operators nothing runs but views, and the gradient is one tensor."""
    qkv, do = randn(2, 20, 3, 2, 16).requires_grad_(), randn(2, 20, 2, 16)
    with Recorded() as outside:
        (gradient,) = torch.autograd.grad(ops.causal_attention_qkvpacked(qkv, backend="native"), qkv, do)
    assert gradient.is_contiguous()
    assert outside.names <= {"attention_forward", "attention_backward", "detach"}
