"""A whole training step as one CUDA graph: the host launches once where it launched a thousand kernels.

No GPU was at hand to capture a step on: the tests run the order of what happens here, on stand-ins for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.errors import InputError

WARM_UP = 3  # steps; what is made once, such as optimizer states, must be there before a capture


class CapturedStep:
    """Calls `step`, and from the fourth call on replays it as a CUDA graph. Every call is one step.

    Args:
        step: forward, backward and optimizer, the host waiting for nothing; returns the loss. Gradients stay
            in place: `zero_grad(set_to_none=False)`. What else it reads, such as the learning rate, a
            replay reads again only where it is on the device: with `fastgpt.optim.AdamW`, call
            `write_hyperparameters()` before.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step = step
        self._calls = 0
        self._stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss of a step on these inputs, whose shapes are those of the fourth call; the next call
        overwrites it.

        Raises:
            InputError: another shape than the graph was captured with.
        """
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._uncaptured(inputs)
        if self._calls == WARM_UP + 1:
            self._capture(inputs)
        for static, given in zip(self._inputs, inputs, strict=True):
            if static.shape != given.shape:
                raise InputError(
                    f"an input has shape {tuple(given.shape)}: the CUDA graph was captured with "
                    f"{tuple(static.shape)}"
                )
            static.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._loss

    def _uncaptured(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """On the stream of the capture, since autograd remembers where it added up gradients."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(*inputs)
        current.wait_stream(self._stream)
        return loss

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Record a step, which does not run it."""
        self._inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._loss = self._step(*self._inputs)
