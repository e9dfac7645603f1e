from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import dropout_add
from fastgpt.ops.dropout import cost

from .helpers import assert_same, randn

IMPLEMENTATIONS = [row.name for row in ops.table() if row.operation == "dropout_add"]
implementations = pytest.mark.parametrize("backend", IMPLEMENTATIONS)


@implementations
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_law_and_backward(backend: str, p: float) -> None:
    """y - residual is x times 0 or 1 / (1 - p), with these frequencies, and dx has the same factors."""
    n = 20_000
    x, residual, dy = (torch.randn(n, requires_grad=True) for _ in range(3))
    y = dropout_add(x, residual, p=p, backend=backend)
    dx, dresidual = torch.autograd.grad(y, [x, residual], dy)
    kept = dx != 0
    z = kept / (1 - p)
    torch.testing.assert_close(y, z * x + residual)
    torch.testing.assert_close(dx, z * dy)
    assert torch.equal(dresidual, dy)
    # The share dropped has standard deviation sqrt(p (1 - p) / n), as have shares of neighbours both dropped
    # (about): allow five of them.
    dropped = (~kept).double()
    assert abs(dropped.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    q = p * p
    assert abs((dropped[1:] * dropped[:-1]).mean() - q) < 5 * math.sqrt(2 * q * (1 - q) / n)


@implementations
def test_seed(backend: str) -> None:
    """The same seed gives the same result, and calls after it differ."""
    x, residual = torch.randn(2, 100)

    def twice() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [dropout_add(x, residual, p=0.5, backend=backend) for _ in range(2)]

    first, second = twice()
    again = twice()
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)


@implementations
@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.5, "training": False}])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_without_dropout(backend: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    before = torch.get_rng_state()
    assert torch.equal(dropout_add(x, residual, **options, backend=backend), x + residual)
    assert torch.equal(torch.get_rng_state(), before)  # evaluation leaves the random state alone


def test_float64_and_gradcheck() -> None:
    def seeded(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return dropout_add(x, residual, p=0.5)

    x, residual = randn(3, 5), randn(3, 5)
    z = (seeded(torch.ones_like(x), torch.zeros_like(x))).detach()
    assert set(z.flatten().tolist()) == {0.0, 2.0}
    assert_same(seeded(x, residual), z * x + residual)
    assert torch.autograd.gradcheck(seeded, (x, residual))


def test_training_traces() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, r: dropout_add(x, r, p=0.5), fullgraph=True, backend="aot_eager")
    x, residual = torch.ones(1000), torch.ones(1000)
    assert set(compiled(x, residual).tolist()) == {1.0, 3.0}


X = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dropout_add(X.long(), X, p=0.1), r"x has dtype torch.int64: it must be floating point"),
        (lambda: dropout_add(X, X[0], p=0.1), r"residual has shape \(4,\): it must be \(2, 4\)"),
        (lambda: dropout_add(X, X.to("meta"), p=0.1), r"residual is on meta: it must be on cpu, where x is"),
        (lambda: dropout_add(X, X, p=1.0), r"p is 1.0: it must be at least 0 and less than 1"),
        (lambda: dropout_add(X, X, p=-0.1), r"p is -0.1"),
        (lambda: dropout_add(X, X, p=math.nan), r"p is nan"),
        (lambda: dropout_add(X, X, p=1.5, training=False), r"p is 1.5"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_cost() -> None:
    assert cost(100, torch.bfloat16).bytes == 3 * 200
    assert cost(100, torch.float32, backward=True).bytes == 2 * 400
