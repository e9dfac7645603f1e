"""What is special to the kernels of `cross_entropy` and `linear_cross_entropy`: their blocks and chunks, the
gradient made in forward, hard inputs, and how much memory they take.

test_table.py has the accuracy, repeatability, strides and composition that all operations share,
test_operators.py their memory, test_cross_entropy.py the equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import cross_entropy, linear_cross_entropy

from .guard import guarded
from .helpers import DTYPES, assert_accurate

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux only)")
from fastgpt.kernels import cross_entropy as kernels
from fastgpt.kernels import linear_cross_entropy as linear_kernels
from fastgpt.kernels.launch import Chip

MUTANTS = {
    "kernels/cross_entropy.py": [
        ("total = total * _exp(top - greater) + tl.sum(", "total = total + tl.sum("),
        ("x = tl.where(cols < S, x, ", "x = tl.where(cols < V, x, "),
        ("for start in range(full, S, BLOCK):", "for start in range(full, S - 1, BLOCK):"),
        (
            "for start in range(full, V, BLOCK):",
            "for start in range(full, S, BLOCK):",
            "tests/ops/test_cross_entropy_kernels.py -k 16400",
        ),
        ("tl.where(cols < S, dl, 0.0), cols < V)", "tl.where(cols < S, dl, 0.0), cols < S)"),
        (
            "for number in range(1, S // BLOCK + 1):",
            "for number in range(1, S // BLOCK):",
            "tests/ops/test_cross_entropy_kernels.py -k 8192",
        ),
        ("dl = tl.where(cols == y, at_y, dl)", "pass"),
        ("scale = tl.where(known, g * (1.0 + 2.0 * z_loss * lse) / t", "scale = tl.where(known, g / t"),
        (
            "        if g == 1.0:",
            "        if g > 0.0:",
            "tests/ops/test_cross_entropy_kernels.py -k second_backward",
        ),
        ("            g /= tl.load(count_ptr)", "            g /= 1.0"),
        (
            "            distance = tl.where(cols < S, distance, 0.0)",
            "            pass",
            "tests/ops/test_cross_entropy_kernels.py -k shapes",
        ),
        (
            "known = (y >= 0) & (y < S)",
            "known = (y >= 0) & (y < V)",
            "tests/ops/test_cross_entropy_kernels.py -k out_of_range",
        ),
        (
            "top = tl.full([LANES], -3.4028234663852886e38",
            "top = tl.full([LANES], 0.0",
            "tests/ops/test_cross_entropy_kernels.py -k large",
        ),
        (
            "            tl.store(loss_ptr + row, 0.0)",
            "            tl.store(loss_ptr + row, 1.0)",
            "tests/ops/test_cross_entropy_kernels.py -k ignored",
        ),
        (
            "counted += (y != ignore_index)",
            "counted += (y != -100)",
            "tests/ops/test_cross_entropy_kernels.py -k ignored",
        ),
        ("rows < R, other=0.0)", "rows < R - 1, other=0.0)"),
        (
            "0 if dloss is None or dloss.ndim == 0 else dloss.stride(0)",
            "0 if dloss is None or dloss.ndim == 0 else 1",
            "tests/ops/test_table.py -k cross_entropy-triton",
        ),
    ],
    "kernels/linear_cross_entropy.py": [
        (
            "tl.where(count > 0, factor / count, 0.0)",
            "factor",
            "tests/ops/test_cross_entropy_kernels.py -k chunks",
        ),
        (
            "tl.where(count > 0, factor / count, 0.0)",
            "factor / count",
            "tests/ops/test_cross_entropy_kernels.py -k no_rows",
        ),
        (
            "tl.where(at < N, y * factor, 0.0)",
            "y * factor",
            "tests/ops/test_cross_entropy_kernels.py -k padding_reaches",
        ),
        ("at < N, other=0.0)", "at < N - 1, other=0.0)", "tests/ops/test_cross_entropy_kernels.py -k chunks"),
        ("first=start == 0", "first=True", "tests/ops/test_cross_entropy_kernels.py -k chunks"),
        (
            "    padded = weight.new_zeros(rows, weight.shape[1])",
            "    return weight[:rows]",
            "tests/ops/test_cross_entropy_kernels.py -k padding_reaches",
        ),
        (
            "dloss=None if flat_dloss is None else flat_dloss[part]",
            "dloss=None",
            "tests/ops/test_cross_entropy_kernels.py -k chunks",
        ),
    ],
    "fastgpt/ops/cross_entropy.py": [
        (
            "dlogits = ctx.dlogits.pop() if filled",
            "dlogits = ctx.dlogits[0] if filled",
            "tests/ops/test_cross_entropy_kernels.py -k second_backward",
        ),
    ],
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
BACKENDS = [row.name for row in ops.table() if row.operation == "cross_entropy" and row.name != "eager"]
LINEAR = [row.name for row in ops.table() if row.operation == "linear_cross_entropy" and row.name != "eager"]
backends = pytest.mark.parametrize("backend", BACKENDS)
linear_backends = pytest.mark.parametrize("backend", LINEAR)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def some_targets(rows: int, size: int) -> Tensor:
    """First and last column among them; from two rows on, one is ignored."""
    targets = torch.randint(size, (rows,))
    targets[0], targets[-1] = 0, size - 1
    if rows > 1:
        targets[rows // 2] = IGNORE
    return targets.to(DEVICE)


def run(
    call: Callable[..., Tensor], inputs: list[Tensor], dloss: float, backend: str, **options: Any
) -> list[Tensor]:
    """The loss, and the gradients of all inputs but the last, the targets."""
    leaves = [x.detach().requires_grad_() for x in inputs[:-1]]
    loss = call(*leaves, inputs[-1], **options, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, dloss))]


def check(
    call: Callable[..., Tensor], inputs: list[Tensor], backend: str, dloss: float = 1.0, **options: Any
) -> None:
    """Within twice PyTorch's error of the oracle; everything written, nothing outside; twice the same."""
    exact = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in inputs]
    oracle = run(call, exact, dloss, "eager", **options)
    eager = run(call, inputs, dloss, "eager", **options)
    with guarded() as guard:
        actual = run(call, [guard.place(x) for x in inputs], dloss, backend, **options)
    again = run(call, inputs, dloss, backend, **options)
    for a, b, e, o in zip(actual, again, eager, oracle, strict=True):
        assert_accurate(a, e, o)
        assert torch.equal(a, b)


# Rows: one, a few, many. Columns: one; fewer than a program's smallest block; no multiple of 16 bytes;
# GPT-2's widths; its vocabulary with rows that begin anywhere, and padded. A block is 8192 columns: exactly
# one and two, one more, padding after a whole block, padding of more than a block. Options take turns, since
# what a row does with them does not depend on its length.
SHAPES: list[tuple[int, int, int, dict[str, Any]]] = [
    (1, 1, 1, {"z_loss": 0.01}),
    (3, 1, 1, {"label_smoothing": 0.1}),
    (197, 33, 33, {"z_loss": 0.01}),
    (197, 33, 20, {"reduction": "sum", "label_smoothing": 0.1}),
    (3, 768, 768, {"reduction": "none", "label_smoothing": 1.0}),
    (3, 1600, 1599, {"reduction": "none", "z_loss": 0.01}),
    (3, 8192, 8192, {"label_smoothing": 0.1, "z_loss": 0.01}),
    (3, 8208, 8193, {"reduction": "sum"}),
    (3, 16400, 8192, {"label_smoothing": 0.1}),
    (3, 16384, 16384, {"reduction": "none"}),
    (3, 20000, 9000, {"z_loss": 0.01}),
    (3, 50257, 50257, {"label_smoothing": 0.1}),
    (3, 50304, 50257, {"z_loss": 0.0001}),
]


@dtypes
@backends
@pytest.mark.parametrize(("rows", "width", "size", "options"), SHAPES)
def test_shapes(
    rows: int, width: int, size: int, options: dict[str, Any], backend: str, dtype: torch.dtype
) -> None:
    """For a dloss of 1, whose gradient is forward's, and for another, where backward starts again."""
    logits = (3 * torch.randn(rows, width)).to(DEVICE, dtype)
    targets = some_targets(rows, size)
    for dloss in (1.0, 0.3) if rows < 100 else (0.3,):
        check(cross_entropy, [logits, targets], backend, dloss, vocab_size=size, **options)


@pytest.mark.parametrize("family", [80, 90, 100, 120])
def test_launch_choices_of_every_chip(family: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shipped for chips that are not here gives the same; padding and two blocks show the masks."""
    logits, targets = torch.randn(3, 9008, device=DEVICE), some_targets(3, 9000)
    options = {"vocab_size": 9000, "label_smoothing": 0.1}
    want = run(cross_entropy, [logits, targets], 0.3, "triton", **options)
    monkeypatch.setattr(kernels, "chip", lambda _: Chip(family, 2))
    got = run(cross_entropy, [logits, targets], 0.3, "triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Far from zero; so far apart that one column has all the probability; the same at fp16's limits.
@backends
@pytest.mark.parametrize(
    ("scale", "mean", "dtype"),
    [
        (1.0, 1e4, torch.float32),
        (1e4, 0.0, torch.float32),
        (1.0, -300.0, torch.bfloat16),
        (3e4, 0.0, torch.float16),
    ],
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits(
    scale: float, mean: float, dtype: torch.dtype, label_smoothing: float, backend: str
) -> None:
    logits = (scale * torch.randn(5, 57).clamp(-2, 2) + mean).to(DEVICE, dtype)
    targets = some_targets(5, 57)
    check(cross_entropy, [logits, targets], backend, 0.5, label_smoothing=label_smoothing, reduction="sum")


@backends
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one", "two", "block", "target", "row"])
def test_not_finite(value: float, where: str, label_smoothing: float, backend: str) -> None:
    """Losses as PyTorch's, infinities included, and its gradients where they are numbers."""
    logits = torch.randn(3, 8500, device=DEVICE)
    targets = torch.tensor([4, 8300, 9], device=DEVICE)
    columns = {
        "one": [70],
        "two": [70, 8400],  # in two blocks
        "block": list(range(8192)),
        "target": [8300],
        "row": list(range(8500)),
    }[where]
    logits[1, columns] = value
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    loss, grad = run(cross_entropy, [logits, targets], 1.0, backend, **options)
    eager_loss, eager_grad = run(cross_entropy, [logits, targets], 1.0, "eager", **options)
    torch.testing.assert_close(loss, eager_loss, equal_nan=True)
    assert torch.equal(grad.isnan().any(-1), eager_grad.isnan().any(-1))
    numbers = ~eager_grad.isnan().any(-1)
    torch.testing.assert_close(grad[numbers], eager_grad[numbers])


@backends
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
def test_ignored_rows(ignored: str, ignore_index: int, backend: str) -> None:
    """They may hold anything; their loss and gradient are exactly 0, and the mean is over the others."""
    logits = torch.randn(6, 57, device=DEVICE)
    targets = torch.tensor([1, 2, 3, 4, 56, 1], device=DEVICE)
    rows = {"none": [], "some": [0, 4], "all": list(range(6))}[ignored]
    targets[rows] = ignore_index
    logits[rows] = math.nan
    others = [row for row in range(6) if row not in rows]
    loss, grad = run(cross_entropy, [logits, targets], 1.0, backend, ignore_index=ignore_index)
    assert (grad[rows] == 0).all()
    if others:
        want, dwant = run(cross_entropy, [logits[others], targets[others]], 1.0, backend)
        assert torch.equal(loss, want)
        assert torch.equal(grad[others], dwant)
    else:
        assert loss.isnan()
    losses, _ = run(
        cross_entropy, [logits, targets], 1.0, backend, ignore_index=ignore_index, reduction="none"
    )
    assert (losses[rows] == 0).all()


@pytest.mark.parametrize("target", [-1, 50, 56, 57, 2**40])
def test_targets_out_of_range(target: int) -> None:
    """An error on a CPU. On CUDA, which that would make wait, NaN in the row, and nothing read for it."""
    logits = torch.randn(3, 57, device=DEVICE)
    targets = torch.tensor([1, target, 3], device=DEVICE)
    if DEVICE == "cpu":
        x, w = torch.randn(3, 4), torch.randn(57, 4)
        message = f"targets holds {target}: it must be 0 to 49 or ignore_index = -100"
        with pytest.raises(InputError, match=message):
            cross_entropy(logits, targets, vocab_size=50, backend="triton")
        with pytest.raises(InputError, match=message):
            linear_cross_entropy(x, w, targets, vocab_size=50, backend="triton")
    with guarded() as guard:
        losses, dlogits = torch.empty(3, device=DEVICE), torch.empty(3, 57, device=DEVICE)
        kernels.loss_rows(
            *(guard.place(logits), guard.place(targets)),
            losses=losses,
            dlogits=dlogits,
            ignore_index=-100,
            label_smoothing=0.0,
            z_loss=0.0,
            vocab_size=50,
        )
    assert losses.isnan().tolist() == [False, True, False]
    assert dlogits[1, :50].isnan().all()
    assert (dlogits[:, 50:] == 0).all()
    assert not dlogits[[0, 2]].isnan().any()


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(backend: str, reduction: str) -> None:
    """Each gives what a first would; the gradient of the first is not written into."""
    logits = torch.randn(5, 57, device=DEVICE, requires_grad=True)
    targets = some_targets(5, 57)

    def loss() -> Tensor:
        return cross_entropy(logits, targets, z_loss=0.01, reduction=reduction, backend=backend)

    kept = loss()
    dlosses = [torch.ones_like(kept), torch.full_like(kept, 0.3), torch.zeros_like(kept)]
    if reduction == "none":
        dlosses.append(torch.tensor([1.0, 0.3, 1.0, -2.0, 1.0], device=DEVICE))  # some are forward's
    seen = []
    for dloss in [*dlosses, *reversed(dlosses)]:
        (fresh,) = torch.autograd.grad(loss(), logits, dloss)
        (grad,) = torch.autograd.grad(kept, logits, dloss, retain_graph=True)
        assert torch.equal(grad, fresh)
        seen.append((grad, fresh.clone()))
    for grad, copy in seen:
        assert torch.equal(grad, copy)
    x = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    w = torch.randn(57, 4, device=DEVICE, requires_grad=True)
    linear = linear_cross_entropy(x, w, targets, reduction=reduction, backend="triton")
    first = torch.autograd.grad(linear, [x, w], dlosses[1], retain_graph=True)
    copies = [x.clone() for x in first]
    for a, b in zip(torch.autograd.grad(linear, [x, w], dlosses[1]), copies, strict=True):
        assert torch.equal(a, b)


@backends
def test_logits_are_not_written(backend: str) -> None:
    logits = torch.randn(5, 57, device=DEVICE, requires_grad=True)
    before = logits.detach().clone()
    cross_entropy(logits, some_targets(5, 57), backend=backend).backward()
    assert torch.equal(logits.detach(), before)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    whole = kernels.loss_rows

    def watch(*args: Any, **options: Any) -> None:
        made.append(options.get("dlogits") is not None)
        whole(*args, **options)

    monkeypatch.setattr(kernels, "loss_rows", watch)
    monkeypatch.setattr(linear_kernels, "loss_rows", watch)
    x, w, logits = (torch.randn(5, n, device=DEVICE) for n in (5, 5, 57))
    w = torch.randn(57, 5, device=DEVICE, requires_grad=True)
    logits.requires_grad_()
    targets = some_targets(5, 57)
    with torch.no_grad():
        cross_entropy(logits, targets, backend="triton")
        linear_cross_entropy(x, w, targets, backend="triton")
    cross_entropy(logits.detach(), targets, backend="triton")
    linear_cross_entropy(x, w.detach(), targets, backend="triton")
    linear_cross_entropy(x, w, targets, reduction="none", backend="triton")  # backward's
    assert made == [False] * 5
    cross_entropy(logits, targets, backend="triton")
    linear_cross_entropy(x, w, targets, backend="triton")
    assert made[5:] == [True, True]


@backends
def test_strides(backend: str) -> None:
    """Rows apart, columns apart, rows that are one and the same, dimensions that no view makes one."""
    targets = torch.randint(57, (2, 3), device=DEVICE)
    for logits in [
        torch.randn(2, 3, 64, device=DEVICE)[..., 3:60],
        torch.randn(2, 57, 3, device=DEVICE).transpose(1, 2),
        torch.randn(1, 3, 57, device=DEVICE).expand(2, 3, 57),
        torch.randn(2, 4, 57, device=DEVICE)[:, :-1],
        torch.randn(3, 2, 57, device=DEVICE).transpose(0, 1),
    ]:
        for aim in (targets, targets[:, :1].expand(2, 3), targets.T.contiguous().T):
            got = run(cross_entropy, [logits, aim], 0.5, backend)
            want = run(cross_entropy, [logits.contiguous(), aim.contiguous()], 0.5, backend)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Rows, in chunks of 3: one, fewer than a chunk, exactly one, one more, several. Columns: 57 and 64, since
# those that are no multiple of 64 are padded. Options as above.
@dtypes
@linear_backends
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


@linear_backends
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


@linear_backends
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


@linear_backends
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


@linear_backends
def test_fp16_gradients_do_not_underflow(backend: str) -> None:
    """p / count is 1.3e-6 here, 21 times fp16's least number: rounded to it, dx would be off by 1 %."""
    x = torch.randn(24, 4, device=DEVICE, dtype=torch.float16)
    w = torch.zeros(2**15, 4, device=DEVICE, dtype=torch.float16)
    w[1] = 1.0
    targets = torch.zeros(24, dtype=torch.int64, device=DEVICE)
    check(linear_cross_entropy, [x, w, targets], backend, 2.0**16, chunk_rows=16)


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
        linear_kernels.linear_cross_entropy_forward(x, w, targets, None, *options, True, True)
    assert largest.bytes == 4 * chunk_rows * columns  # a quarter of the logits
    assert largest.products == 3 * 4
    with Largest() as largest:
        linear_kernels.linear_cross_entropy_forward(x, w, targets, None, *options, False, False)
    assert largest.products == 4


@linear_backends
def test_dw_is_summed_in_fp32(backend: str) -> None:
    """In bf16, 1 + 2^-9 is 1: the chunks after the first would be lost."""
    x = torch.full((257, 1), 2.0**-9, device=DEVICE, dtype=torch.bfloat16)
    x[0] = 1.0
    w = torch.zeros(2, 1, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.zeros(257, dtype=torch.int64, device=DEVICE)
    _, _, dw = run(linear_cross_entropy, [x, w, targets], 1.0, backend, chunk_rows=1, reduction="sum")
    assert dw.flatten().tolist() == [-0.75, 0.75]  # (1 + 256 * 2^-9) / 2


@linear_backends
def test_autocast(backend: str) -> None:
    """As F.linear under autocast: a product of bf16, gradients of fp32."""
    x, w = torch.randn(7, 33, device=DEVICE), torch.randn(57, 33, device=DEVICE)
    targets = some_targets(7, 57)
    low = run(linear_cross_entropy, [x.bfloat16(), w.bfloat16(), targets], 1.0, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(linear_cross_entropy, [x, w, targets], 1.0, backend)
        logits, eager = run(cross_entropy, [x, targets % 33], 1.0, backend)
    for a, b in zip(got, low, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())
    assert logits.dtype == eager.dtype == torch.float32


def test_bad_input() -> None:
    x, w, targets = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2])
    with pytest.raises(
        InputError, match=r"weight has dtype torch.bfloat16: it must be torch.float32, the dt"
    ):
        linear_cross_entropy(x.to(DEVICE), w.to(DEVICE).bfloat16(), targets.to(DEVICE), backend="triton")
