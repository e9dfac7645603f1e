"""A step as one CUDA graph: the host launches once where it launched hundreds of kernels.

Captured are whole training steps (`fastgpt bench ladder`) and the steps of decoding (`fastgpt.generate`). No
GPU was at hand to capture one on: the tests have stand-ins for CUDA, on which a replay repeats, on the CPU,
the operators that were recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.errors import InputError

WARM_UP = 3  # steps; what is made once, such as optimizer states, must be there before a capture


def can_capture(device: torch.device) -> bool:
    """Whether there are CUDA graphs for work on the device."""
    return device.type == "cuda"


class CapturedStep:
    """Calls `step`, and from the fourth call on replays it as a CUDA graph. Every call is one step.

    So nothing has to be undone: the calls that warm up are the first steps, and a capture runs nothing.

    Args:
        step: the host waiting for nothing; returns a tensor, such as the loss or logits. What it reads beside
            its inputs, a replay reads again only where it is on the device, and what it keeps must stay in
            place. In training gradients do with `zero_grad(set_to_none=False)`, and the learning rate with
            `fastgpt.optim.AdamW` and `write_hyperparameters()` before each call.
        device: where it runs; None is the current one.
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device | None = None) -> None:
        self._step = step
        self._calls = 0
        self._stream = torch.cuda.Stream(device)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result of a step on these inputs, whose shapes are those of the fourth call; the next call
        overwrites it.

        Raises:
            InputError: another shape than the graph was captured with.
            RuntimeError: the step cannot be captured, says CUDA.
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
        return self._result

    def _uncaptured(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """On the stream of the capture, since autograd remembers where it added up gradients."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._step(*inputs)
        current.wait_stream(self._stream)
        return result

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Record a step, which does not run it."""
        self._inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._result = self._step(*self._inputs)
