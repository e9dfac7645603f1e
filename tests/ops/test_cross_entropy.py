"""`cross_entropy` and `linear_cross_entropy`, whose only difference is the matrix product in front."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import cross_entropy, linear_cross_entropy
from fastgpt.ops.cross_entropy import cost
from fastgpt.ops.linear_cross_entropy import cost as linear_cost

from .helpers import assert_same, randn

IGNORE = -100


def by_hand(
    logits: Tensor, targets: Tensor, ignore: int, smoothing: float, z: float, reduction: str, size: int
) -> tuple[Tensor, Tensor]:
    """The loss and dlogits for a gradient of 1, row by row, as in the module's equations."""
    rows, flat = logits.detach().reshape(-1, logits.shape[-1]), targets.reshape(-1).tolist()
    losses = torch.zeros(len(flat), dtype=torch.float64)
    grad = torch.zeros_like(rows)
    for n, y in enumerate(flat):
        if y == ignore:
            continue
        row = rows[n, :size].tolist()
        top = max(row)
        lse = top + math.log(sum(math.exp(value - top) for value in row))
        losses[n] = (1 - smoothing) * (lse - row[y]) + z * lse**2
        if smoothing:
            losses[n] += smoothing * (lse - sum(row) / size)
        for c, value in enumerate(row):
            p = math.exp(value - lse)
            grad[n, c] = p * (1 + 2 * z * lse) - (1 - smoothing) * (c == y) - smoothing / size
    count = sum(y != ignore for y in flat)
    if reduction == "none":
        loss = losses.reshape(targets.shape)
    elif reduction == "sum":
        loss = losses.sum()
    else:
        loss = losses.sum() / count
        grad /= max(count, 1)  # nothing to divide when all are ignored: the gradient is 0 already
    return loss, grad.reshape(logits.shape)


TARGETS = torch.tensor([[0, 6, 3], [3, 1, 0]])
SOME = TARGETS.clone()
SOME[0, 1] = SOME[1, 2] = IGNORE


@pytest.mark.parametrize("targets", [TARGETS, SOME], ids=["all", "some"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab_size", [None, 11, 10, 7])  # of 11: none, one and several padded columns
def test_equations(
    targets: Tensor, label_smoothing: float, z_loss: float, reduction: str, vocab_size: int | None
) -> None:
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
        "vocab_size": vocab_size,
    }
    logits = randn(2, 3, 11)
    loss = cross_entropy(logits, targets, **options)
    want, dlogits = by_hand(logits, targets, IGNORE, label_smoothing, z_loss, reduction, vocab_size or 11)
    assert_same(loss, want)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert_same(grad, dlogits)
    assert (grad[..., vocab_size or 11 :] == 0).all()

    x, w = randn(2, 3, 4), randn(11, 4)
    loss = linear_cross_entropy(x, w, targets, chunk_rows=2, **options)
    product = (x[..., None, :] * w).sum(-1)  # (2, 3, 11)
    want, dl = by_hand(product, targets, IGNORE, label_smoothing, z_loss, reduction, vocab_size or 11)
    assert_same(loss, want)
    dx, dw = torch.autograd.grad(loss.sum(), [x, w])
    assert_same(dx, (dl[..., None] * w).sum(-2))
    assert_same(dw, (dl[..., None] * x[..., None, :]).sum((0, 1)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_matches_pytorch(label_smoothing: float, reduction: str, ignore_index: int) -> None:
    logits, targets = torch.randn(6, 11), torch.tensor([0, 10, 3, ignore_index, 1, 3])
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "ignore_index": ignore_index,
    }
    assert torch.equal(cross_entropy(logits, targets, **options), F.cross_entropy(logits, targets, **options))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored(z_loss: float, label_smoothing: float) -> None:
    logits, targets = randn(3, 5), torch.full((3,), IGNORE)
    options: dict[str, Any] = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    assert cross_entropy(logits, targets, **options).isnan()
    assert cross_entropy(logits, targets, reduction="sum", **options) == 0
    loss = cross_entropy(logits, targets, reduction="none", **options)
    assert_same(loss, torch.zeros(3, dtype=torch.float64))
    assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_no_rows(z_loss: float) -> None:
    logits, targets = torch.randn(0, 5), torch.zeros(0, dtype=torch.int64)
    assert cross_entropy(logits, targets, z_loss=z_loss).isnan()
    assert cross_entropy(logits, targets, z_loss=z_loss, reduction="sum") == 0
    assert cross_entropy(logits, targets, z_loss=z_loss, reduction="none").shape == (0,)
    x, w = torch.randn(0, 4), torch.randn(5, 4)
    assert linear_cross_entropy(x, w, targets, z_loss=z_loss).isnan()


@pytest.mark.parametrize("row", [row.name for row in ops.table() if row.operation == "cross_entropy"])
@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_padded_columns_may_hold_anything(
    row: str, padding: float, label_smoothing: float, reduction: str
) -> None:
    logits = torch.randn(2, 3, 16)
    logits[..., 11:] = padding
    logits.requires_grad_()
    loss = cross_entropy(
        logits,
        SOME,
        vocab_size=11,
        z_loss=0.01,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=row,
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[..., 11:] == 0).all()
    assert (logits.grad[0, 0, :11] != 0).all()


@pytest.mark.parametrize("row", [row.name for row in ops.table() if row.operation == "linear_cross_entropy"])
@pytest.mark.parametrize("padding", [math.nan, math.inf])
def test_padded_weight_rows_do_not_enter_the_loss(row: str, padding: float) -> None:
    """The loss alone: dx is dl W over all of W, and 0 * NaN is NaN there, as in the plain composition."""
    x, w = torch.randn(2, 3, 4), torch.randn(16, 4)
    want = linear_cross_entropy(x, w[:11], SOME, backend=row)
    w[11:] = padding
    torch.testing.assert_close(linear_cross_entropy(x, w, SOME, vocab_size=11, backend=row), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_is_fp32_and_computed_in_fp32(dtype: torch.dtype, reduction: str) -> None:
    logits = torch.randn(2, 3, 11).to(dtype).requires_grad_()
    loss = cross_entropy(logits, SOME, z_loss=0.1, reduction=reduction)
    wide = dtype if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    assert torch.equal(loss, cross_entropy(logits.to(wide), SOME, z_loss=0.1, reduction=reduction))
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    x, w = torch.randn(2, 3, 4, dtype=dtype), torch.randn(11, 4, dtype=dtype)
    assert linear_cross_entropy(x, w, SOME).dtype == wide


def test_large_and_infinite_logits() -> None:
    """No overflow at fp16's largest values; -inf is probability 0 and inf at the target; +inf is NaN."""
    logits = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16)
    assert cross_entropy(logits, torch.tensor([0])) == 0
    assert cross_entropy(logits, torch.tensor([2])) == float(logits[0, 0])
    masked = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    loss = cross_entropy(masked, torch.tensor([0]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(math.log(2)))
    torch.testing.assert_close(masked.grad, torch.tensor([[-0.5, 0.0, 0.5]]))
    assert cross_entropy(masked, torch.tensor([1])) == math.inf
    assert cross_entropy(torch.tensor([[0.0, math.inf]]), torch.tensor([0])).isnan()


def test_uniform_logits_give_log_of_the_vocabulary() -> None:
    loss = cross_entropy(torch.zeros(4, 50304), torch.tensor([0, 1, 2, 50256]), vocab_size=50257)
    torch.testing.assert_close(loss, torch.tensor(math.log(50257)))


def test_a_second_backward_gives_the_same() -> None:
    logits = randn(2, 3, 11)
    loss = cross_entropy(logits, SOME, z_loss=0.1)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, logits)[0], first)


def test_single_row_without_leading_dimensions() -> None:
    logits, target = torch.randn(5), torch.tensor(3)
    torch.testing.assert_close(cross_entropy(logits, target), -logits.log_softmax(-1)[3])
    assert cross_entropy(logits, target, reduction="none").shape == ()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1, "vocab_size": 7}])
def test_gradcheck(options: dict[str, Any]) -> None:
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, SOME, **options), (randn(2, 3, 9),))
    linear = (randn(2, 3, 4), randn(9, 4))
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, SOME, **options), linear)


L, T = torch.randn(2, 5), torch.tensor([1, 2])
X, W = torch.randn(2, 4), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.1}, r"label_smoothing is 1.1: it must be from 0 to 1"),
        ({"label_smoothing": math.nan}, r"label_smoothing is nan"),
        ({"z_loss": -1.0}, r"z_loss is -1.0: it must be at least 0"),
        ({"reduction": "avg"}, r"reduction is 'avg': it must be one of mean, sum, none"),
        ({"vocab_size": 6}, r"vocab_size is 6: it must be from 1 to 5"),
        ({"vocab_size": 0}, r"vocab_size is 0"),
        ({"vocab_size": 2}, r"targets holds 2: it must be 0 to 1 or ignore_index = -100"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cross_entropy(L, T, **options)
    with pytest.raises(InputError, match=message):
        linear_cross_entropy(X, W, T, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(L.long(), T), r"logits has dtype torch.int64: it must be floating point"),
        (lambda: cross_entropy(L, T.int()), r"targets has dtype torch.int32: it must be torch.int64"),
        (lambda: cross_entropy(L, L), r"targets has dtype torch.float32"),
        (lambda: cross_entropy(L, T[:1]), r"targets has shape \(1,\): it must be \(2,\)"),
        (lambda: cross_entropy(L, T[None]), r"targets has shape \(1, 2\): it must be \(2,\)"),
        (lambda: cross_entropy(L, T.to("meta")), r"targets is on meta: it must be on cpu, where logits is"),
        (lambda: cross_entropy(torch.tensor(1.0), T), r"logits is a scalar"),
        (lambda: cross_entropy(L, T + 3), r"targets holds 5: it must be 0 to 4 or ignore_index = -100"),
        (lambda: cross_entropy(L, T - 2), r"targets holds -1: it must be 0 to 4"),
        (
            lambda: cross_entropy(L, T + 3, ignore_index=5, label_smoothing=0.1, z_loss=0.1, reduction="sum"),
            None,
        ),
        (lambda: cross_entropy(L, T - 2, ignore_index=0), r"targets holds -1: .* or ignore_index = 0"),
        (lambda: linear_cross_entropy(X, W, T, chunk_rows=0), r"chunk_rows is 0: it must be at least 1"),
        (lambda: linear_cross_entropy(X.int(), W, T), r"x has dtype torch.int32"),
        (lambda: linear_cross_entropy(X, W[0], T), r"weight has shape \(4,\): it must be \(V, C\)"),
        (lambda: linear_cross_entropy(X, W.T, T), r"weight has shape \(4, 5\): it must be \(4, 4\)"),
        (lambda: linear_cross_entropy(X, W.to("meta"), T), r"weight is on meta"),
        (lambda: linear_cross_entropy(X, W, T[:1]), r"targets has shape \(1,\): it must be \(2,\)"),
        (lambda: linear_cross_entropy(X, W, T.int()), r"targets has dtype torch.int32"),
        (lambda: linear_cross_entropy(X, W, T + 3), r"targets holds 5: it must be 0 to 4"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str | None) -> None:
    if message is None:  # ignored, though out of range
        call()
        return
    with pytest.raises(InputError, match=message):
        call()


def test_cost() -> None:
    rows, width, vocab = 1024, 768, 50304
    logits = rows * vocab * 2
    assert cost(rows, vocab, torch.bfloat16).bytes == logits + 12 * rows
    assert cost(rows, vocab, torch.bfloat16, backward=True).bytes == 2 * logits + 12 * rows
    product = 2 * rows * width * vocab
    forward = linear_cost(rows, width, vocab, torch.bfloat16)
    assert product < forward.flops < 1.01 * product
    assert forward.bytes == 2 * width * (rows + vocab) + 12 * rows  # no logits
    backward = linear_cost(rows, width, vocab, torch.bfloat16, backward=True)
    assert 2 * product < backward.flops < 2.01 * product
    assert backward.bytes == 2 * 2 * width * (rows + vocab) + 12 * rows
