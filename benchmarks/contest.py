"""Recipes for a training step against each other: first whether they compute the same, then how fast.

Each contender in turn takes some steps, and its losses are held against those of fp32 eager steps from the
same weights on the same tokens. One that disagrees is refused. The others are then timed in interleaved
rounds; where their weights and optimizer states do not fit the memory together, each alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgpt.benchmarks.results import Kind, Row, Status
from fastgpt.benchmarks.steps import Batch, Precision, Recipe, Step
from fastgpt.benchmarks.timing import Timing, failure, first_call, measure, peak_memory, release_memory
from fastgpt.config import TrainConfig
from fastgpt.model import GPT
from fastgpt.ops.choices import shape_class
from fastgpt.runtime import Precision as Peak

ORACLE = Recipe("oracle", "fp32", exact_norm=True)
ORACLE_TOKENS = 8192  # that it works on at a time, so that its fp32 activations fit where the contenders' do
BYTES_PER_PARAMETER = 16  # fp32 weights, gradients and two moments: the least that a step holds
# Eager steps that show what rounding alone does to the losses, by the precision of a contender.
YARDSTICKS: dict[Precision, Recipe] = {
    "fp32": Recipe("yardstick", "fp32"),
    "tf32": Recipe("yardstick", "tf32"),
    "autocast": Recipe("yardstick", "bf16", optimizer="fastgpt"),
    "bf16": Recipe("yardstick", "bf16", optimizer="fastgpt"),
}
SAMPLE_S = 0.2  # on a CPU: in training steps follow each other, and one after another contender's is cold
FLOOR = 16 * torch.finfo(torch.float32).eps  # of the first loss: for sums of fp32 in another order


@dataclass(frozen=True)
class Case:
    """What all contenders are given."""

    initial: GPT
    """On the CPU."""
    config: TrainConfig
    batches: list[Batch]
    """On the device."""
    check_steps: int
    """Whose losses are compared, at least 2."""
    seconds: Callable[[], float]
    """Of rounds: what is left when they begin. There are at least as many rounds as `measure` asks for."""
    profile: Callable[[Step], Any] | None = None
    """Called with each contender that computes what it should, last."""

    @property
    def device(self) -> torch.device:
        return self.batches[0][0].device

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.batches[0][0].numel()

    @property
    def shape(self) -> str:
        """ "B=8 T=1024 C=768 L=12 V=50304"."""
        (B, T), model = self.batches[0][0].shape, self.initial.config
        return f"B={B} T={T} C={model.n_embd} L={model.n_layer} V={model.vocab_size}"


@dataclass
class Entry:
    """A contender, and what was found of it."""

    recipe: Recipe
    kind: Kind = "measured"
    status: Status = "ok"
    note: str = ""
    losses: list[float] = field(default_factory=list)
    step_s: float = 0.0
    """Roughly: a step of those that were checked."""
    compile_s: float | None = None
    peak_memory_bytes: int | None = None
    profile: Any = None
    timing: Timing | None = None
    step: Step | None = None
    """Kept for the timing, unless the memory was needed."""


def contest(
    recipes: Sequence[Recipe],
    case: Case,
    reference: Reference,
    *,
    baseline: Callable[[list[Entry]], Entry],
    expected: Mapping[str, int] | None = None,
) -> list[Entry]:
    """Check and time the recipes. Call this inside `timing.working(device)`.

    Args:
        reference: the losses to find.
        baseline: picks, of those that passed, the one that ratios compare with.
        expected: bytes that a contender will hold, where that is known: on a CPU, whose system ends a process
            that takes too much, it is then not tried.
    """
    entries: list[Entry] = []
    for recipe in recipes:
        entry = _examine(recipe, case, reference, (expected or {}).get(recipe.name, 0))
        if entry.status == "oom" and any(other.step for other in entries):
            for other in entries:  # they will be timed alone
                other.step = None
            release_memory()
            entry = _examine(recipe, case, reference, (expected or {}).get(recipe.name, 0))
        entries.append(entry)
    together = [entry for entry in entries if entry.step is not None]
    if together:
        _time_together(together, case, baseline(together).recipe.name)
    release_memory()
    for entry in entries:
        if entry.status == "ok" and entry.timing is None:
            _time_alone(entry, case)
    return entries


@dataclass(frozen=True)
class Reference:
    """What the losses must be."""

    losses: list[float]
    """Of fp32 eager steps, clipped by the exact norm."""
    allowed: dict[Precision, float]
    """How far from these a contender's may be, in nats: twice as far as the precision's yardstick is at most,
    and the floor. docs/benchmarking-training.md argues it."""

    @classmethod
    def of(cls, case: Case, precisions: Iterable[Precision]) -> Reference:
        """For contenders of these precisions that can run on the device."""
        losses = eager_losses(case, ORACLE)
        floor = FLOOR * losses[0]
        off: dict[Recipe, float] = {}
        allowed: dict[Precision, float] = {}
        for precision in precisions:
            yardstick = YARDSTICKS.get(precision)
            if yardstick is None or yardstick.missing(case.device):
                continue
            if yardstick not in off:
                off[yardstick] = largest_difference(eager_losses(case, yardstick), losses)
            allowed[precision] = 2 * off[yardstick] + floor
        return cls(losses, allowed)

    def disagreement(self, recipe: Recipe, losses: Sequence[float]) -> str | None:
        """The first loss that is farther away than is allowed, in words; None if none is."""
        allowed = self.allowed[recipe.precision]
        for number, (mine, wanted) in enumerate(zip(losses, self.losses, strict=True), 1):
            if not abs(mine - wanted) <= allowed:  # a NaN is wrong too
                return f"loss of step {number} is {mine:.6g}: it must be {wanted:.6g}, within {allowed:.1g}"
        return None


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def eager_losses(case: Case, recipe: Recipe) -> list[float]:
    """The losses of steps by a recipe, the gradients of each summed over slices of the batch."""
    step = Step(recipe, case.initial, case.config, case.batches)
    idx, targets = case.batches[0]
    rows = max(1, ORACLE_TOKENS // idx.shape[1])
    losses = []
    with step.settings():
        for _ in range(case.check_steps):
            total = 0.0
            for x, y in zip(idx.split(rows), targets.split(rows), strict=True):
                loss = step.loss(x, y) * (len(x) / len(idx))
                loss.backward()
                total += loss.item()
            step.update()
            losses.append(total)
    del step
    release_memory()
    return losses


def _examine(recipe: Recipe, case: Case, reference: Reference, expected: int) -> Entry:
    """Take the first steps by a recipe."""
    entry = Entry(recipe)
    if reason := recipe.missing(case.device):
        entry.status, entry.note = "missing", reason
        return entry
    if too_large := _too_large(case, expected):
        entry.kind, entry.status, entry.note = "computed", "oom", too_large
        return entry
    try:
        _first_steps(entry, case)
        if wrong := reference.disagreement(recipe, entry.losses):
            entry.status, entry.note, entry.step = "wrong", wrong, None
        elif case.profile is not None and entry.step is not None:
            entry.profile = case.profile(entry.step)
    except Exception as error:
        entry.status, entry.note = failure(error)
        entry.step = None
    if entry.step is None:
        release_memory()
    return entry


def _too_large(case: Case, expected: int) -> str | None:
    """Why a step cannot fit a CPU's memory, or None. On a GPU trying is safe."""
    meminfo = Path("/proc/meminfo")
    if case.device.type != "cpu" or not meminfo.exists():  # macOS has none
        return None
    found = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(found["MemAvailable"].split()[0]) * 1024
    parameters = sum(p.numel() for p in case.initial.parameters())
    needed = max(expected, BYTES_PER_PARAMETER * parameters)
    if needed <= free:
        return None
    return f"not tried: it takes {needed / 1e9:.1f} GB at least, and {free / 1e9:.1f} GB are free"


def _first_steps(entry: Entry, case: Case) -> None:
    """On the first batch alone, so that the loss falls fast and a wrong gradient shows."""
    device, cuda = case.device, case.device.type == "cuda"
    held = torch.cuda.memory_allocated(device) if cuda else 0
    entry.step = step = Step(entry.recipe, case.initial, case.config, case.batches[:1])
    loss, first_s = first_call(step, device)
    entry.losses.append(loss.item())
    if cuda:  # not what a compiler tried
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(case.check_steps - 1):
        start = time.perf_counter()
        entry.losses.append(step().item())  # which waits for the step
        seconds.append(time.perf_counter() - start)
    entry.step_s = statistics.median(seconds)
    if entry.recipe.compiles:
        entry.compile_s = max(0.0, first_s - entry.step_s)
    if cuda:
        entry.peak_memory_bytes = torch.cuda.max_memory_allocated(device) - held
    else:
        entry.peak_memory_bytes = step.held_bytes() + peak_memory(step, device)
    step.batches = case.batches


def _time_together(entries: list[Entry], case: Case, baseline: str) -> None:
    calls = {entry.recipe.name: entry.step for entry in entries if entry.step is not None}
    timings = measure(
        calls,
        device=case.device,
        budget_s=case.seconds(),
        baseline=baseline,
        sample_s=SAMPLE_S,
        memory=False,
    )
    for entry in entries:
        _take_over(entry, timings[entry.recipe.name])


def _time_alone(entry: Entry, case: Case) -> None:
    try:
        step = Step(entry.recipe, case.initial, case.config, case.batches)
        timing = measure(
            {"alone": step}, device=case.device, budget_s=case.seconds(), control=False, memory=False
        )["alone"]
    except Exception as error:
        status, note = failure(error)
        timing = Timing(status, note)
    _take_over(entry, dataclasses.replace(timing, baseline=None))
    if entry.status == "ok":
        entry.note = "timed alone: with the others it does not fit the memory"
    release_memory()


def _take_over(entry: Entry, timing: Timing) -> None:
    entry.timing, entry.status, entry.note = timing, timing.status, timing.note
    entry.step = None


def row_of(entry: Entry, case: Case, where: Mapping[str, Any], **named: Any) -> Row:
    """The row of results; `named` are suite, operation, contender and what else the suite knows."""
    found: dict[str, Any] = {} if entry.timing is None else entry.timing.fields()
    found.update(status=entry.status, note=entry.note)
    flops = case.initial.flops_per_token() * case.tokens
    precision = {"autocast": "bf16"}.get(entry.recipe.precision, entry.recipe.precision)
    peak = Peak(precision, case.device).peak_flops()
    if median := found.get("median_us"):
        found["tokens_per_s"] = case.tokens / median * 1e6
        found["mfu"] = flops / (median * 1e-6) / peak if peak else None
    return Row(
        **{
            "direction": "step",
            "dtype": entry.recipe.precision,
            "shape": case.shape,
            "shape_class": shape_class(case.tokens * case.initial.config.n_embd),
            "kind": entry.kind,
            **found,
            "flops": flops,
            "limit_us": flops / peak * 1e6 if peak else None,
            "peak_memory_bytes": entry.peak_memory_bytes,
            "compile_s": entry.compile_s,
            "loss": entry.losses[-1] if entry.losses else None,
            **where,
            **named,
        }
    )
