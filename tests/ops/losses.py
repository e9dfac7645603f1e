"""What the tests of both cross-entropy operations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .guard import guarded
from .helpers import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100


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


def watched(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[bool]:
    """For every call of `loss_rows` from now on, whether it makes a gradient."""
    made = []
    whole = module.loss_rows

    def watch(*args: Any, **options: Any) -> None:
        made.append(options.get("dlogits") is not None)
        whole(*args, **options)

    monkeypatch.setattr(module, "loss_rows", watch)
    return made
