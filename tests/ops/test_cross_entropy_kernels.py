"""What is special to the kernels of `cross_entropy`: their blocks, the gradient made in forward, hard inputs.

test_table.py has the accuracy, repeatability, strides and composition that all operations share,
test_operators.py their memory, test_cross_entropy.py the equations.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import cross_entropy

from .guard import guarded
from .helpers import DTYPES
from .losses import DEVICE, check, run, some_targets, watched

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux only)")
from fastgpt.kernels import cross_entropy as kernels
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
    "fastgpt/ops/cross_entropy.py": [
        (
            "dlogits = ctx.dlogits.pop() if filled",
            "dlogits = ctx.dlogits[0] if filled",
            "tests/ops/test_cross_entropy_kernels.py -k second_backward",
        ),
    ],
}

BACKENDS = [row.name for row in ops.table() if row.operation == "cross_entropy" and row.name != "eager"]
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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
    """What is shipped for chips that are not here is as accurate; padding and two blocks show the masks."""
    logits, targets = torch.randn(3, 9008, device=DEVICE), some_targets(3, 9000)
    monkeypatch.setattr(kernels, "chip", lambda _: Chip(family, 2))
    check(cross_entropy, [logits, targets], "triton", 0.3, vocab_size=9000, label_smoothing=0.1)


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
        message = f"targets holds {target}: it must be 0 to 49 or ignore_index = -100"
        with pytest.raises(InputError, match=message):
            cross_entropy(logits, targets, vocab_size=50, backend="triton")
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


@backends
def test_logits_are_not_written(backend: str) -> None:
    logits = torch.randn(5, 57, device=DEVICE, requires_grad=True)
    before = logits.detach().clone()
    cross_entropy(logits, some_targets(5, 57), backend=backend).backward()
    assert torch.equal(logits.detach(), before)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = watched(monkeypatch, kernels)
    logits = torch.randn(5, 57, device=DEVICE, requires_grad=True)
    targets = some_targets(5, 57)
    with torch.no_grad():
        cross_entropy(logits, targets, backend="triton")
    cross_entropy(logits.detach(), targets, backend="triton")
    assert made == [False] * 2
    cross_entropy(logits, targets, backend="triton")
    assert made[2:] == [True]


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


@backends
def test_autocast(backend: str) -> None:
    """Casts nothing: gradients and loss of fp32 logits are fp32, and the same."""
    logits, targets = torch.randn(7, 33, device=DEVICE), some_targets(7, 33)
    want = run(cross_entropy, [logits, targets], 1.0, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(cross_entropy, [logits, targets], 1.0, backend)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
