"""linear_gelu: its tiles, what it saves and reads, and its place in autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import linear_gelu

from .guard import guarded
from .helpers import DTYPES, assert_accurate, spread

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [row.name for row in ops.table() if row.operation == "linear_gelu"]
backends = pytest.mark.parametrize("backend", BACKENDS)

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux only)")
from fastgpt.kernels import linear_gelu as kernels  # noqa: E402
from fastgpt.kernels.launch import FAMILIES, Chip  # noqa: E402


def tensors(
    rows: int, k: int, n: int, dtype: torch.dtype = torch.float32, *, transposed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b; W scaled so that the pre-activations are near 1, where GELU bends."""
    x, b = torch.randn(rows, k), torch.randn(n)
    w = torch.randn(n, k) / max(k, 1) ** 0.5
    w = w.T.contiguous().T if transposed else w
    return tuple(t.to(DEVICE, dtype) for t in (x, w, b))  # type: ignore[return-value]


def run(
    inputs: tuple[Tensor, ...], dy: Tensor, backend: str, approximate: str = "tanh"
) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = linear_gelu(*leaves, approximate=approximate, backend=backend)
    return y.detach(), list(torch.autograd.grad(y, leaves, dy.to(y)))


def check(inputs: tuple[Tensor, ...], backend: str, approximate: str = "tanh") -> None:
    """Output and gradients are within twice PyTorch's error of the float64 oracle."""
    dy = torch.randn(*inputs[0].shape[:-1], inputs[1].shape[0], device=DEVICE).to(inputs[0].dtype)
    oracle, exact = run(tuple(t.cpu().double() for t in inputs), dy.cpu().double(), "eager", approximate)
    eager, torchs = run(inputs, dy, "eager", approximate)
    actual, grads = run(inputs, dy, backend, approximate)
    assert_accurate(actual, eager, oracle)
    for values in zip(grads, torchs, exact, strict=True):
        assert_accurate(*values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
@pytest.mark.parametrize(
    ("rows", "k", "n", "transposed"),
    [
        (1, 768, 33, True),  # decoding: the tile of few rows, and a last one that is half outside
        (3, 3072, 7, False),  # the longest sum
        (197, 33, 135, True),  # rows, K and N off every tile and vector width
        (197, 1600, 40, False),  # GPT-2 XL's width: a multiple of 64 and not of 128
        (16, 1, 1, False),
        (17, 65, 257, True),  # one row more than few, one column of K more than a block
    ],
)
def test_shapes(rows: int, k: int, n: int, transposed: bool, backend: str, dtype: torch.dtype) -> None:
    check(tensors(rows, k, n, dtype, transposed=transposed), backend)


@backends
@pytest.mark.parametrize(("rows", "k", "n"), [(0, 5, 7), (5, 5, 0), (5, 0, 7), (0, 0, 0)])
def test_zero_sizes(rows: int, k: int, n: int, backend: str) -> None:
    """Without K the result is gelu(b); without rows the gradients of W and b are 0."""
    check(tensors(rows, k, n), backend)


@backends
def test_leading_dimensions(backend: str) -> None:
    x, w, b = tensors(6, 33, 9)
    expected = linear_gelu(x, w, b, backend="eager")
    for shape in [(2, 3), (1, 2, 1, 3)]:
        actual = linear_gelu(x.view(*shape, 33), w, b, backend=backend)
        torch.testing.assert_close(actual, expected.view(*shape, 9))
    one = linear_gelu(x[0], w, b, backend=backend)
    torch.testing.assert_close(one, expected[0])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments and options of each launch of the product."""
    seen: list[dict[str, Any]] = []
    launch = kernels.launch

    def recording(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        _, w, _, y, h, *_ = args
        seen.append({"w": w, "y": y, "h": h, **options})
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(kernels, "launch", recording)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_tiles_of_every_chip(
    family: int, approximate: str, launches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every element of y and h is written, and nothing beside them, with each chip's tile."""
    monkeypatch.setattr(kernels, "chip", lambda device: Chip(family, 2))
    with guarded():
        check(tensors(197, 70, 300, torch.float16), "triton", approximate)
    assert launches[0]["BLOCK_N"] == kernels.HALF[family].columns


@pytest.mark.parametrize("tiles", [1, kernels.GROUP, kernels.GROUP + 2])
def test_order_of_tiles(tiles: int) -> None:
    """One tile of rows, a group exactly, and one more group that is lower."""
    with guarded():
        check(tensors(tiles * kernels.FLOAT.rows - 3, 5, 3 * kernels.FLOAT.columns), "triton")


def test_saves_only_the_pre_activation_and_only_if_needed(launches: list[dict[str, Any]]) -> None:
    x, w, b = tensors(20, 33, 9, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        recorded = linear_gelu(x.requires_grad_(), w, b, backend="triton")
    kept = {t.data_ptr() for t in saved} - {x.data_ptr(), w.data_ptr()}
    assert len(saved) == 3
    assert kept == {launches[-1]["h"].data_ptr()}
    assert launches[-1]["h"].dtype == torch.bfloat16
    with torch.no_grad():
        unrecorded = linear_gelu(x, w, b, backend="triton")
    assert launches[-1]["h"] is None
    frozen = linear_gelu(x.detach(), w, b, backend="triton")
    assert launches[-1]["h"] is None
    assert torch.equal(recorded, unrecorded)
    assert torch.equal(recorded, frozen)


def test_reads_a_transposed_weight_in_place(launches: list[dict[str, Any]]) -> None:
    """Hugging Face's Conv1D keeps W as (K, N): no copy each step."""
    x, w, b = tensors(20, 33, 9, transposed=True)
    linear_gelu(x, w, b, backend="triton")
    assert launches[-1]["w"].data_ptr() == w.data_ptr()
    check((spread(x), spread(w), spread(b)), "triton")  # rows with gaps are copied


def test_fp32_products_follow_the_users_choice(launches: list[dict[str, Any]]) -> None:
    """As in cuBLAS: tf32, with its 10 bits of mantissa, only where the user allowed it."""
    x, w, b = tensors(20, 33, 9)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in [("ieee", "ieee"), ("tf32", "tf32")]:
            torch.backends.cuda.matmul.fp32_precision = setting
            linear_gelu(x, w, b, backend="triton")
            assert launches[-1]["PRECISION"] == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@backends
def test_frozen_arguments_get_no_gradient(backend: str) -> None:
    x, w, b = tensors(20, 33, 9)
    full = run((x, w, b), torch.ones(20, 9), backend)[1]
    for wanted in ([0], [1], [2], [0, 2], [1, 2]):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, w, b))]
        y = linear_gelu(*leaves, backend=backend)
        grads = torch.autograd.grad(y, [leaves[i] for i in wanted], torch.ones_like(y))
        for i, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, full[i])


@backends
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_autocast(backend: str, inside: bool) -> None:
    """fp32 arguments are multiplied in bf16, as by F.linear; gradients are fp32, wherever backward runs."""
    x, w, b = tensors(40, 65, 9)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = linear_gelu(*leaves, backend=backend)
        expected = F.gelu(F.linear(*leaves), approximate="tanh")
        assert y.dtype == expected.dtype == torch.bfloat16
        if inside:
            grads = torch.autograd.grad(y.sum(), leaves)
    if not inside:
        grads = torch.autograd.grad(y.sum(), leaves)
    assert_accurate(y.detach(), expected.detach(), reference(x, w, b))
    theirs = torch.autograd.grad(expected.sum(), leaves)
    rounded = [t.detach().bfloat16().cpu().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(reference(*rounded).sum(), rounded)
    for grad, their, oracle in zip(grads, theirs, exact, strict=True):
        assert grad.dtype == torch.float32
        assert_accurate(grad.bfloat16(), their.bfloat16(), oracle)


def reference(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x, w, b = (t if t.dtype == torch.float64 else t.detach().cpu().double() for t in (x, w, b))
    return F.gelu(F.linear(x, w, b), approximate="tanh")


@pytest.mark.parametrize(("bias", "need_dx", "need_dw"), [(False, False, True), (True, True, False)])
def test_opcheck_without_some_outputs(bias: bool, need_dx: bool, need_dw: bool) -> None:
    x, w, b = tensors(20, 33, 9, transposed=True)
    h = F.linear(x, w, b)
    packets = torch.ops.fastgpt_triton
    opcheck(packets.linear_gelu_forward, (x, w, b if bias else None, "tanh", False))
    opcheck(packets.linear_gelu_backward, (h, x, w, h, "none", bias, need_dx, need_dw))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@backends
def test_not_finite_inputs(value: float, backend: str) -> None:
    """One row of x or one column of the output, as in PyTorch; rows that are masked away stay out of it."""
    for which in range(3):
        inputs = tensors(20, 33, 9)
        inputs[which].view(-1)[0] = value
        expected = linear_gelu(*inputs, backend="eager")
        torch.testing.assert_close(linear_gelu(*inputs, backend=backend), expected, equal_nan=True)


X, W, B = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(X.double(), W.double()), r"x has dtype torch.float64: kernels take float32, float16"),
        (lambda f: f(X, W.half()), r"weight has dtype torch.float16: it must be torch.float32, as x is"),
        (lambda f: f(X, W, B.bfloat16()), r"bias has dtype torch.bfloat16: it must be torch.float32"),
        (lambda f: f(X, W, torch.ones(4)), r"bias has shape \(4,\): it must be \(3,\)"),
        (lambda f: f(X, W.to("meta")), r"weight is on meta: it must be on cpu"),
    ],
)
def test_bad_input(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(lambda *args: linear_gelu(*args, backend="triton"))


MUTANTS = {
    "kernels/linear_gelu.py": [
        ("tl.minimum(tiles_m - group * GROUP, GROUP)", "GROUP"),
        ("WHOLE=K % c.k == 0", "WHOLE=True"),
        ("mask = row_in & (cols < N)", "mask = row_in & (cols <= N)"),
        ("rows < M - first_row, cols < N - first_col", "rows <= M - first_row, cols < N - first_col"),
        ("row_in, N - HALF, TANH)", "row_in, N, TANH)"),
        ("            b_ptr += HALF", "            b_ptr += 0"),
        ("tl.store(h_ptr + rows + cols, h, mask)", "tl.store(h_ptr + rows + cols, h * gate(h, TANH), mask)"),
        ("h = tl.dot(x, w, h, ", "h = tl.dot(x, w, tl.zeros_like(h), "),
        ("x_ptr += BLOCK_K", "x_ptr += BLOCK_K - 1"),
        ("enabled=False", "enabled=True"),
        ("if 1 not in weight.stride():", "if True:"),
    ],
    "fastgpt/ops/gelu.py": [
        ("save = torch.is_grad_enabled() and any(recorded)", "save = True"),
        ("need_dx, need_dw = ctx.needs_input_grad[:2]", "need_dw, need_dx = ctx.needs_input_grad[:2]"),
    ],
}
