"""What is special to GELU: both forms over their whole range, and tiles of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops.guard import guarded
from ops.helpers import assert_accurate, kernels_of
from torch import Tensor

from fastgpt import ops
from fastgpt.kernels import gelu
from fastgpt.kernels.launch import Chip

device = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", kernels_of("gelu"))
forms = pytest.mark.parametrize("approximate", ["tanh", "none"])
Function = Callable[..., Tensor]


def cotangent(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Of one sign, so that db does not cancel: for one column PyTorch's error would be a matter of luck."""
    torch.manual_seed(1)
    return torch.randn(out.shape, dtype=torch.float64).abs().to(dtype)


def run(function: Function, tensors: list[Tensor], approximate: str, backend: str) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in tensors]
    out = function(*inputs, approximate=approximate, backend=backend)
    dy = cotangent(out, tensors[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, dy.to(out))]


def compare(function: Function, tensors: list[Tensor], approximate: str, backend: str) -> None:
    """Within twice PyTorch's error of the oracle; every element written and nothing else; the same twice."""
    eager = run(function, tensors, approximate, "eager")
    inputs = [x.detach().cpu().double().requires_grad_() for x in tensors]
    out = function(*inputs, approximate=approximate, backend="eager")
    dy = cotangent(out, tensors[0].dtype).double()
    oracle = [out.detach(), *torch.autograd.grad(out, inputs, dy)]
    with guarded() as guard:
        first = run(function, [guard.place(x) for x in tensors], approximate, backend)
    again = run(function, tensors, approximate, backend)
    for a, b, e, o in zip(first, again, eager, oracle, strict=True):
        assert_accurate(a, e, o)
        assert torch.equal(a, b)


# One column; rows that no vector divides, over several tiles; a tile's columns and one more; GPT-2's, whose
# last tile is not full; the vocabulary.
@pytest.mark.parametrize("shape", [(197, 1), (70, 33), (3, 1025), (5, 768), (3, 1600), (1, 50257)], ids=str)
@forms
@backends
def test_shapes(shape: tuple[int, int], approximate: str, backend: str) -> None:
    dtype = torch.bfloat16 if shape[1] == 768 else torch.float32
    x, b = (torch.randn(s, device=device).to(dtype) for s in (shape, shape[-1:]))
    compare(ops.bias_gelu, [x, b], approximate, backend)
    compare(ops.gelu, [x], approximate, backend)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@backends
def test_every_magnitude(dtype: torch.dtype, approximate: str, backend: str) -> None:
    """From the smallest to the largest numbers of the dtype, element by element, both signs.

    The slope is 0, 1/2 or 1 but for an interval around 0; far out nothing may become infinity times zero.
    """
    largest = torch.finfo(dtype).max
    x = torch.logspace(-6, 38, 400, dtype=torch.float64).clamp(max=largest)
    x = torch.cat([-x, torch.zeros(1), x]).to(device, dtype)
    y, dx = run(ops.gelu, [x], approximate, backend)
    exact = x.double().cpu().requires_grad_()
    dy = cotangent(x, dtype).double()
    out = ops.gelu(exact, approximate=approximate, backend="eager")
    (slope,) = torch.autograd.grad(out, exact, torch.ones_like(out))
    eps = torch.finfo(dtype).eps
    # Relative to y, but for the erf form, which cancels left of 0 as PyTorch's does: there relative to x. In
    # fp32 the rounding of u, times the derivative of the exponential, comes to several units.
    at, value = exact.detach().abs(), out.detach().abs()
    scale = at if approximate == "none" else value + 1e-6 * at
    units = 16 if dtype == torch.float32 else 1
    assert ((y.double().cpu() - out).abs() <= units * eps * scale + torch.finfo(dtype).tiny).all()
    assert ((dx.double().cpu() - dy * slope).abs() <= units * eps * dy.abs()).all()


@backends
def test_slope_right_of_zero(backend: str) -> None:
    """Within a few units, also where s is near 1: there 1 - s has lost the digits that h multiplies."""
    x = torch.linspace(0, 8, 4001, device=device)
    _, dx = run(ops.gelu, [x], "tanh", backend)
    dy = cotangent(x, x.dtype).double()
    exact = x.double().cpu().requires_grad_()
    out = ops.gelu(exact, approximate="tanh", backend="eager")
    (slope,) = torch.autograd.grad(out, exact, torch.ones_like(out))
    assert ((dx.double().cpu() - dy.cpu() * slope).abs() <= 4 * torch.finfo(x.dtype).eps * dy.cpu()).all()


@forms
@backends
def test_infinities_and_nan(approximate: str, backend: str) -> None:
    """Infinity stays; minus infinity is infinity times 0, as in PyTorch."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], device=device)
    y, _ = run(ops.gelu, [x], approximate, backend)
    assert y[0] == torch.inf
    assert y[1:].isnan().all()


@backends
def test_promotes_as_pytorch(backend: str) -> None:
    x = torch.randn(3, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(8, device=device, requires_grad=True)
    y = ops.bias_gelu(x, b, backend=backend)
    assert y.dtype == ops.bias_gelu(x, b, backend="eager").dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(y.sum(), [x, b])] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
@backends
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    x, b = (torch.randn(s, device=device, requires_grad=True) for s in (shape, shape[-1:]))
    with guarded():
        y = ops.bias_gelu(x, b, backend=backend)
        _, db = torch.autograd.grad(y.sum(), [x, b])
        assert ops.gelu(x, backend=backend).shape == y.shape == shape
    assert torch.equal(db, torch.zeros_like(b))


def test_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch choices of all chips; programs that take several tiles, or one."""
    tensors = [torch.randn(300, 33, device=device), torch.randn(33, device=device)]
    for family in gelu.FORWARD:
        for sms in (1, 3):
            monkeypatch.setattr(gelu, "chip", lambda _, family=family, sms=sms: Chip(family, sms))
            compare(ops.bias_gelu, tensors, "tanh", "triton")
            compare(ops.gelu, tensors[:1], "tanh", "triton")


MUTANTS = {
    "kernels/gelu.py": [
        # Constants, the form, the slope's digits and its far ends.
        ("K: tl.constexpr = 2 * 0.7978845608028654 * 1.442", "K: tl.constexpr = 2 * 0.79788 * 1.442"),
        ("K * (3 * 0.044715)", "K * 0.044715"),
        ("s = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)", "s = 0.5 + 0.5 * tl.erf(h * 0.7071)"),
        ("e * r * r, s)", "s * (1.0 - s), s)"),
        ("near = tl.minimum(tl.maximum(h, -20.0), 20.0)", "near = h"),
        ("tl.where(u >= 0.0, r, e * r)", "r"),
        # Tiles: masks, the bias forgotten in backward, the last tile's sums alone, rows twice.
        (
            "    mask = (rows < R)[:, None] & (cols < C)[None, :]",
            "    mask = (rows < R)[:, None] & (cols <= C)[None, :]",
        ),
        ("to(tl.float32) + b, TANH)", "to(tl.float32), TANH)"),
        ("        db += dx\n", "        db = dx\n"),
        (
            "tl.program_id(1) * ROWS, R, tl.num_programs(1) * ROWS",
            "tl.program_id(1), R, tl.num_programs(1) * ROWS",
        ),
        ("tl.store(y_ptr + at, x * gate(x, TANH), at < N)", "tl.store(y_ptr + at, x * gate(x, TANH))"),
    ],
}
