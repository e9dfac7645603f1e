"""linear: its equations, the strides it takes, and what the processor's libraries multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.ops import linear

from .helpers import assert_accurate, assert_same, kernels_of, randn, spread

BACKENDS = kernels_of("linear")
Layout = tuple[Callable[[Tensor], Tensor], ...]
LAYOUTS: dict[str, Layout] = {  # of x (rows, K), of W from (K, N), of b (N,) and of dy (rows, N)
    "contiguous": (torch.clone, lambda w: w.T.contiguous(), torch.clone, torch.clone),
    "gaps": (spread, lambda w: w.T, spread, lambda dy: dy[:1].expand(dy.shape)),
}


@pytest.mark.parametrize("with_bias", [True, False])
def test_equations(with_bias: bool) -> None:
    x, w, dy = randn(2, 3, 5), randn(7, 5), randn(2, 3, 7)
    b = randn(7) if with_bias else None
    y = linear(x, w, b)
    assert_same(y, (x[:, :, None, :] * w).sum(-1) + (0 if b is None else b))
    grads = torch.autograd.grad(y, [x, w] if b is None else [x, w, b], dy)
    assert_same(grads[0], (dy[..., None] * w).sum(-2))
    assert_same(grads[1], (dy[..., None] * x[:, :, None, :]).sum((0, 1)))
    if b is not None:
        assert_same(grads[2], dy.sum((0, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# one row, off every tile, GPT-2's widths: several tiles and threads, and long sums
@pytest.mark.parametrize("shape", [(1, 33, 7), (197, 65, 129), (300, 768, 2304), (300, 3072, 768)], ids=str)
@pytest.mark.parametrize("gaps", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(gaps: Layout, shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    """As accurate as PyTorch's: where all is contiguous, with gaps, and with Conv1D's transposed weights."""
    rows, k, n = shape
    tensors = [torch.randn(rows, k), torch.randn(k, n) / k**0.5, torch.randn(n), torch.randn(rows, n)]
    results = []
    for name, kind in (("oracle", torch.float64), ("eager", dtype), (backend, dtype)):
        given = [gap(t.to(dtype).to(kind)) for gap, t in zip(gaps, tensors, strict=True)]
        leaves = [t.detach().requires_grad_() for t in given[:3]]
        y = linear(*leaves, backend="eager" if name == "oracle" else name)
        results.append([y, *torch.autograd.grad(y, leaves, given[3])])
    for oracle, eager, actual in zip(*results, strict=True):
        assert_accurate(actual, eager, oracle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (0, 1)], ids=str)
def test_frozen(frozen: tuple[int, ...], backend: str) -> None:
    """Only what is asked for is computed, and it is the same."""
    x, w, b = torch.randn(6, 5), torch.randn(4, 5), torch.randn(4)
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate((x, w, b))]
    linear(x, w, b, backend=backend).square().sum().backward()
    dy = 2 * F.linear(x, w, b).detach()
    for leaf, expected in zip(leaves, (dy @ w, dy.T @ x, dy.sum(0)), strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_onednn(backend: str) -> None:
    """The user's switch for oneDNN holds for these products as for PyTorch's own."""
    x, w = torch.randn(64, 48), torch.randn(32, 48)
    with torch.backends.mkldnn.flags(enabled=False):
        y = linear(x, w, backend=backend)
        assert torch.equal(y, F.linear(x, w))


X, B, W = torch.randn(2, 4), torch.randn(4), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(X, B), r"weight has shape \(4,\): it must be \(N, K\)"),
        (lambda: linear(X, W.T), r"weight has shape \(4, 3\): it must be \(4, 4\)"),
        (lambda: linear(X, W, B), r"bias has shape \(4,\): it must be \(3,\)"),
        (lambda: linear(X, W.int()), r"weight has dtype torch.int32"),
        (lambda: linear(torch.tensor(1.0), W), r"x is a scalar"),
        (lambda: linear(X, W.to("meta")), r"weight is on meta: it must be on cpu, where x is"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.skipif("native" not in BACKENDS, reason="the native kernels are not built here")
def test_dtypes_must_agree() -> None:
    with pytest.raises(InputError, match=r"weight has dtype torch.bfloat16: it must be torch.float32"):
        linear(X, W.bfloat16(), backend="native")


MUTANTS = {
    "csrc/cpu/linear.cpp": [
        ("need_db ? column_sums(g)", "need_db ? column_sums(g.slice(0, 0, g.size(0) / 2))"),
    ],
    "csrc/cpu/product.cpp": [
        ("rows.copy_(bias->expand_as(rows))", "rows.copy_(bias->expand_as(rows).neg())"),
        ("add || begin > 0 ? 1.0f", "add ? 1.0f"),
        ("add || begin > 0 ? 1.0f", "begin > 0 ? 1.0f", "tests/ops/test_cross_entropy_native.py -k large"),
        ("x.t().contiguous().t();", "x.t().contiguous().view(x.sizes());"),
        (
            "by_onednn(rows, matrix, weight.t(), bias.has_value());",
            "by_onednn(rows, matrix, weight.t(), false);",
        ),
        ("dw = multiply(dy.t(), as_matrix(x));", "dw = multiply(dy.t(), as_matrix(x).flip(0));"),
    ],
    "csrc/cpu/loops/sum_rows.h": [
        ("store(sums + c, Vec{});", "store(sums + c, splat(1.0f));"),
    ],
}
