from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgpt.errors import InputError
from fastgpt.ops import add_layer_norm, layer_norm
from fastgpt.ops.layer_norm import add_cost, cost

from .helpers import assert_same, randn

EPS = 1e-5
# Rows: none, one, several, two leading dimensions; widths 1 and 33; a mean far larger than the deviation.
SHAPES = [((0, 33), 0.0), ((1, 1), 0.0), ((1, 33), 0.0), ((197, 5), 0.0), ((2, 3, 33), 0.0), ((3, 33), 100.0)]


def statistics(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """xhat and rstd as in the module's equations."""
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    var = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    rstd = 1 / (var + eps).sqrt()
    return (x - mean) * rstd, rstd


@pytest.mark.parametrize(("shape", "offset"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("eps", [EPS, 0.1])
def test_equations(shape: tuple[int, ...], offset: float, with_bias: bool, eps: float) -> None:
    x, w, dy = randn(*shape), randn(shape[-1]), randn(*shape)
    b = randn(shape[-1]) if with_bias else None
    x = (x + offset).detach().requires_grad_()
    y = layer_norm(x, w, b, eps=eps)
    xhat, rstd = statistics(x, eps)
    # The mean of 33 numbers near `offset` is rounded to offset * 1e-16, which the difference then keeps.
    tolerance = 1e-12 * max(1.0, offset)
    assert_same(y, xhat * w + (0 if b is None else b), tolerance)
    assert y.is_contiguous()

    grads = torch.autograd.grad(y, [x, w] if b is None else [x, w, b], dy)
    g = dy * w
    n = shape[-1]
    dx = rstd * (g - g.sum(-1, keepdim=True) / n - xhat * (g * xhat).sum(-1, keepdim=True) / n)
    assert_same(grads[0], dx, tolerance)
    assert_same(grads[1], (dy * xhat).reshape(-1, n).sum(0), 10 * tolerance)
    if b is not None:
        assert_same(grads[2], dy.reshape(-1, n).sum(0))


@pytest.mark.parametrize("with_bias", [True, False])
def test_add_equations(with_bias: bool) -> None:
    x, residual, w, dy, dsummed = randn(2, 3, 7), randn(2, 3, 7), randn(7), randn(2, 3, 7), randn(2, 3, 7)
    b = randn(7) if with_bias else None
    y, summed = add_layer_norm(x, residual, w, b, eps=EPS)
    xhat, rstd = statistics(x + residual, EPS)
    assert_same(summed, x + residual)
    assert_same(y, xhat * w + (0 if b is None else b))

    dx, dresidual = torch.autograd.grad([y, summed], [x, residual], [dy, dsummed])
    g = dy * w
    dnorm = rstd * (g - g.sum(-1, keepdim=True) / 7 - xhat * (g * xhat).sum(-1, keepdim=True) / 7)
    assert_same(dx, dnorm + dsummed)
    assert_same(dresidual, dx)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(layer_norm, (randn(3, 5), randn(5), randn(5)))
    assert torch.autograd.gradcheck(add_layer_norm, (randn(3, 5), randn(3, 5), randn(5), randn(5)))


def test_bf16_input_with_fp32_parameters() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert layer_norm(x, torch.ones(8), torch.zeros(8)).dtype == torch.bfloat16


X, W = torch.randn(2, 4), torch.randn(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_norm(X.long(), W), r"x has dtype torch.int64: it must be floating point"),
        (lambda: layer_norm(X, W.bool()), r"weight has dtype torch.bool"),
        (lambda: layer_norm(X, W, W.int()), r"bias has dtype torch.int32"),
        (lambda: layer_norm(X, torch.ones(3)), r"weight has shape \(3,\): it must be \(4,\)"),
        (lambda: layer_norm(X, W[None]), r"weight has shape \(1, 4\): it must be \(4,\)"),
        (lambda: layer_norm(X, W, torch.ones(5)), r"bias has shape \(5,\): it must be \(4,\)"),
        (lambda: layer_norm(torch.tensor(1.0), W), r"x is a scalar: it must have at least one dimension"),
        (lambda: layer_norm(X, W.to("meta")), r"weight is on meta: it must be on cpu, where x is"),
        (lambda: add_layer_norm(X, X[:1], W), r"residual has shape \(1, 4\): it must be \(2, 4\)"),
        (lambda: add_layer_norm(X, X.long(), W), r"residual has dtype torch.int64"),
        (lambda: add_layer_norm(X, X.to("meta"), W), r"residual is on meta"),
        (lambda: add_layer_norm(X, X, torch.ones(3)), r"weight has shape \(3,\)"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_cost() -> None:
    """Bytes are those of the large tensors that must move; the sum costs one more each way."""
    one = 10 * 768 * 2
    assert cost(10, 768, torch.bfloat16).bytes == 2 * one
    assert cost(10, 768, torch.bfloat16, backward=True).bytes == 3 * one
    assert add_cost(10, 768, torch.bfloat16).bytes == 4 * one
    assert add_cost(10, 768, torch.bfloat16, backward=True).bytes == 4 * one
    assert add_cost(10, 768, torch.float32).flops == cost(10, 768, torch.float32).flops + 10 * 768
