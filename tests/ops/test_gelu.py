from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.ops import bias_gelu, gelu, linear_gelu
from fastgpt.ops.gelu import bias_cost, cost, linear_cost

from .helpers import assert_same, randn

approximations = pytest.mark.parametrize("approximate", ["tanh", "none"])


def by_hand(x: float, approximate: str) -> tuple[float, float]:
    """y and its derivative at one number, as in the module's equations."""
    if approximate == "tanh":
        k, a = math.sqrt(2 / math.pi), 0.044715
        t = math.tanh(k * (x + a * x**3))
        return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) * k * (1 + 3 * a * x * x) / 2
    phi = (1 + math.erf(x / math.sqrt(2))) / 2
    return x * phi, phi + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def expected(h: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    pairs = [by_hand(value, approximate) for value in h.detach().flatten().tolist()]
    table = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)  # no rows when h is empty
    return table[:, 0].reshape(h.shape), table[:, 1].reshape(h.shape)


@approximations
@pytest.mark.parametrize("shape", [(), (0, 5), (1,), (2, 3, 33)])
def test_equations(shape: tuple[int, ...], approximate: str) -> None:
    x, dy = randn(*shape), randn(*shape)
    with torch.no_grad():
        x *= 3  # into both tails
    y = gelu(x, approximate=approximate)
    value, slope = expected(x, approximate)
    assert_same(y, value)
    assert_same(torch.autograd.grad(y, x, dy)[0], dy * slope)


@approximations
def test_bias_equations(approximate: str) -> None:
    x, b, dy = randn(2, 3, 5), randn(5), randn(2, 3, 5)
    y = bias_gelu(x, b, approximate=approximate)
    value, slope = expected(x + b, approximate)
    assert_same(y, value)
    dx, db = torch.autograd.grad(y, [x, b], dy)
    assert_same(dx, dy * slope)
    assert_same(db, (dy * slope).sum((0, 1)))


@approximations
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_equations(approximate: str, with_bias: bool) -> None:
    x, w, dy = randn(2, 3, 5), randn(7, 5), randn(2, 3, 7)
    b = randn(7) if with_bias else None
    y = linear_gelu(x, w, b, approximate=approximate)
    h = (x[:, :, None, :] * w).sum(-1) + (0 if b is None else b)  # (2, 3, 7)
    value, slope = expected(h, approximate)
    assert_same(y, value)
    assert y.is_contiguous()

    grads = torch.autograd.grad(y, [x, w] if b is None else [x, w, b], dy)
    dh = dy * slope
    assert_same(grads[0], (dh[..., None] * w).sum(-2))
    assert_same(grads[1], (dh[..., None] * x[:, :, None, :]).sum((0, 1)))
    if b is not None:
        assert_same(grads[2], dh.sum((0, 1)))


@approximations
def test_gradcheck(approximate: str) -> None:
    def options(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs, approximate=approximate)

    assert torch.autograd.gradcheck(options(gelu), (randn(3, 5),))
    assert torch.autograd.gradcheck(options(bias_gelu), (randn(3, 5), randn(5)))
    assert torch.autograd.gradcheck(options(linear_gelu), (randn(3, 5), randn(4, 5), randn(4)))


@approximations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tails(approximate: str, dtype: torch.dtype) -> None:
    """Large values pass or vanish, with slopes 1 and 0: no NaN from infinity times zero."""
    x = torch.tensor([-6e4, -100.0, 0.0, 100.0, 6e4], dtype=dtype, requires_grad=True)
    y = gelu(x, approximate=approximate)
    y.sum().backward()
    assert torch.equal(y, x.clamp(min=0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([0, 0, 0.5, 1, 1], dtype=dtype))


X, B, W = torch.randn(2, 4), torch.randn(4), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gelu(X.long()), r"x has dtype torch.int64: it must be floating point"),
        (lambda: gelu(X, approximate="erf"), r"approximate is 'erf': it must be one of tanh, none"),
        (lambda: bias_gelu(X, B, approximate="erf"), r"approximate is 'erf'"),
        (lambda: bias_gelu(X, torch.ones(3)), r"bias has shape \(3,\): it must be \(4,\)"),
        (lambda: bias_gelu(torch.tensor(1.0), B), r"x is a scalar"),
        (lambda: bias_gelu(X, B.to("meta")), r"bias is on meta: it must be on cpu, where x is"),
        (lambda: linear_gelu(X, B), r"weight has shape \(4,\): it must be \(N, K\)"),
        (lambda: linear_gelu(X, W.T), r"weight has shape \(4, 3\): it must be \(4, 4\)"),
        (lambda: linear_gelu(X, W, B), r"bias has shape \(4,\): it must be \(3,\)"),
        (lambda: linear_gelu(X, W, approximate=""), r"approximate is ''"),
        (lambda: linear_gelu(X, W.int()), r"weight has dtype torch.int32"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_cost() -> None:
    assert cost(100, torch.float32).bytes == 2 * 400
    assert cost(100, torch.bfloat16, backward=True).bytes == 3 * 200
    assert cost(100, torch.float32, approximate="none").flops < cost(100, torch.float32).flops
    assert bias_cost(10, 10, torch.float32).flops == cost(100, torch.float32).flops + 100
    # The product dominates: GPT-2's first MLP layer, one sequence.
    forward = linear_cost(1024, 768, 3072, torch.bfloat16)
    product = 2 * 1024 * 768 * 3072
    assert product < forward.flops < 1.01 * product
    assert forward.bytes == 2 * (1024 * 768 + 3072 * 768 + 2 * 1024 * 3072)
    assert 2 * product < linear_cost(1024, 768, 3072, torch.bfloat16, backward=True).flops < 2.02 * product
