"""Every step against float64: the bound of the kernels' own tests, and the same bits on a second run.

On a CPU the Triton kernels run in the interpreter, which Triton has to be asked for before it is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.benchmarks.cases import copy_of, tensors_of, to_float64
from fastgpt.benchmarks.check import Oracle, Wrong
from fastgpt.benchmarks.studies.study import Run, Size, Study


def interpreted() -> bool:
    """Whether kernels that are defined from here on run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_steps(study: Study, device: torch.device, verbose: Callable[[str], None] = lambda _: None) -> None:
    """Hold all steps' kernels against float64, on small inputs.

    Args:
        device: a GPU, or a CPU in a process with TRITON_INTERPRET=1.
        verbose: gets a line for each step that is right.

    Raises:
        Wrong: a step's results are further from the oracle than the bound, or differ between two runs.
    """
    inputs = _inputs(study, "small", device)
    oracle = _oracle(study, inputs)
    for step in study.steps:
        results = _judged(oracle, step.name, step.run, inputs)
        if step.deterministic:
            again = _results(step.run, inputs)
            if not all(torch.equal(a, b) for a, b in zip(results, again, strict=True)):
                raise Wrong(f"{step.name}: two runs differ")
        verbose(f"{step.name}: {len(results)} results within twice eager's error of float64")


def check_on_cpu(study: Study, size: Size) -> None:
    """Hold the CPU forms against float64 on small inputs, and on those of `size` against the reference.

    Raises:
        Wrong: one of them differs by more than the bound.
    """
    device = torch.device("cpu")
    small = _inputs(study, "small", device)
    oracle = _oracle(study, small)
    for name, run in study.on_cpu().items():
        _judged(oracle, name, run, small)
    if size == "small":
        return
    inputs = _inputs(study, size, device)
    usual = _results(study.reference, inputs)
    for name, run in study.on_cpu().items():
        with _named(name):
            oracle.verify_like(_results(run, inputs), usual, _unit(inputs), _elements(inputs))


def _inputs(study: Study, size: Size, device: torch.device) -> list[Any]:
    """The same ones each time."""
    torch.manual_seed(0)
    return study.inputs(size, device)


def _oracle(study: Study, inputs: list[Any]) -> Oracle:
    exact = _results(study.reference, to_float64(inputs))
    usual = _results(study.reference, inputs)
    return Oracle.of(inputs, [], exact, usual, _elements(inputs))


def _judged(oracle: Oracle, name: str, run: Run, inputs: list[Any]) -> list[Tensor]:
    with _named(name), _poisoned():
        results = _results(run, inputs)
        oracle.verify(results, _unit(inputs))
    return results


def _results(run: Run, inputs: Sequence[Any]) -> list[Tensor]:
    """On copies: a step may write into its inputs, as an optimizer does."""
    return [x.detach() for x in tensors_of(run(*copy_of(list(inputs), gradients=False)))]


def _elements(inputs: Sequence[Any]) -> int:
    """How many numbers there are in all of them."""
    return sum(x.numel() for x in tensors_of(inputs))


def _unit(inputs: Sequence[Any]) -> float:
    """Of the dtype of the first tensor of floating point numbers."""
    return torch.finfo(next(x.dtype for x in tensors_of(inputs) if x.is_floating_point())).eps


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Wrong as wrong:
        raise Wrong(f"{name}: {wrong}") from None


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """What `torch.empty` makes is NaN: an element that nobody writes is then noticed."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
