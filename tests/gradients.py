"""Gradients of a model against central differences of its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

STEP = 1e-6


def assert_gradients(model: nn.Module, loss: Callable[[], Tensor], *, rtol: float, atol: float) -> None:
    """Of each parameter, in a random direction; the model is in float64."""
    loss().backward()
    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        with torch.no_grad():
            p.add_(STEP * direction)
            up = loss()
            p.sub_(2 * STEP * direction)
            down = loss()
            p.add_(STEP * direction)
        slope = (p.grad * direction).sum()
        torch.testing.assert_close(slope, (up - down) / (2 * STEP), rtol=rtol, atol=atol, msg=name)
