"""What is special to the norms: every way through the launchers, and hard inputs.

tests/ops/test_table.py has the accuracy, repeatability, strides and composition that all operations share;
tests/ops/test_operators.py their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.guard import guarded
from ops.helpers import assert_accurate
from torch import Tensor

from fastgpt import ops
from fastgpt.kernels import layer_norm
from fastgpt.kernels.launch import Chip

device = "cuda" if torch.cuda.is_available() else "cpu"
Norm = Callable[..., Any]


def add(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` of two halves, which add up to x without rounding."""
    return ops.add_layer_norm(x / 2, x / 2, weight, bias, **options)


NORMS: dict[str, Norm] = {"layer_norm": ops.layer_norm, "add_layer_norm": add, "rms_norm": ops.rms_norm}


def run(norm: Norm, tensors: list[Tensor], seed: int, backend: str) -> list[Tensor]:
    """Outputs and gradients for gradients of the outputs that the seed gives."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    out = norm(*inputs, backend=backend)
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.manual_seed(seed)
    cotangents = [torch.randn(o.shape, dtype=torch.float64).to(o) for o in outs]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, inputs, cotangents)]


def compare(norm: Norm, tensors: list[Tensor]) -> None:
    """Within twice PyTorch's error of the oracle; every element written and nothing else; the same twice."""
    eager = run(norm, tensors, 1, "eager")
    # Gradients of the outputs are rounded to the dtype first, as the kernel gets them.
    torch.manual_seed(1)
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    out = norm(*exact, backend="eager")
    outs = list(out) if isinstance(out, tuple) else [out]
    cotangents = [torch.randn(o.shape, dtype=torch.float64).to(tensors[0].dtype).double() for o in outs]
    oracle = [*(o.detach() for o in outs), *torch.autograd.grad(outs, exact, cotangents)]
    with guarded() as guard:
        first = run(norm, [guard.place(x) for x in tensors], 1, "triton")
    again = run(norm, tensors, 1, "triton")
    for a, b, e, o in zip(first, again, eager, oracle, strict=True):
        assert_accurate(a, e, o)
        assert torch.equal(a, b)


# Rows x width, each a way through the launchers: more rows than programs x rows of a tile, so that programs
# take several tiles and a last one that is not full; a row that no vector divides; GPT-2 XL's; the widest
# tile, and one element more: all but one lane of the wide kernels' last block are masked.
SHAPES = [(197, 33), (9, 768), (3, 1600), (1, 8192), (2, 8193)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in NORMS for shape in SHAPES),
        ("layer_norm", (197, 1)),  # for rms_norm see tests/ops/helpers.py
        ("add_layer_norm", (3, 50257)),
    ],
    ids=str,
)
def test_shapes(name: str, shape: tuple[int, int]) -> None:
    rows, width = shape
    # bf16 where rows are long enough to be read 16 bytes at a time, and where they never are.
    dtype = torch.bfloat16 if width in (768, 50257) else torch.float32
    parameters = [torch.randn(width) for _ in range(1 if name == "rms_norm" else 2)]
    compare(NORMS[name], [t.to(device, dtype) for t in (torch.randn(rows, width), *parameters)])


# A tile and a way through the wide kernels, which all norms share but for what RMSNorm leaves out.
HARD = [("layer_norm", 40), ("rms_norm", 40), ("add_layer_norm", 8193), ("rms_norm", 8193)]


@pytest.mark.parametrize(("name", "width"), HARD, ids=str)
@pytest.mark.parametrize(
    ("offset", "scale"),
    [(1000.0, 1.0), (0.0, 1e15), (0.0, 1e-15), (0.0, 0.0)],
    ids=["mean", "large", "small", "zero"],
)
def test_hard_values(name: str, width: int, offset: float, scale: float) -> None:
    """A mean far above the deviation; squares near the ends of fp32; a variance of 0."""
    x = torch.randn(3, width) * scale + offset
    parameters = [torch.randn(width) for _ in range(1 if name == "rms_norm" else 2)]
    compare(NORMS[name], [t.to(device) for t in (x, *parameters)])


@pytest.mark.parametrize(("name", "width"), HARD, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_spoils_itself_alone(name: str, width: int, bad: float) -> None:
    x = torch.randn(3, width, device=device)
    x[1, 7] = bad
    parameters = [torch.randn(width, device=device) for _ in range(1 if name == "rms_norm" else 2)]
    kernel = run(NORMS[name], [x, *parameters], 1, "triton")
    eager = run(NORMS[name], [x, *parameters], 1, "eager")
    for number, (a, e) in enumerate(zip(kernel, eager, strict=True)):
        if a.ndim == 1:  # dw, db: sums over rows, one of them bad
            continue
        assert a[[0, 2]].isfinite().all()
        # The sum of add_layer_norm keeps its infinity, RMSNorm turns the rest of the row into zeros.
        torch.testing.assert_close(a[1], e[1], equal_nan=True, msg=f"output {number}")


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """x and residual of two dtypes promote, as in PyTorch; parameters get gradients of their own dtype."""
    x, residual = (torch.randn(5, 40, device=device).to(dtype).requires_grad_() for dtype in dtypes)
    w = torch.randn(40, device=device).requires_grad_()
    b = torch.randn(40, device=device).bfloat16().requires_grad_()
    y, summed = ops.add_layer_norm(x, residual, w, b, backend="triton")
    assert y.dtype == summed.dtype == torch.float32
    torch.testing.assert_close(summed, x.float() + residual.float())
    expected = torch.nn.functional.layer_norm(summed, (40,), w, b.float())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(y.sum(), [x, residual, w, b])
    assert [g.dtype for g in grads] == [*dtypes, torch.float32, torch.bfloat16]


def test_only_the_sum_is_used() -> None:
    """Gradients pass through the addition, and no kernel runs for the output nobody used."""
    x, residual = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    w = torch.randn(8, device=device, requires_grad=True)
    _, summed = ops.add_layer_norm(x, residual, w, backend="triton")
    dsummed = torch.randn_like(summed)
    dx, dresidual, dw = torch.autograd.grad(summed, [x, residual, w], dsummed, allow_unused=True)
    assert torch.equal(dx, dsummed)
    assert torch.equal(dresidual, dsummed)
    assert dw is None


def test_only_the_norm_is_used() -> None:
    x, residual = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    w = torch.randn(8, device=device)
    dy = torch.randn(3, 8, device=device)
    y, _ = ops.add_layer_norm(x, residual, w, backend="triton")
    expected, _ = ops.add_layer_norm(x, residual, w, backend="eager")
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    """Zero rows give zero gradients to the parameters; zero columns give nothing."""
    x = torch.randn(shape, device=device, requires_grad=True)
    w, b = (torch.randn(shape[-1], device=device, requires_grad=True) for _ in range(2))
    with guarded():
        y = ops.layer_norm(x, w, b, backend="triton")
        dx, dw, db = torch.autograd.grad(y.sum(), [x, w, b])
    assert y.shape == dx.shape == shape
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros_like(b))


@pytest.mark.parametrize(
    ("family", "sms", "rows", "width"),
    [*((family, sms, 300, 33) for family in layer_norm.FORWARD for sms in (1, 3)), (90, 40, 70, 8193)],
)
def test_chips(family: int, sms: int, rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch choices of all chips. Programs take several tiles, or one; several share wide columns."""
    monkeypatch.setattr(layer_norm, "chip", lambda _: Chip(family, sms))
    compare(ops.layer_norm, [torch.randn(s, device=device) for s in ((rows, width), (width,), (width,))])


MUTANTS = {
    "kernels/layer_norm.py": [
        # Variance over masked lanes, no eps, masks one off, the sum not rounded as backward will read it.
        ("s = tl.where(mask, s - mean[:, None], 0.0)", "s = s - mean[:, None]"),
        ("tl.rsqrt(tl.sum(s * s, 1) / C + eps)", "tl.rsqrt(tl.sum(s * s, 1) / C)"),
        ("row_in, col_in = rows < R, cols < C", "row_in, col_in = rows < R, cols < C - 1"),
        ("row_in, col_in = rows < R, cols < C", "row_in, col_in = rows <= R, cols < C"),
        (
            "        if db_ptr is not None:\n            db += dy\n        if ds",
            "        db += 0 * dy\n        if ds",
        ),
        # Terms of dx, the sum's gradient, parameters' gradients of a program's last tile alone.
        ("dx -= (tl.sum(g, 1) / C)[:, None]", "dx -= 0.0"),
        ("dx = g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]", "dx = g"),
        ("        dx *= rstd\n        if db_ptr", "        if db_ptr"),
        ("        dw += dy * xhat\n        g = dy", "        dw = dy * xhat\n        g = dy"),
        ("tl.program_id(0) * ROWS, R, tl.num_programs(0) * ROWS", "tl.program_id(0) * ROWS, R, R"),
        # The wide kernels: the merge of means, masks, the last block.
        ("m2 += delta * delta * start * share", "m2 += 0.0"),
        ("mean += delta * share", "mean += delta"),
        ("            s = tl.where(mask, s - block_mean, 0.0)", "            s = s - block_mean"),
        (
            "        xhat = (tl.load(x_ptr + row * C + cols, mask, other=0.0).to(tl.float32) - mean) * rstd",
            "        xhat = (tl.load(x_ptr + row * C + cols, mask, other=0.0).to(tl.float32) - mean)",
        ),
        ("tl.program_id(1) * ROWS, R, tl.num_programs(1) * ROWS", "0, R, tl.num_programs(1) * ROWS"),
        ("    rounded = s.to(summed_ptr.dtype.element_ty)", "    rounded = s.to(x_ptr.dtype.element_ty)"),
    ],
    "kernels/partials.py": [
        ("(rows < P)[:, None]", "(rows < P - 1)[:, None]"),
        ("range(0, P, BLOCK_P)", "range(0, P - BLOCK_P + 1, BLOCK_P)"),
        ("tl.cast(P, tl.int64) * C + at", "at"),
    ],
    "fastgpt/ops/layer_norm.py": [
        (
            "    if dy is None:  # only the sum was used\n"
            "        return dsummed, dsummed, None, None, None\n",
            "",
        ),
        (
            "x.new_empty(x.shape), statistic, torch.empty_like(statistic)",
            "x.new_empty(x.shape), statistic, statistic.new_empty(1)",
            "tests/ops/test_operators.py -k opcheck",
        ),
    ],
    "fastgpt/ops/library.py": [
        ("if torch.is_grad_enabled():", "if False:", "tests/ops/test_operators.py -k second"),
    ],
}
