"""What is special to the kernels of `linear_cross_entropy`: chunks, padding, and how much memory they take.

test_cross_entropy_kernels.py has what a row of logits does, test_table.py what all operations share.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import linear_cross_entropy

from .helpers import DTYPES
from .losses import DEVICE, IGNORE, check, run, some_targets, watched

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux only)")
from fastgpt.kernels import linear_cross_entropy as kernels

MUTANTS = {
    "kernels/linear_cross_entropy.py": [
        (
            "tl.where(count > 0, factor / count, 0.0)",
            "factor",
            "tests/ops/test_linear_cross_entropy_kernels.py -k chunks",
        ),
        (
            "tl.where(count > 0, factor / count, 0.0)",
            "factor / count",
            "tests/ops/test_linear_cross_entropy_kernels.py -k no_rows",
        ),
        (
            "tl.where(at < N, y * factor, 0.0)",
            "y * factor",
            "tests/ops/test_linear_cross_entropy_kernels.py -k padding_reaches",
        ),
        (
            "at < N, other=0.0)",
            "at < N - 1, other=0.0)",
            "tests/ops/test_linear_cross_entropy_kernels.py -k chunks",
        ),
        ("first=start == 0", "first=True", "tests/ops/test_linear_cross_entropy_kernels.py -k chunks"),
        (
            "    padded = weight.new_zeros(rows, weight.shape[1])",
            "    return weight[:rows]",
            "tests/ops/test_linear_cross_entropy_kernels.py -k padding_reaches",
        ),
        (
            "dloss=None if flat_dloss is None else flat_dloss[part]",
            "dloss=None",
            "tests/ops/test_linear_cross_entropy_kernels.py -k chunks",
        ),
    ],
}

BACKENDS = [
    row.name for row in ops.table() if row.operation == "linear_cross_entropy" and row.name != "eager"
]
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# Rows, in chunks of 3: one, fewer than a chunk, exactly one, one more, several. Columns: 57 and 64, since
# those that are no multiple of 64 are padded. Options as above.
@dtypes
@backends
@pytest.mark.parametrize(
    ("rows", "chunk_rows", "columns", "size", "options"),
    [
        (1, 3, 57, 57, {}),
        (2, 3, 64, 64, {"reduction": "none"}),
        (3, 3, 57, 50, {"label_smoothing": 0.1}),
        (4, 3, 64, 57, {"z_loss": 0.01, "reduction": "sum"}),
        (7, 3, 57, 57, {"reduction": "none", "z_loss": 0.01}),
        (7, 1, 57, 57, {}),
        (197, 64, 130, 129, {"label_smoothing": 0.1, "z_loss": 0.01}),
        (3, 4096, 768, 768, {}),
    ],
)
def test_chunks(
    rows: int,
    chunk_rows: int,
    columns: int,
    size: int,
    options: dict[str, Any],
    backend: str,
    dtype: torch.dtype,
) -> None:
    x, w = torch.randn(rows, 33).to(DEVICE, dtype), (0.3 * torch.randn(columns, 33)).to(DEVICE, dtype)
    inputs = [x, w, some_targets(rows, size)]
    check(linear_cross_entropy, inputs, backend, 0.3, chunk_rows=chunk_rows, vocab_size=size, **options)


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction: str, backend: str) -> None:
    x, w = torch.randn(0, 4, device=DEVICE), torch.randn(57, 4, device=DEVICE)
    targets = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss, dx, dw = run(linear_cross_entropy, [x, w, targets], 1.0, backend, reduction=reduction)
    want, _, _ = run(linear_cross_entropy, [x, w, targets], 1.0, "eager", reduction=reduction)
    torch.testing.assert_close(loss, want, equal_nan=True)
    assert dx.shape == (0, 4)
    assert torch.equal(dw, torch.zeros_like(w))
    targets = torch.full((3,), IGNORE, device=DEVICE)  # rows, but none that count
    x = torch.randn(3, 4, device=DEVICE)
    loss, dx, dw = run(linear_cross_entropy, [x, w, targets], 1.0, backend, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert (dx == 0).all()
    assert (dw == 0).all()


@backends
@pytest.mark.parametrize("size", [50, 64])
@pytest.mark.parametrize("padding", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_padding_reaches_nothing(reduction: str, padding: float, size: int, backend: str) -> None:
    """Rows of W from vocab_size on may hold anything: as if they were not there, and a gradient of 0."""
    x, w = torch.randn(7, 4, device=DEVICE), torch.randn(100, 4, device=DEVICE)
    targets = some_targets(7, size)
    want = run(linear_cross_entropy, [x, w[:size], targets], 0.3, backend, reduction=reduction)
    w[size:] = padding
    options = {"reduction": reduction, "vocab_size": size, "chunk_rows": 3}
    loss, dx, dw = run(linear_cross_entropy, [x, w, targets], 0.3, backend, **options)
    torch.testing.assert_close([loss, dx, dw[:size]], want)
    assert (dw[size:] == 0).all()
    _, _, dw = run(linear_cross_entropy, [x, w, targets], math.inf, backend, **options)
    assert (dw[size:] == 0).all()


@backends
def test_gradients_that_are_wanted(backend: str) -> None:
    x, w = torch.randn(7, 4, device=DEVICE), torch.randn(57, 4, device=DEVICE)
    targets = some_targets(7, 57)
    _, dx, dw = run(linear_cross_entropy, [x, w, targets], 0.3, backend)
    for reduction in ("mean", "none"):
        options: dict[str, Any] = {"reduction": reduction, "backend": backend}
        for wanted in (x, w):
            leaf = wanted.clone().requires_grad_()
            inputs = [leaf if t is wanted else t for t in (x, w)]
            loss = linear_cross_entropy(*inputs, targets, **options)
            loss = loss.sum() / (targets != IGNORE).sum() if reduction == "none" else loss
            (grad,) = torch.autograd.grad(0.3 * loss, leaf)
            torch.testing.assert_close(grad, dx if wanted is x else dw)


@backends
def test_fp16_gradients_do_not_underflow(backend: str) -> None:
    """p / count is 1.3e-6 here, 21 times fp16's least number: rounded to it, dx would be off by 1 %."""
    x = torch.randn(24, 4, device=DEVICE, dtype=torch.float16)
    w = torch.zeros(2**15, 4, device=DEVICE, dtype=torch.float16)
    w[1] = 1.0
    targets = torch.zeros(24, dtype=torch.int64, device=DEVICE)
    check(linear_cross_entropy, [x, w, targets], backend, 2.0**16, chunk_rows=16)


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(backend: str, reduction: str) -> None:
    """Each gives what the first did, which is not written into."""
    x = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    w = torch.randn(57, 4, device=DEVICE, requires_grad=True)
    loss = linear_cross_entropy(x, w, some_targets(5, 57), reduction=reduction, backend=backend)
    dloss = torch.full_like(loss, 0.3)
    first = torch.autograd.grad(loss, [x, w], dloss, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, [x, w], dloss)
    for a, b, copy in zip(first, second, copies, strict=True):
        assert torch.equal(a, copy)
        assert torch.equal(b, copy)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = watched(monkeypatch, kernels)
    x, w = torch.randn(5, 5, device=DEVICE), torch.randn(57, 5, device=DEVICE, requires_grad=True)
    targets = some_targets(5, 57)
    with torch.no_grad():
        linear_cross_entropy(x, w, targets, backend="triton")
    linear_cross_entropy(x, w.detach(), targets, backend="triton")
    linear_cross_entropy(x, w, targets, reduction="none", backend="triton")  # backward's
    assert made == [False] * 3
    linear_cross_entropy(x, w, targets, backend="triton")
    assert made[3:] == [True]


@pytest.mark.parametrize("target", [-1, 50, 56, 57, 2**40])
@pytest.mark.skipif(DEVICE != "cpu", reason="an error on a CPU only: CUDA would have to wait for it")
def test_targets_out_of_range(target: int) -> None:
    x, w, targets = torch.randn(3, 4), torch.randn(57, 4), torch.tensor([1, target, 3])
    with pytest.raises(
        InputError, match=f"targets holds {target}: it must be 0 to 49 or ignore_index = -100"
    ):
        linear_cross_entropy(x, w, targets, vocab_size=50, backend="triton")


class Largest(TorchDispatchMode):
    """The most bytes that an operator's output had, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        self.products += func in (torch.ops.aten.mm.out, torch.ops.aten.addmm.out)
        return out


@pytest.mark.parametrize("rows", [64, 61])
def test_never_holds_all_the_logits(rows: int) -> None:
    width, columns, chunk_rows = 8, 640, 16
    x, w = torch.randn(rows, width, device=DEVICE), torch.randn(columns, width, device=DEVICE)
    targets = some_targets(rows, columns)
    options = chunk_rows, IGNORE, 0.0, 0.0, "mean", columns
    with Largest() as largest:
        kernels.linear_cross_entropy_forward(x, w, targets, None, *options, True, True)
    assert largest.bytes == 4 * chunk_rows * columns  # a quarter of the logits
    assert largest.products == 3 * 4
    with Largest() as largest:
        kernels.linear_cross_entropy_forward(x, w, targets, None, *options, False, False)
    assert largest.products == 4


@backends
def test_dw_is_summed_in_fp32(backend: str) -> None:
    """In bf16, 1 + 2^-9 is 1: the chunks after the first would be lost."""
    x = torch.full((257, 1), 2.0**-9, device=DEVICE, dtype=torch.bfloat16)
    x[0] = 1.0
    w = torch.zeros(2, 1, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.zeros(257, dtype=torch.int64, device=DEVICE)
    _, _, dw = run(linear_cross_entropy, [x, w, targets], 1.0, backend, chunk_rows=1, reduction="sum")
    assert dw.flatten().tolist() == [-0.75, 0.75]  # (1 + 256 * 2^-9) / 2


@backends
def test_autocast(backend: str) -> None:
    """As F.linear under autocast: a product of bf16, gradients of fp32."""
    x, w = torch.randn(7, 33, device=DEVICE), torch.randn(57, 33, device=DEVICE)
    targets = some_targets(7, 57)
    low = run(linear_cross_entropy, [x.bfloat16(), w.bfloat16(), targets], 1.0, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(linear_cross_entropy, [x, w, targets], 1.0, backend)
    for a, b in zip(got, low, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_bad_input() -> None:
    x, w, targets = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2])
    with pytest.raises(
        InputError, match=r"weight has dtype torch.bfloat16: it must be torch.float32, the dt"
    ):
        linear_cross_entropy(x.to(DEVICE), w.to(DEVICE).bfloat16(), targets.to(DEVICE), backend="triton")
