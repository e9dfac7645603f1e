from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.ops import causal_attention, causal_attention_qkvpacked
from fastgpt.ops.attention import cost

from .helpers import assert_same, randn


def first_key(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def loop(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """One query at a time, over the keys it sees and no others."""
    (batch, tq, heads, _), tk = q.shape, k.shape[1]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(tq):
                position = tk - tq + i
                seen = range(first_key(position, window), position + 1)
                scores = [scale * float((q[b, i, h] * k[b, j, h]).sum()) for j in seen]
                total = sum(math.exp(s) for s in scores)
                for j, s in zip(seen, scores, strict=True):
                    out[b, i, h] += math.exp(s) / total * v[b, j, h]
    return out


def hidden(tq: int, tk: int, window: int | None) -> Tensor:
    """True where query i does not see key j. (Tq, Tk)"""
    return torch.tensor(
        [[not first_key(tk - tq + i, window) <= j <= tk - tq + i for j in range(tk)] for i in range(tq)]
    )


def backward(
    q: Tensor, k: Tensor, v: Tensor, z: Tensor, do: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, dq, dk and dv by the module's equations; z (B, H, Tq, Tk) is the dropout factor."""
    q, k, v, do = (x.detach().transpose(1, 2) for x in (q, k, v, do))  # (B, H, T, D)
    s = scale * q @ k.mT
    s = s.masked_fill(hidden(q.shape[2], k.shape[2], window), -math.inf)
    p = (s - s.logsumexp(-1, keepdim=True)).exp()
    o = (z * p) @ v
    delta = (do * o).sum(-1, keepdim=True)
    ds = p * (z * (do @ v.mT) - delta)
    grads = o, scale * ds @ k, scale * ds.mT @ q, (z * p).mT @ do
    return tuple(x.transpose(1, 2) for x in grads)  # type: ignore[return-value]


# (Tq, Tk): one token; a first decoding step onwards; training; chunked prefill, even and odd.
LENGTHS = [(1, 1), (1, 6), (2, 6), (3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(("tq", "tk"), LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equations(tq: int, tk: int, window: int | None, scale: float | None) -> None:
    q, k, v, do = randn(2, tq, 2, 4), randn(2, tk, 2, 4), randn(2, tk, 2, 4), randn(2, tq, 2, 4)
    out = causal_attention(q, k, v, scale=scale, window=window)
    used = 0.5 if scale is None else scale  # 1 / sqrt(D)
    assert_same(out, loop(q.detach(), k.detach(), v.detach(), used, window))
    assert out.is_contiguous()

    o, *grads = backward(q, k, v, torch.ones((), dtype=torch.float64), do, used, window)
    assert_same(out, o)
    for actual, wanted in zip(torch.autograd.grad(out, [q, k, v], do), grads, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("length", [1, 7, 65])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_is_the_same_operation(length: int, window: int | None) -> None:
    qkv = randn(2, length, 3, 2, 16)
    packed = causal_attention_qkvpacked(qkv, scale=0.3, window=window)
    assert packed.is_contiguous()
    q, k, v = (qkv[:, :, n].contiguous() for n in range(3))
    separate = causal_attention(q, k, v, scale=0.3, window=window)
    assert_same(packed, separate)
    dy = torch.randn_like(packed)
    assert_same(torch.autograd.grad(packed, qkv, dy)[0], torch.autograd.grad(separate, qkv, dy)[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [1, 4])
def test_decoding_against_a_cache_is_the_full_pass(window: int | None, chunk: int) -> None:
    q, k, v = randn(2, 9, 2, 16), randn(2, 9, 2, 16), randn(2, 9, 2, 16)
    full = causal_attention(q, k, v, window=window)
    for start in range(0, 9, chunk):
        end = min(start + chunk, 9)
        part = causal_attention(q[:, start:end], k[:, :end], v[:, :end], window=window)
        assert_same(part, full[:, start:end])


@pytest.mark.parametrize("window", [None, 3])
def test_future_and_forgotten_tokens_change_nothing(window: int | None) -> None:
    """Changing token 5 changes, bit for bit, only the outputs that see it."""
    q, k, v = randn(1, 9, 1, 16), randn(1, 9, 1, 16), randn(1, 9, 1, 16)
    before = causal_attention(q, k, v, window=window)
    with torch.no_grad():
        k[:, 5] += 100
        v[:, 5] += 100
    after = causal_attention(q, k, v, window=window)
    changed = ~(before == after).all(-1).flatten()
    last = 9 if window is None else 5 + window
    assert changed.nonzero().flatten().tolist() == list(range(5, last))


@pytest.mark.parametrize(("tq", "tk", "window"), [(8, 8, None), (3, 8, None), (8, 8, 3), (1, 8, None)])
def test_dropout(tq: int, tk: int, window: int | None) -> None:
    """Weights are dropped with probability p and the others scaled by 1 / (1 - p), alike in backward.

    With one-hot values (D = Tk) the output is z * p itself, from which z follows; the same seed then gives
    the same z for other values.
    """
    q, k, do = randn(50, tq, 2, tk), randn(50, tk, 2, tk), randn(50, tq, 2, tk)
    scale, rate = 0.2, 0.25

    def attend(v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return causal_attention(q, k, v, dropout_p=rate, scale=scale, window=window)

    eye = torch.eye(tk, dtype=torch.float64)[None, :, None].expand(50, tk, 2, tk)
    weights = attend(eye).transpose(1, 2)  # (B, H, Tq, Tk)
    kept = weights > 0
    shown = ~hidden(tq, tk, window).expand_as(kept)
    assert not (kept & ~shown).any()
    # The share kept of n weights has standard deviation sqrt(p (1 - p) / n): allow five.
    share = float(kept[shown].double().mean())
    assert abs(share - 0.75) < 5 * math.sqrt(rate * (1 - rate) / int(shown.sum()))

    v = randn(50, tk, 2, tk)
    out = attend(v)
    o, *grads = backward(q, k, v, kept.double() / (1 - rate), do, scale, window)
    assert_same(out, o)
    assert out.is_contiguous()
    for actual, wanted in zip(torch.autograd.grad(out, [q, k, v], do), grads, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize(("tq", "tk", "window"), [(3, 3, None), (2, 4, None), (1, 4, None), (3, 3, 2)])
def test_gradcheck(tq: int, tk: int, window: int | None) -> None:
    inputs = randn(1, tq, 2, 3), randn(1, tk, 2, 3), randn(1, tk, 2, 3)
    assert torch.autograd.gradcheck(lambda *qkv: causal_attention(*qkv, window=window), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tq", "tk"), [(5, 5), (1, 5), (3, 5)])
def test_output_layout(dtype: torch.dtype, tq: int, tk: int) -> None:
    """(B, Tq, H, D) contiguous from any layout of the inputs, so that a view as (B, Tq, H * D) is free."""
    q = torch.randn(2, 4, tq, 16, dtype=dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, 4, tk, 16, dtype=dtype).transpose(2, 3)
    out = causal_attention(q, k, v)
    assert out.shape == (2, tq, 4, 16)
    assert out.dtype == dtype
    assert out.is_contiguous()


def test_large_scores() -> None:
    """Scores of thousands do not overflow: the softmax becomes one-hot."""
    q, k, v = torch.randn(3, 1, 6, 1, 16).unbind(0)
    out = causal_attention(1e4 * q, k, v)
    best = (q[0, :, 0] @ k[0, :, 0].T).masked_fill(hidden(6, 6, None), -math.inf).argmax(-1)
    torch.testing.assert_close(out[0, :, 0], v[0, best, 0])


@pytest.mark.parametrize(("tq", "tk", "window"), [(6, 6, None), (1, 6, None), (3, 6, None), (6, 6, 2)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_every_form_traces(tq: int, tk: int, window: int | None, dropout_p: float) -> None:
    q, k, v = torch.randn(2, tq, 2, 16), torch.randn(2, tk, 2, 16), torch.randn(2, tk, 2, 16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, window=window, dropout_p=dropout_p)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = attend(q, k, v)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(q, k, v), expected)


Q, K = torch.randn(1, 2, 2, 4), torch.randn(1, 3, 2, 4)
QKV = torch.randn(1, 2, 3, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal_attention(Q.long(), K, K), r"q has dtype torch.int64: it must be floating point"),
        (lambda: causal_attention(Q, K, K.to("meta")), r"v is on meta: it must be on cpu, where q is"),
        (lambda: causal_attention(Q[0], K, K), r"q has shape \(2, 2, 4\): it must be \(B, Tq, H, D\)"),
        (lambda: causal_attention(Q, K[0], K), r"k has shape \(3, 2, 4\): it must be \(B, Tk, H, D\)"),
        (
            lambda: causal_attention(Q, K[:, :, :1], K),
            r"k has shape \(1, 3, 1, 4\): it must be \(1, 3, 2, 4\)",
        ),
        (lambda: causal_attention(Q, K[..., :2], K), r"k has shape \(1, 3, 2, 2\)"),
        (lambda: causal_attention(Q, K, K[:, 1:]), r"v has shape \(1, 2, 2, 4\): it must be \(1, 3, 2, 4\)"),
        (lambda: causal_attention(K, Q, Q), r"k has 2 positions: it must have at least q's 3"),
        (
            lambda: causal_attention(Q, K, K, dropout_p=1.0),
            r"dropout_p is 1.0: it must be at least 0 and less",
        ),
        (lambda: causal_attention(Q, K, K, dropout_p=-0.1), r"dropout_p is -0.1"),
        (lambda: causal_attention(Q, K, K, dropout_p=math.nan), r"dropout_p is nan"),
        (lambda: causal_attention(Q, K, K, window=0), r"window is 0: it must be at least 1"),
        (lambda: causal_attention_qkvpacked(QKV.int()), r"qkv has dtype torch.int32"),
        (lambda: causal_attention_qkvpacked(QKV[0]), r"qkv has shape .*: it must be \(B, T, 3, H, D\)"),
        (lambda: causal_attention_qkvpacked(QKV.transpose(2, 3)), r"qkv has shape \(1, 2, 2, 3, 4\)"),
        (lambda: causal_attention_qkvpacked(QKV, dropout_p=2), r"dropout_p is 2"),
        (lambda: causal_attention_qkvpacked(QKV, window=-1), r"window is -1"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(("tq", "tk"), [*LENGTHS, (64, 64)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_cost_counts_the_pairs_seen(tq: int, tk: int, window: int | None) -> None:
    pairs = 2 * 3 * int((~hidden(tq, tk, window)).sum())
    sizes = (2, tq, tk, 3, 16, torch.bfloat16)
    assert cost(*sizes, window=window).flops == 4 * 16 * pairs
    assert cost(*sizes, window=window, backward=True).flops == 10 * 16 * pairs


def test_cost_of_a_gpt2_layer() -> None:
    """12 heads of 64, T = 1024: the causal half, and each tensor once."""
    square = 4 * 12 * 64 * 1024 * 1024
    forward = cost(1, 1024, 1024, 12, 64, torch.bfloat16)
    assert 0.5 * square < forward.flops < 0.501 * square
    tensor, lse = 2 * 1024 * 12 * 64, 4 * 1024 * 12
    assert forward.bytes == 4 * tensor + lse
    assert cost(1, 1024, 1024, 12, 64, torch.bfloat16, backward=True).bytes == 8 * tensor + lse
    # A decoding step with a window reads only the keys inside it.
    step = cost(1, 1, 1024, 12, 64, torch.bfloat16, window=128)
    assert step.bytes == 2 * 2 * 12 * 64 + 2 * 2 * 128 * 12 * 64 + 4 * 12
