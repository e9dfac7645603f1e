from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgpt.errors import InputError
from fastgpt.ops import embedding
from fastgpt.ops.embedding import cost

from .helpers import assert_same, randn


# T: none, one, the whole table; start: from the beginning, inside, and up to the last row.
@pytest.mark.parametrize(("length", "start"), [(0, 0), (0, 6), (1, 0), (1, 5), (4, 2), (6, 0)])
def test_equations(length: int, start: int) -> None:
    idx = torch.randint(0, 4, (3, length))  # of 11 tokens: some repeat, some never occur
    wt, wp, dy = randn(11, 5), randn(6, 5), randn(3, length, 5)
    y = embedding(idx, wt, wp, start=start)
    want = torch.zeros(3, length, 5, dtype=torch.float64)
    dwt, dwp = torch.zeros(11, 5, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64)
    for b in range(3):
        for t in range(length):
            token = int(idx[b, t])
            want[b, t] = (wt[token] + wp[start + t]).detach()
            dwt[token] += dy[b, t].detach()
            dwp[start + t] += dy[b, t].detach()
    assert_same(y, want)
    assert y.is_contiguous()
    grads = torch.autograd.grad(y, [wt, wp], dy)
    assert_same(grads[0], dwt)
    assert_same(grads[1], dwp)


def test_gradcheck() -> None:
    idx = torch.tensor([[0, 2, 2], [1, 0, 2]])
    assert torch.autograd.gradcheck(lambda *w: embedding(idx, *w, start=1), (randn(4, 2), randn(5, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    y = embedding(
        torch.zeros(2, 3, dtype=torch.int64), torch.ones(4, 5, dtype=dtype), torch.ones(3, 5, dtype=dtype)
    )
    assert y.dtype == dtype
    assert torch.equal(y, torch.full((2, 3, 5), 2.0, dtype=dtype))


def test_strided_idx() -> None:
    """The inputs of language modelling are windows of one long row: idx is often a view."""
    tokens = torch.randint(0, 11, (2, 7))
    wt, wp = torch.randn(11, 5), torch.randn(6, 5)
    assert torch.equal(embedding(tokens[:, :-1], wt, wp), embedding(tokens[:, :-1].clone(), wt, wp))


IDX, WT, WP = torch.zeros(2, 3, dtype=torch.int64), torch.randn(4, 5), torch.randn(3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embedding(IDX.int(), WT, WP), r"idx has dtype torch.int32: it must be torch.int64"),
        (lambda: embedding(IDX.float(), WT, WP), r"idx has dtype torch.float32"),
        (lambda: embedding(IDX[0], WT, WP), r"idx has shape \(3,\): it must be \(B, T\)"),
        (lambda: embedding(IDX.to("meta"), WT, WP), r"idx is on meta: it must be on cpu, where token_weight"),
        (lambda: embedding(IDX, WT.long(), WP), r"token_weight has dtype torch.int64"),
        (lambda: embedding(IDX, WT[0], WP), r"token_weight has shape \(5,\): it must be \(V, C\)"),
        (lambda: embedding(IDX, WT, WP[0]), r"position_weight has shape \(5,\): it must be \(block, C\)"),
        (lambda: embedding(IDX, WT, WP[:, :4]), r"position_weight has shape \(3, 4\): it must be \(3, 5\)"),
        (lambda: embedding(IDX, WT, WP.to("meta")), r"position_weight is on meta"),
        (lambda: embedding(IDX, WT, WP, start=-1), r"start is -1: it must be at least 0"),
        (lambda: embedding(IDX, WT, WP, start=1), r"idx has 3 positions from start = 1: .* has only 3"),
        (lambda: embedding(IDX, WT, WP[:2]), r"idx has 3 positions from start = 0: .* has only 2"),
        (lambda: embedding(IDX + 4, WT, WP), r"idx holds 4: it must be 0 to 3$"),
        (lambda: embedding(IDX - 1, WT, WP), r"idx holds -1: it must be 0 to 3$"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_cost() -> None:
    sizes: dict[str, Any] = {"vocab_size": 50304, "block_size": 1024}
    out, idx = 8 * 1024 * 768 * 2, 8 * 1024 * 8
    forward = cost(8, 1024, 768, torch.bfloat16, **sizes)
    assert forward.bytes == 2 * out + 1024 * 768 * 2 + idx
    assert forward.flops == 8 * 1024 * 768
    backward = cost(8, 1024, 768, torch.bfloat16, **sizes, backward=True)
    assert backward.bytes == out + (50304 + 1024) * 768 * 2 + idx
