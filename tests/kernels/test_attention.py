"""What is special to attention: tiles, masks, shares of keys, dropout, and no copies.

tests/ops/test_table.py has the accuracy, repeatability, strides and composition that all operations share, at
small shapes and in all dtypes; tests/ops/test_operators.py their memory. Interpreted, a program takes
milliseconds for each tile: one head wherever heads do not matter, and half precision, whose tiles are larger.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from ops import attention_calls
from ops.attention_calls import Recorded, run
from ops.helpers import assert_accurate
from torch import Tensor
from torch.library import opcheck

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.kernels import attention, attention_backward
from fastgpt.ops.attention import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy, of rows past Tq that are not stored

MUTANTS = {
    "kernels/attention_tiles.py": [
        ("visible = keys <= positions\n", "visible = keys < positions\n"),
        ("visible & (keys > positions - window)", "visible & (keys >= positions - window)"),
        ("mask = (rows < limit - first)[:, None]\n", "mask = (rows <= limit - first)[:, None]\n"),
        ("fours = first_key // 4", "fours = first_key * 0"),
        (">= dropout_p\n", ">= 0.9 * dropout_p\n"),
        ("for column in range(0, D, CHUNK):\n", "for column in range(0, D - CHUNK + 1, CHUNK):\n"),
        ("(rows < limit - first)[:, None] & (dims < D)[None, :], other", "(dims < D)[None, :], other"),
        ("dims = column + tl.arange(0, CHUNK)\n", "dims = tl.arange(0, CHUNK)\n"),
    ],
    "kernels/attention.py": [
        ("a = tl.exp2((m - anchor) * scale2)\n", "a = tl.exp2(anchor - anchor)\n"),
        ("anchor = tl.where(m_next == -float(\"inf\"), 0.0, m_next)\n", "anchor = m_next\n"),
        ("tl.minimum((first_position + 1) // KEYS", "tl.minimum((first_position + 64) // KEYS"),
        ("edge = tl.cdiv(tl.maximum(first_position + QUERIES - window, 0), KEYS) * KEYS\n", "edge = start\n"),
        ("stop = tl.minimum(stop, start + share)\n", "stop = tl.minimum(stop, start + share - KEYS)\n"),
        ("weight = tl.exp2(m_s - m)\n", "weight = tl.exp2(m - m_s)\n"),
        ("total = tl.sum(weight * total_s, 0)\n", "total = tl.sum(total_s, 0)\n"),
        ("total *= 1 - dropout_p\n", "total *= 1\n"),
    ],
    "fastgpt/ops/attention.py": [("q = q * (-1.0 if scale else 0.0)\n", "pass\n")],
    "kernels/attention_backward.py": [
        ("diagonal = (first_position + 1)", "diagonal = (first_position + 64)"),
        ("ds = p * (dp - delta[:, None])\n", "ds = p * dp\n"),
        ("store_tile(dq_ptr, dq * scale,", "store_tile(dq_ptr, dq,"),
        ("dp = tl.where(keep, dp / (1 - dropout_p), 0.0)\n", "dp = tl.where(keep, dp, 0.0)\n"),
        ("edge = tl.minimum(edge, diagonal)\n", "edge = start\n"),
        ("ds = p * (dp - delta[None, :])\n", "ds = p * dp\n"),
        ("dk * scale, first_key", "dk, first_key"),
        ("zp = tl.where(keep, p * factor, 0.0)\n", "zp = p * factor\n"),
        ("whole = tl.cdiv(tl.maximum(first_key + KEYS - 1 - offset, 0), QUERIES) * QUERIES", "whole = start"),
        ("tl.minimum(first_key + KEYS - 1 + window", "tl.minimum(first_key + window"),
        ("edge = tl.maximum(first_key + window - offset, 0) // QUERIES * QUERIES\n", "edge = stop\n"),
    ],
}  # fmt: skip


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


compare = functools.partial(attention_calls.compare, backend="triton")


# Tiles are 128 x 64 up to heads of 64, less beyond. T: a tile that is full; one, two and three blocks of
# queries with the last all but empty. D: 64 and 16 fill their tiles, 80 and 96 are padded to 128, 20 to 32,
# with rows that no vector load divides. H: 25 is GPT-2 XL's. Windows: narrower than a tile; with blocks
# masked at the edge, whole, and on the diagonal; of one key; the last that hides anything.
@pytest.mark.parametrize(
    ("length", "heads", "width", "options"),
    [
        (257, 1, 64, {}),
        (64, 1, 80, {}),
        (200, 1, 96, {}),
        (3, 25, 16, {}),
        (33, 1, 256, {}),
        (70, 1, 20, {}),
        (257, 1, 16, {"window": 70}),
        (257, 1, 64, {"window": 200}),
        (70, 1, 16, {"window": 1}),
        (130, 1, 16, {"window": 129}),
        (66, 1, 16, {"scale": 0.5, "window": 3}),
    ],
)
def test_packed(length: int, heads: int, width: int, options: dict[str, Any]) -> None:
    compare([randn(1, length, 3, heads, width)], randn(1, length, heads, width), **options)


# fp32 beyond 64 multiplies rows in chunks of 64 columns: 128 is whole chunks, 80 and 160 end within one, 65
# leaves one column to the last.
@pytest.mark.parametrize(
    ("dtype", "length", "width", "options"),
    [
        (torch.float16, 130, 64, {}),
        (torch.float32, 70, 64, {}),
        (torch.float32, 35, 65, {}),
        (torch.float32, 35, 80, {"window": 18}),
        (torch.float32, 49, 128, {}),
        (torch.float32, 67, 160, {"window": 34}),
        (torch.float32, 33, 256, {}),
    ],
    ids=str,
)
def test_other_dtypes(dtype: torch.dtype, length: int, width: int, options: dict[str, Any]) -> None:
    qkv, do = randn(1, length, 3, 1, width, dtype=dtype), randn(1, length, 1, width, dtype=dtype)
    compare([qkv], do, **options)


# Prefill in chunks: queries end with the keys, whatever the tile in which they start.
@pytest.mark.parametrize(
    ("tq", "tk", "window"), [(130, 300, None), (20, 150, 50), (130, 200, 129), (17, 300, 10)]
)
def test_fewer_queries_than_keys(tq: int, tk: int, window: int | None) -> None:
    compare([randn(1, n, 1, 16) for n in (tq, tk, tk)], randn(1, tq, 1, 16), window=window)


# One query, several, all that share a tile; shares that some queries do not see; a window inside one share.
@pytest.mark.parametrize(
    ("tq", "tk", "window"), [(1, 300, None), (3, 257, None), (16, 260, None), (2, 300, 150), (3, 300, 5)]
)
def test_shares_of_keys(tq: int, tk: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, with shares small enough that these keys make several, and a cache that is not full."""
    launched = []
    launch = attention.launch
    monkeypatch.setattr(attention, "SPLIT_KEYS", 64)
    monkeypatch.setattr(
        attention, "launch", lambda f, *a, **o: (launched.append(f.__name__), launch(f, *a, **o))
    )
    cache = randn(2, 1, 512, 1, 64)
    cache[:, :, tk:] = torch.nan
    compare([randn(1, tq, 1, 64), *cache[:, :, :tk].unbind(0)], randn(1, tq, 1, 64), window=window)
    assert ("_attention_combine" in launched) == (window != 5)


def test_one_key() -> None:
    """The weight is 1: o is v and dv is do; dq and dk are 0 but for rounding in one difference.

    That is dp - delta, two sums of the same D products: D eps sum |do v| apart at most. The weight is off by
    the rounding of its exponent, s2 of less than 64 in fp32.
    """
    q, k, v, do = (randn(2, 1, 3, 64, dtype=torch.float32) for _ in range(4))
    eps = torch.finfo(torch.float32).eps
    o, dq, dk, dv = run([q, k, v], do, "triton")
    torch.testing.assert_close(o, v, rtol=4 * eps, atol=0)
    torch.testing.assert_close(dv, do, rtol=64 * eps, atol=0)
    bound = 64 * eps * (do * v).abs().sum(-1, keepdim=True)
    assert (dq.abs() <= bound * k.abs()).all()
    assert (dk.abs() <= bound * q.abs()).all()


def test_scale_of_any_sign() -> None:
    """Kernels take the maximum before they scale, so a scale that is not positive goes into q.

    Not compared with eager, where a scale below 0 turns what the mask hides into +inf and all into NaN.
    """
    q, k, v = randn(3, 1, 19, 1, 16).unbind(0)
    do = randn(1, 19, 1, 16)
    o, dq, dk, dv = run([q, k, v], do, "triton", scale=-0.25)
    o_, dq_, dk_, dv_ = run([-q, k, v], do, "triton", scale=0.25)
    assert all(torch.equal(a, b) for a, b in [(o, o_), (dq, -dq_), (dk, dk_), (dv, dv_)])
    o, dq, dk, dv = run([q, k, v], do, "triton", scale=0.0)
    o_, _, dk_, dv_ = run([0 * q, k, v], do, "triton")
    assert torch.equal(o, o_)
    assert torch.equal(dv, dv_)
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("factor", [1e3, 1e-20])
def test_large_and_small_scores(factor: float) -> None:
    """One-hot and uniform weights: no overflow on the way."""
    q, k, v = randn(3, 1, 70, 1, 16).unbind(0)
    compare([factor * q, k, v], randn(1, 70, 1, 16))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_query_spoils_itself_alone(bad: float) -> None:
    q, k, v = randn(3, 1, 70, 1, 16).unbind(0)
    q[0, 65] = bad
    o = ops.causal_attention(q, k, v, backend="triton")
    assert o[0, 65].isnan().all()
    assert o[0, :65].isfinite().all()
    assert o[0, 66:].isfinite().all()


def test_expanded_keys() -> None:
    """Heads that share keys (stride 0); the last dimension strided; a transposed layout."""
    q = randn(1, 2, 20, 16).transpose(1, 2)
    k = randn(1, 20, 1, 16).expand(1, 20, 2, 16)
    v = randn(1, 20, 16, 2).transpose(2, 3)
    compare([q, k, v], randn(1, 20, 2, 16).expand(1, 20, 2, 16))


def dropped(
    B: int, tq: int, tk: int, H: int, seed: int, p: float, dtype: torch.dtype = torch.float32, **options: Any
) -> Tensor:
    """z, from equal weights (q = 0) and one-hot values: o_ij = z_ij / keys seen by i. (B, H, Tq, Tk)"""
    torch.manual_seed(seed)
    zero = torch.zeros(B, tk, H, tk, device=device, dtype=dtype)
    eye = torch.eye(tk, device=device, dtype=dtype)[None, :, None].expand(B, tk, H, tk)
    o = ops.causal_attention(zero[:, :tq], zero, eye, dropout_p=p, backend="triton", **options)
    return o.float().transpose(1, 2) > 0


def test_dropout_is_bernoulli() -> None:
    """The share kept, of all weights and of each neighbourhood, and correlations, within five deviations.

    Philox draws four words at a time for four neighbouring keys: a word used twice would show between
    neighbours, a counter used twice between rows or heads.
    """
    p = 0.25
    kept = dropped(2, 96, 96, 2, seed=3, p=p).double()  # (2, 2, 96, 96)
    seen = torch.ones(96, 96, dtype=torch.bool, device=device).tril()
    assert not kept[..., ~seen].any()

    def near(values: Tensor, expected: float, deviation: float) -> None:
        assert abs(float(values.mean()) - expected) < 5 * deviation / math.sqrt(values.numel())

    near(kept[..., seen], 1 - p, math.sqrt(p * (1 - p)))
    for word in range(4):
        near(kept[..., word::4][..., seen[:, word::4]], 1 - p, math.sqrt(p * (1 - p)))
    z = (kept - (1 - p)) / math.sqrt(p * (1 - p))
    for step in (1, 2, 3, 4, 32):  # keys apart, then queries apart
        near((z[..., step:] * z[..., :-step])[..., seen[:, :-step] & seen[:, step:]], 0, 1)
        near((z[..., step:, :] * z[..., :-step, :])[..., seen[:-step] & seen[step:]], 0, 1)
    near((z[0] * z[1])[..., seen], 0, 1)
    near((z[:, 0] * z[:, 1])[..., seen], 0, 1)
    other = (dropped(2, 96, 96, 2, seed=4, p=p).double() - (1 - p)) / math.sqrt(p * (1 - p))
    near((z * other)[..., seen], 0, 1)


def test_dropout_does_not_depend_on_tiles() -> None:
    """fp32 and bf16 have tiles of different sizes, and windows loops of their own: the same is dropped."""
    full = dropped(1, 96, 96, 2, seed=5, p=0.5)
    assert torch.equal(full, dropped(1, 96, 96, 2, seed=5, p=0.5, dtype=torch.bfloat16))
    window = dropped(1, 96, 96, 2, seed=5, p=0.5, window=40)
    inside = torch.ones(96, 96, dtype=torch.bool, device=device).tril().triu(-39)
    assert torch.equal(window, full & inside)


@pytest.mark.parametrize(
    ("tq", "window", "dtype", "width"),
    [
        (96, None, torch.bfloat16, 64),
        (70, 40, torch.bfloat16, 64),
        (3, None, torch.float32, 64),
        (41, 20, torch.float32, 160),
    ],
)
def test_backward_drops_what_forward_dropped(
    tq: int, window: int | None, dtype: torch.dtype, width: int
) -> None:
    """Output and gradients are those of the equations with the z that the same seed gave before."""
    p = 0.25
    z = dropped(1, tq, 96, 1, seed=6, p=p, window=window) / (1 - p)
    hidden = ~torch.ones(tq, 96, dtype=torch.bool, device=device).tril(96 - tq)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(96 - tq - window)
    q, do = randn(1, tq, 1, width, dtype=dtype), randn(1, tq, 1, width, dtype=dtype)
    k, v = randn(1, 96, 1, width, dtype=dtype), randn(1, 96, 1, width, dtype=dtype)

    def equations(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        a, b, c = (x.transpose(1, 2) for x in inputs)
        s = (a @ b.mT / math.sqrt(width)).masked_fill(hidden, -math.inf)
        o = ((z.to(dtype) * s.softmax(-1)) @ c).transpose(1, 2)
        return [o.detach(), *torch.autograd.grad(o, inputs, do.to(dtype))]

    results = []
    for _ in range(2):
        torch.manual_seed(6)
        results.append(run([q, k, v], do, "triton", dropout_p=p, window=window))
    for a, b, e, o in zip(*results, equations(dtype), equations(torch.float64), strict=True):
        assert torch.equal(a, b)
        assert_accurate(a, e, o.cpu())


def test_opcheck_of_separate_tensors_with_dropout() -> None:
    """tests/ops/test_operators.py has packed qkv."""
    q, k, v = (randn(1, n, 2, 16, dtype=torch.float32).requires_grad_() for n in (3, 5, 5))
    o, lse = randn(1, 3, 2, 16, dtype=torch.float32), randn(1, 2, 3, dtype=torch.float32)
    options = torch.tensor([7], device=device), 0.25, None, 4
    opcheck(torch.ops.fastgpt_triton.attention_forward, (q, k, v, *options))
    separate = (x.detach() for x in (q, k, v))
    opcheck(torch.ops.fastgpt_triton.attention_backward, (o, *separate, o, lse, *options))


def test_packed_makes_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the operators nothing runs but views; in them nothing but allocations and views."""
    qkv, do = randn(2, 20, 3, 2, 16).requires_grad_(), randn(2, 20, 2, 16)
    with Recorded() as outside:
        (gradient,) = torch.autograd.grad(ops.causal_attention_qkvpacked(qkv, backend="triton"), qkv, do)
    assert gradient.is_contiguous()
    assert outside.names <= {"attention_forward", "attention_backward", "detach"}
    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    with Recorded() as inside:
        o, lse = attention.attention_forward(qkv.detach(), None, None, None, 0.0, None, None)
        attention.attention_backward(do, qkv.detach(), None, None, o, lse, None, 0.0, None, None)
    assert inside.names <= {"empty", "empty_like", "new_empty", "unbind", "detach"}


def test_autocast_casts_as_eager() -> None:
    qkv = randn(1, 20, 3, 2, 16, dtype=torch.float32).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        eager, kernel = (ops.causal_attention_qkvpacked(qkv, backend=b) for b in ("eager", "triton"))
    assert kernel.dtype == eager.dtype == torch.bfloat16
    assert_accurate(kernel.detach(), eager.detach(), reference(qkv.detach().bfloat16().double()).cpu())


def test_bad_input() -> None:
    x = randn(1, 3, 1, 16)
    with pytest.raises(
        InputError, match=r"k has dtype torch.float16: it must be torch.bfloat16, the dtype of q"
    ):
        ops.causal_attention(x, x.half(), x, backend="triton")
    with pytest.raises(InputError, match=r"the head size is 257: kernels take 1 to 256; use backend='eager'"):
        ops.causal_attention_qkvpacked(randn(1, 3, 3, 1, 257), backend="triton")
    with pytest.raises(InputError, match=r"qkv has dtype torch.float64: kernels take float32"):
        ops.causal_attention_qkvpacked(randn(1, 3, 3, 1, 16, dtype=torch.float64), backend="triton")
