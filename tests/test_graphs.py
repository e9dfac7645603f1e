"""The order in which a captured step is warmed up, captured and replayed, on stand-ins for CUDA."""

from __future__ import annotations

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

from fastgpt import graphs
from fastgpt.errors import InputError

MUTANTS = {
    "fastgpt/graphs.py": [
        ("static.copy_(given, non_blocking=True)", "pass"),
        ("if self._calls <= WARM_UP:", "if self._calls < WARM_UP:"),
        ("current.wait_stream(self._stream)", "pass"),
        ("        self._graph.replay()\n", ""),
    ]
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch)


def test_every_call_is_one_step(cuda: FakeCuda) -> None:
    seen: list[Tensor] = []
    total = torch.zeros(2)  # state, as weights or a cache are

    def step(x: Tensor) -> Tensor:
        cuda.log.append("step")
        seen.append(x)
        total.add_(x)
        return total.sum()

    captured = graphs.CapturedStep(step)
    inputs = [torch.full((2,), float(number)) for number in range(6)]
    sums = [captured(x).item() for x in inputs]
    assert sums == [0, 2, 6, 12, 20, 30]
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


def test_a_step_that_cannot_be_captured_is_an_error(cuda: FakeCuda) -> None:
    captured = graphs.CapturedStep(lambda x: x * x.sum().item())
    for _ in range(graphs.WARM_UP):
        captured(torch.ones(2))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(torch.ones(2))


def test_the_stand_in_repeats_numbers_of_the_host(cuda: FakeCuda) -> None:
    """Else it would show nothing: a step that counts in Python stands still when it is replayed."""
    count = 0

    def step(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x + count

    captured = graphs.CapturedStep(step)
    assert [captured(torch.zeros(())).item() for _ in range(6)] == [1, 2, 3, 4, 4, 4]
