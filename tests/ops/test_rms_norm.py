from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgpt.errors import InputError
from fastgpt.ops import rms_norm
from fastgpt.ops.rms_norm import cost

from .helpers import assert_same, randn


@pytest.mark.parametrize("shape", [(0, 33), (1, 1), (33,), (197, 5), (2, 3, 33)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_equations(shape: tuple[int, ...], eps: float) -> None:
    x, w, dy = randn(*shape), randn(shape[-1]), randn(*shape)
    y = rms_norm(x, w, eps=eps)
    n = shape[-1]
    rstd = 1 / ((x**2).sum(-1, keepdim=True) / n + eps).sqrt()
    xhat = x * rstd
    assert_same(y, xhat * w)
    assert y.is_contiguous()

    dx, dw = torch.autograd.grad(y, [x, w], dy)
    g = dy * w
    assert_same(dx, rstd * (g - xhat * (g * xhat).sum(-1, keepdim=True) / n))
    assert_same(dw, (dy * xhat).reshape(-1, n).sum(0))


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(rms_norm, (randn(3, 5), randn(5)))


def test_row_of_zeros() -> None:
    """Only eps keeps it finite."""
    x = torch.zeros(1, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 4))
    torch.testing.assert_close(x.grad, torch.full((1, 4), 1e3))  # 1 / sqrt(eps)


X, W = torch.randn(2, 4), torch.randn(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(X.long(), W), r"x has dtype torch.int64: it must be floating point"),
        (lambda: rms_norm(X, torch.ones(3)), r"weight has shape \(3,\): it must be \(4,\)"),
        (lambda: rms_norm(torch.tensor(1.0), W), r"x is a scalar"),
        (lambda: rms_norm(X, W.to("meta")), r"weight is on meta: it must be on cpu, where x is"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_cost() -> None:
    assert cost(10, 768, torch.float16).bytes == 2 * 10 * 768 * 2
    assert cost(10, 768, torch.float32, backward=True).bytes == 3 * 10 * 768 * 4
