"""The order in which a captured step is warmed up, captured and replayed, on stand-ins for CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import graphs
from fastgpt.errors import InputError

MUTANTS = {
    "fastgpt/graphs.py": [
        ("static.copy_(given, non_blocking=True)", "pass"),
        ("if self._calls <= WARM_UP:", "if self._calls < WARM_UP:"),
        ("current.wait_stream(self._stream)", "pass"),
    ]
}


class FakeCuda:
    """Runs everything at once; a capture runs nothing, and a replay runs what was captured."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing: Any = None
        self.Stream = self.current_stream = lambda: SimpleNamespace(
            wait_stream=lambda other: self.log.append("wait")
        )
        self.CUDAGraph = lambda: SimpleNamespace(replay=self.replay)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.log.append("capture")
        yield

    def replay(self) -> None:
        self.log.append("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=fake))
    return fake


def test_every_call_is_one_step(cuda: FakeCuda) -> None:
    seen: list[Tensor] = []

    def step(x: Tensor) -> Tensor:
        cuda.log.append("step")
        seen.append(x)
        return x.sum()

    captured = graphs.CapturedStep(step)
    inputs = [torch.full((2,), float(number)) for number in range(6)]
    for x in inputs:
        captured(x)
    warm = ["wait", "step", "wait"] * graphs.WARM_UP
    assert cuda.log == [*warm, "capture", "step", "replay", "replay", "replay"]
    static = seen[graphs.WARM_UP]  # what replays read: the last input, in a tensor of its own
    assert torch.equal(static, inputs[-1])
    assert all(static is not x for x in inputs)


def test_other_shapes_are_refused(cuda: FakeCuda) -> None:
    captured = graphs.CapturedStep(torch.sum)
    for _ in range(graphs.WARM_UP + 1):
        captured(torch.ones(4, 2))
    with pytest.raises(InputError, match=r"shape \(1, 2\): the CUDA graph was captured with \(4, 2\)"):
        captured(torch.ones(1, 2))
