"""`fastgpt bench ops`: every operation, implementation, dtype and shape, against each other.

For each case: who can run here, whether each computes what the reference does, and then their times, in
interleaved rounds. Every contender is a row of results, also those that were wrong, missing or out of memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.benchmarks.cases import (
    WORKLOADS,
    Inputs,
    Sizes,
    Workload,
    class_of,
    copy_of,
    cost_of,
    directions,
    least_bytes,
    shapes_of,
    tensors_of,
)
from fastgpt.benchmarks.check import Checker, cotangents_for, inputs_for
from fastgpt.benchmarks.contenders import EAGER, Contender, contenders_of
from fastgpt.benchmarks.environment import clocks_during, new_run, now, where
from fastgpt.benchmarks.record import choose, lines
from fastgpt.benchmarks.results import RESULTS, Row, Status, append, newest_run, path_of, read
from fastgpt.benchmarks.summary import summary
from fastgpt.benchmarks.timing import Call, failure, first_call, measure, one_line, release_memory, working
from fastgpt.chips import chip_named
from fastgpt.errors import InputError
from fastgpt.ops import choices
from fastgpt.runtime import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cuda": ("bfloat16", "float32"), "cpu": ("float32", "bfloat16")}
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIRECTIONS = ("both", "forward", "backward")
COPIES = 4  # of the inputs, which take turns
COPIES_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # at most, together: large ones leave no cache warm anyway
MIN_ROUNDS = 5
# Guesses of what a device does, for leaving out a case that would take more than the rest of the budget:
# flops/s and bytes/s, of a CPU for each thread; and how often a contender is called, checks and all.
GUESS = {"cuda": (1e13, 5e11), "cpu": (3e10, 4e9)}
CALLS = MIN_ROUNDS + 6
CHECK_S, COMPILE_S = 0.6, 6.0  # a case's checks and preparations, and what it takes more where it is compiled
NO_TIME = "left out: the time was needed for other cases (a larger --budget, or --contenders compile)"
LARGE = 0.25  # a case of more than this share of the budget comes after all others


@dataclass
class OpsArgs:
    """Time every operation and implementation against eager, torch.compile and other libraries' kernels."""

    ops: tuple[str, ...] = ()
    """Operations; all by default."""
    shapes: str = "quick"
    """quick, cpu (these and the preset char-cpu), gpt2 (GPT-2 124M at several batches, the larger ones at
    one) or all."""
    dtypes: tuple[str, ...] = ()
    """float32, bfloat16, float16; by default the first two."""
    directions: tuple[str, ...] = ()
    """forward (without recording), backward, both; all by default."""
    contenders: tuple[str, ...] = ()
    """Whom to time besides eager; by default all but compile-max-autotune and what compiles for minutes."""
    device: str = "auto"
    """auto, cuda, cuda:N or cpu."""
    threads: int | None = None
    """Of a CPU; by default one for each core."""
    budget: float = 300.0
    """Seconds for all; the most important cases come first, and what is left out is named."""
    case_seconds: float = 1.5
    """Seconds of rounds for each case."""
    every_case: bool = False
    """Leave torch.compile out once the time left is what the other contenders of all other cases need."""
    out: Path = RESULTS
    """Results go to OUT/MACHINE/RUN.csv."""
    run: str | None = None
    """A name for this run; by default the time."""
    resume: bool = False
    """Go on with that run, or without --run with this machine's newest: skip the cases that it has."""
    record: bool = False
    """Keep which implementation won, for `fastgpt.ops.use("auto")`."""
    record_file: Path | None = None
    """Keep it in this file; by default the user's record in the cache folder."""
    record_as: str | None = None
    """Keep it for the device of this name, in the table of the package also "cpu"; by default this one."""


@dataclass(frozen=True)
class Case:
    workload: Workload
    dtype: torch.dtype
    sizes: Sizes
    direction: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return self.workload.label(self.sizes)

    def __str__(self) -> str:
        return f"{self.workload.operation} {self.direction} {self.dtype_name} {self.label}"


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    run_ops(parse(OpsArgs, args, "bench ops"))


def run_ops(given: OpsArgs) -> Path:
    """Run the suite; returns the file of results.

    Raises:
        InputError: an option out of range, or a GPU that an error has left unusable.
    """
    device = resolve_device(given.device)
    if device.type not in GUESS:
        raise InputError(f"device {given.device!r}: operations are timed on cuda and cpu")
    cases = list(cases_of(given, device))
    names = {c.name for w in WORKLOADS.values() for c in contenders_of(w, device, torch.float32)}
    _chosen("contenders", given.contenders, tuple(sorted(names)))
    with working(device, given.threads):
        suite = _Suite(given, device)
        print(
            f"{suite.where['device_name']}, run {suite.run}: {len(cases)} cases -> {suite.path}", flush=True
        )
        left = suite.time_all(cases)
    print(f"\n{summary(suite.rows())}")
    if left:
        print(f"\n{len(left)} of {len(cases)} cases did not fit into {given.budget:g} s, such as {left[0]}:")
        print(f"go on with --resume --run {suite.run} and a larger --budget")
    if given.record:
        _record(given, suite)
    return suite.path


def cases_of(given: OpsArgs, device: torch.device) -> Iterator[Case]:
    """All cases asked for, once each, those that matter most first.

    Raises:
        InputError: an option names what does not exist.
    """
    operations = _chosen("ops", given.ops, tuple(WORKLOADS))
    dtypes = _chosen("dtypes", given.dtypes or DEFAULT_DTYPES[device.type], tuple(DTYPES))
    wanted = _chosen("directions", given.directions, DIRECTIONS)
    ranked = []
    for i, name in enumerate(operations):
        workload = WORKLOADS[name]
        for s, sizes in enumerate(shapes_of(given.shapes, device)):
            for t, dtype in enumerate(dtypes):
                for d, direction in enumerate(directions(workload)):
                    # An operation without derivative has only forward, which then is asked for by any name.
                    if direction in wanted or not workload.differentiable:
                        ranked.append(((s + t + d, i), Case(workload, DTYPES[dtype], sizes, direction)))
    ranked.sort(key=lambda item: item[0])
    seen: set[str] = set()
    for _, case in ranked:
        if str(case) not in seen:
            seen.add(str(case))
            yield case


def _chosen(name: str, given: Sequence[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    for value in given:
        if value not in allowed:
            raise InputError(f"{name} = {value!r}: choose from {', '.join(allowed)}")
    return tuple(given) or allowed


class _Suite:
    """One invocation: what it has asked for, where it is, and its file."""

    def __init__(self, given: OpsArgs, device: torch.device) -> None:
        self.given, self.device = given, device
        self.where = where(device, run="")
        machine = self.where["machine"]
        self.run = given.run or (newest_run(given.out, machine) if given.resume else None) or new_run()
        self.where["run"] = self.run
        self.path = path_of(given.out, machine, self.run)
        if self.path.exists() and not given.resume and any(row.suite == "ops" for row in read(self.path)):
            raise InputError(f"{self.path} has such rows: give another --run, or --resume to go on with it")
        self.checker = Checker(device)

    def rows(self) -> list[Row]:
        found = read(self.path) if self.path.exists() else []
        return [row for row in found if row.suite == "ops"]

    def time_all(self, cases: Sequence[Case]) -> list[Case]:
        """Time the cases that are not in the file and fit the budget; returns those that did not."""
        done = {row.case for row in self.rows()}
        start, left = time.monotonic(), []
        wanted = [(case, self._guess(case)) for case in cases if self._key(case) not in done]
        wanted.sort(key=lambda item: item[1] > LARGE * self.given.budget)
        needed = [guess + self.given.case_seconds + CHECK_S for _, guess in wanted]  # without compiling
        for number, (case, guess) in enumerate(wanted):
            remaining = self.given.budget - (time.monotonic() - start)
            if remaining < guess:
                left.append(case)
                continue
            compiled = not self.given.every_case or remaining > sum(needed[number:]) + COMPILE_S
            rows = self._time(case, compiled=compiled)
            append(rows, self.path)
            print(_line(case, rows), flush=True)
            self._require_usable_device()
        return left

    def _key(self, case: Case) -> tuple[str, ...]:
        return self._row(case, EAGER, "ok").case

    def _guess(self, case: Case) -> float:
        """About how many seconds a case takes, compilation aside."""
        cost = cost_of(case.workload, case.sizes, case.dtype, case.direction)
        flops, bandwidth = GUESS[self.device.type]
        times = self.where["threads"] or 1
        able = sum(contender.missing is None for contender in self._contenders(case))
        seconds = cost.flops / (flops * times) + cost.bytes / (bandwidth * times)
        return CALLS * (able + 1) * seconds  # eager is timed twice

    def _time(self, case: Case, *, compiled: bool) -> list[Row]:
        """A row for each contender."""
        torch.compiler.reset()  # it counts compilations of a function over all cases, and refuses after eight
        contenders = self._contenders(case)
        if not compiled:
            contenders = [replace(c, missing=NO_TIME) if c.compiles else c for c in contenders]
        rows = [self._row(case, c.name, "missing", c.missing) for c in contenders if c.missing]
        able = [c for c in contenders if not c.missing]
        if too_large := self._too_large(case):
            return rows + [self._row(case, c.name, "oom", too_large, kind="computed") for c in able]
        ready: dict[str, list[Call]] = {}
        compile_s: dict[str, float | None] = {}
        for contender in able:
            try:
                wrong, ready[contender.name], compile_s[contender.name] = self._prepare(case, contender)
                if wrong:
                    del ready[contender.name]
                    rows.append(self._row(case, contender.name, "wrong", wrong))
            except Exception as error:
                rows.append(self._failed(case, contender.name, error))
        self.checker.forget_case()
        if ready:
            rows += self._measure(case, ready, compile_s, {c.name: c.note for c in able})
        del ready
        release_memory()
        order = [c.name for c in contenders]
        return sorted(rows, key=lambda row: order.index(row.contender))

    def _contenders(self, case: Case) -> list[Contender]:
        found = contenders_of(case.workload, self.device, case.dtype)
        wanted = self.given.contenders
        return [c for c in found if c.name == EAGER or (c.name in wanted if wanted else c.by_default)]

    def _too_large(self, case: Case) -> str | None:
        """Why the case cannot fit the memory that is free, or None."""
        # What is checked is held twice, as eager's results and as a contender's.
        needed = 2 * least_bytes(case.workload, case.sizes, case.dtype, case.direction)
        free = _free_memory(self.device)
        if needed <= free:
            return None
        return f"not tried: it takes at least {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"

    def _prepare(self, case: Case, contender: Contender) -> tuple[str | None, list[Call], float | None]:
        """What is wrong with its results or None; its calls; and of one that compiles how long that took."""
        verdict = self.checker.verdict(
            contender.name,
            contender.checked,
            case.workload,
            case.sizes,
            case.dtype,
            few=not contender.compiles,
        )
        if verdict.wrong:
            return verdict.wrong, [], None

        def begin() -> list[Call]:
            calls = calls_of(case, contender.function, self.device)  # which runs forward, for backward
            calls[0]()
            return calls

        calls, seconds = first_call(begin, self.device)
        if not contender.compiles or case.direction == "backward":
            return None, calls, None
        checked = contender.checked is contender.function and case.direction == "both"
        return None, calls, verdict.seconds if checked else seconds

    def _measure(
        self,
        case: Case,
        ready: dict[str, list[Call]],
        compile_s: dict[str, float | None],
        notes: dict[str, str],
    ) -> list[Row]:
        with clocks_during(self.device) as clocks:
            timings = measure(
                ready,
                device=self.device,
                budget_s=self.given.case_seconds,
                baseline=EAGER if EAGER in ready else None,
                min_rounds=MIN_ROUNDS,
            )
        rows = []
        for name, timing in timings.items():
            fields = timing.fields()
            note = "; ".join(filter(None, [notes[name], fields.pop("note")]))
            status = fields.pop("status")
            found = {**fields, "compile_s": compile_s[name], "clocks": clocks.text}
            rows.append(self._row(case, name, status, note, **found))
        return rows

    def _failed(self, case: Case, name: str, error: Exception) -> Row:
        status, note = failure(error)
        release_memory()
        if "No available kernel" in str(error):  # a backend of scaled_dot_product_attention that has none
            status, note = "missing", one_line(error)
        return self._row(case, name, status, note)

    def _row(self, case: Case, contender: str, status: Status, note: str | None = "", **found: Any) -> Row:
        cost = cost_of(case.workload, case.sizes, case.dtype, case.direction)
        return Row(
            **{
                "suite": "ops",
                "operation": case.workload.operation,
                "direction": case.direction,
                "contender": contender,
                "dtype": case.dtype_name,
                "shape": case.label,
                "shape_class": class_of(case.workload, case.sizes, case.dtype),
                "kind": "measured",
                "status": status,
                "note": note or "",
                "flops": cost.flops,
                "bytes": cost.bytes,
                "limit_us": limit_us(self.where["device_name"], case.dtype, cost.flops, cost.bytes),
                **self.where,
                "time": now(),
                **found,
            }
        )

    def _require_usable_device(self) -> None:
        """
        Raises:
            InputError: an error on the GPU has ended what this process can do there.
        """
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise InputError(
                f"the GPU cannot be used any more by this process ({one_line(error)}). The case is in "
                f"{self.path} as failed: go on after it with --resume --run {self.run}"
            ) from None


def limit_us(device_name: str, dtype: torch.dtype, flops: int, moved: int) -> float | None:
    """Computed: the least microseconds for that work on the chip of that name; None if it is not known."""
    chip = chip_named(device_name)
    peak = chip.peak(PRECISIONS[dtype]) if chip else None
    if chip is None or peak is None:
        return None
    return max(flops / peak, moved / chip.bandwidth) * 1e6


def calls_of(case: Case, function: Any, device: torch.device) -> list[Call]:
    """The calls that are timed: the same on each of several copies of the inputs."""
    inputs = inputs_for(case.workload, case.sizes, case.dtype, device)
    cotangents: list[Tensor] = []
    if case.direction != "forward":
        cotangents = cotangents_for(case.workload, inputs, case.dtype, case.sizes.rows)
    size = sum(x.numel() * x.element_size() for x in tensors_of(inputs))
    count = max(1, min(COPIES, COPIES_BYTES[device.type] // max(size, 1)))
    gradients = case.direction != "forward"
    return [
        _call(function, copy_of(inputs, gradients=gradients), case.direction, cotangents)
        for _ in range(count)
    ]


def _call(function: Any, inputs: Inputs, direction: str, cotangents: Sequence[Tensor]) -> Call:
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*inputs)

        return forward

    leaves = [x for x in tensors_of(inputs) if x.requires_grad]
    outputs = _as_tuple(function(*inputs))
    grads = [g.to(x.dtype) for g, x in zip(cotangents, outputs, strict=True)]
    if direction == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(_as_tuple(function(*inputs)), leaves, grads)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS
        return 1 << 62
    found = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(found["MemAvailable"].split()[0]) * 1024


# -- what is printed -----------------------------------------------------------------------------------------


def _line(case: Case, rows: Iterable[Row]) -> str:
    """ "gelu both float32 B=1 T=64 C=768: eager 812 us, native 1.85x [1.80 1.93], triton missing"."""
    parts = []
    for row in rows:
        if row.status != "ok" or row.median_us is None:
            parts.append(f"{row.contender} {row.status}")
        elif row.contender == row.baseline or row.ratio is None:
            parts.append(f"{row.contender} {row.median_us:.4g} us")
        else:
            parts.append(f"{row.contender} {row.ratio:.2f}x [{row.ratio_p20:.2f} {row.ratio_p80:.2f}]")
    return f"{case}: {', '.join(parts)}"


def _record(given: OpsArgs, suite: _Suite) -> None:
    chosen = choose(suite.rows())
    path = given.record_file or choices.user_record()
    choices.record(chosen, given.record_as or suite.where["device_name"], path)
    print(f'\nrecorded for ops.use("auto") in {path}:')
    for line in lines(chosen) or ["nothing: no implementation but eager ran"]:
        print(f"  {line}")
