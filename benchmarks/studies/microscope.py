"""What the launches of a step come to on a chip: captured on meta tensors, compiled, and bounded.

The launches of a step run one after another, so their ceilings add up. Where the host cannot launch as fast
as that, its launches are the bound. What a launch finds in L2 because the one before left it there is not
known here: all its bytes count as memory's. What it reads again itself (`Step.again`) does too where the
programs that a chip runs at a time hold more than its L2: all of it or nothing, an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgpt.benchmarks.studies.study import LAUNCH_S, Step, Study
from fastgpt.chips import Chip
from fastgpt.inspect import shipped
from fastgpt.inspect.bounds import Work
from fastgpt.inspect.build import Built
from fastgpt.inspect.report import Analysis, analyse
from fastgpt.inspect.work import work as usual_work
from fastgpt.kernels.examples import Example
from fastgpt.kernels.launch import Chip as Target
from fastgpt.kernels.launch import capture

LAUNCHES = "launches"


@dataclass(frozen=True)
class Seen:
    """A step on a chip, at GPT-2's size."""

    step: Step
    chip: Chip
    analyses: list[tuple[int, Analysis]]
    """Different launches, each with how often there is such a one; in order of their first."""

    @property
    def launches(self) -> int:
        return sum(count for count, _ in self.analyses) + self.step.fills

    @property
    def bytes(self) -> float:
        return sum(count * (a.bounds.work.bytes or 0.0) for count, a in self.analyses if a.bounds)

    @property
    def ceiling(self) -> float:
        """Seconds: the least that the step can take. Infinite where a kernel does not fit the chip."""
        return max(self._of_kernels(), self.launches * LAUNCH_S)

    @property
    def binding(self) -> str:
        """What takes the longest: the launches, or what binds the kernel that takes most."""
        if self._of_kernels() < self.launches * LAUNCH_S:
            return LAUNCHES
        _, longest = max(self.analyses, key=lambda found: found[0] * _ceiling(found[1]))
        return longest.bounds.binding if longest.bounds else "does not fit"

    def kernels(self) -> list[Analysis]:
        """One for each kernel that the step is about, in the launch that has the most bytes."""
        found: dict[str, Analysis] = {}
        for _, analysis in self.analyses:
            if analysis.built.name in self.step.aside:
                continue
            before = found.get(analysis.built.name)
            if before is None or _bytes(analysis) > _bytes(before):
                found[analysis.built.name] = analysis
        return list(found.values())

    def _of_kernels(self) -> float:
        return sum(count * _ceiling(analysis) for count, analysis in self.analyses)


def _ceiling(analysis: Analysis) -> float:
    return analysis.bounds.ceiling if analysis.bounds else float("inf")


def _bytes(analysis: Analysis) -> float:
    return (analysis.bounds.work.bytes or 0.0) if analysis.bounds else 0.0


def look(study: Study, chip: Chip, steps: Sequence[Step] | None = None) -> list[Seen]:
    """The steps (all by default) on that chip. Compiles kernels: not in a process that interprets them."""
    inputs = study.inputs("gpt2", torch.device("meta"))
    return [_look(study, step, inputs, chip) for step in steps or study.steps]


def _look(study: Study, step: Step, inputs: list[Any], chip: Chip) -> Seen:
    example = Example(step.name, lambda: step.run(*inputs))
    calls: list[shipped.Call] = []
    with capture(
        Target(shipped.family(chip), chip.sms),
        lambda *launch: calls.append(shipped.Call(study.name, example, *launch)),
    ):
        example.call()
    compiled: dict[tuple[Any, ...], Built] = {}
    found: dict[tuple[Any, ...], tuple[int, Analysis]] = {}
    for call in calls:
        work = _work(step, call)
        key = (_specialised(call), call.grid, work)
        if key in found:
            found[key] = (found[key][0] + 1, found[key][1])
            continue
        if key[0] not in compiled:
            compiled[key[0]] = call.compile(chip.sm)
        built = compiled[key[0]]
        analysis = analyse(call.title, built, chip, call.launch(built), work, call.values())
        found[key] = 1, _limited(analysis, step, call)
    return Seen(step, chip, list(found.values()))


def _limited(analysis: Analysis, step: Step, call: shipped.Call) -> Analysis:
    """With the step's own bounds among those of the microscope, and the bytes that L2 does not hold."""
    limits, chip = analysis.bounds, analysis.chip
    if limits is None:
        return analysis
    work = limits.work
    every = {**limits.seconds, **(step.limits(call, chip) if step.limits is not None else {})}
    again = step.again(call) if step.again is not None else None
    if again is not None and again.held * min(call.programs, analysis.fits.blocks * chip.sms) > chip.l2:
        work = replace(work, bytes=(work.bytes or 0.0) + again.bytes)
        every["bandwidth"] = (work.bytes or 0.0) / chip.bandwidth
    ordered = dict(sorted(every.items(), key=lambda item: -item[1]))
    return replace(analysis, bounds=replace(limits, seconds=ordered, work=work))


def _work(step: Step, call: shipped.Call) -> Work:
    work = step.work(call) if step.work is not None else None
    if work is not None:
        return work
    if call.kernel.fn.__module__.startswith("fastgpt.kernels."):
        return call.work()
    return usual_work("", call.arguments(), None)


def _specialised(call: shipped.Call) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for: dtypes, numbers that are 1 or multiples of 16, constants."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        if isinstance(value, int) and not isinstance(value, bool):
            return "int", value == 1, value % 16 == 0, value.bit_length() > 31
        return type(value)

    constants = {p.name for p in call.kernel.params if p.is_constexpr}
    given = call.arguments().items()
    return call.name, *((n, v if n in constants or n in call.options else kind(v)) for n, v in given)
