"""Loss on the validation split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.data import IGNORE_INDEX, ValidationSet

Total = Callable[[Tensor], Tensor]  # adds a tensor up, or averages it, over ranks that share the work


def alone(own: Tensor) -> Tensor:
    """The total of one process."""
    return own


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and gradients off inside the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def validation_loss(
    model: nn.Module,
    samples: ValidationSet,
    *,
    batch_size: int,
    device: torch.device,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
    forward: Callable[..., Any] | None = None,
    mean: Total = alone,
) -> float:
    """Mean cross entropy, in nats a token, over all targets of the set that are not IGNORE_INDEX.

    Args:
        model: a GPT.
        samples: what to predict.
        batch_size: samples per forward pass.
        device: where the model is.
        autocast: the precision to evaluate in.
        forward: called in place of the model, such as the same model compiled.
        mean: averages a tensor over ranks of which each has a share of the set.
    """
    forward = model if forward is None else forward
    total, count = torch.zeros((), device=device), 0
    with evaluating(model), autocast or contextlib.nullcontext():
        for x, y in samples.batches(batch_size):
            idx, targets = (torch.from_numpy(a).to(device) for a in (x, y))
            total += forward(idx, targets, reduction="sum", return_logits=False)[1]
            count += int((y != IGNORE_INDEX).sum())
    total, counted = mean(torch.tensor([total.item(), count], dtype=torch.float64))
    return (total / counted).item()
