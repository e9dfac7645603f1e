"""Loss on validation text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastgpt.data import ValidationSet


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
    windows: ValidationSet,
    *,
    batch_size: int,
    device: torch.device,
    autocast: contextlib.AbstractContextManager[Any] | None = None,
    forward: Callable[..., Any] | None = None,
) -> float:
    """Mean cross entropy, in nats a token, over all windows of the set.

    Args:
        model: a GPT.
        windows: what to predict.
        batch_size: windows per forward pass.
        device: where the model is.
        autocast: the precision to evaluate in.
        forward: called in place of the model, such as the same model compiled.
    """
    forward = model if forward is None else forward
    total, count = torch.zeros((), device=device), 0
    with evaluating(model), autocast or contextlib.nullcontext():
        for x, y in windows.batches(batch_size):
            idx, targets = (torch.from_numpy(a).to(device) for a in (x, y))
            total += forward(idx, targets, reduction="sum", return_logits=False)[1]
            count += targets.numel()
    return (total / count).item()
