"""`fastgpt bench ladder`: the lecture's speed-ups of GPT-2 one after another, and then fastgpt's.

Each rung keeps what the ones below it changed. All are timed in the same interleaved rounds, after the losses
of each were found to be those of fp32 eager steps.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.benchmarks.contest import Case, Entry, Reference, contest, row_of
from fastgpt.benchmarks.environment import clocks_during
from fastgpt.benchmarks.results import RESULTS, Row, append
from fastgpt.benchmarks.runs import Run, aligned, cold_compiler, number
from fastgpt.benchmarks.steps import Recipe, initial_model, random_batches
from fastgpt.benchmarks.timing import working
from fastgpt.benchmarks.train import CHARACTERS, losses, mfu_formula
from fastgpt.config import preset
from fastgpt.errors import InputError
from fastgpt.metrics import format_mfu
from fastgpt.runtime import resolve_device

# Milliseconds a step of GPT-2 (124M), B=16, T=1024, on an A100: the titles of the chapters of Andrej
# Karpathy's "Let's reproduce GPT-2 (124M)", youtube.com/watch?v=l8pRSuU81PU.
LECTURE_MS = {
    "fp32": 1000,
    "TF32": 333,
    "bf16 autocast": 300,
    "torch.compile": 130,
    "flash attention": 96,
    "padded vocabulary": 93,
    "fused AdamW": 90,
}
LECTURE_SIZE = ("gpt2", 16, 1024)
KERNELS = {"cpu": "native", "cuda": "triton"}
SIZE = {"cpu": ("char-cpu", 12), "cuda": ("gpt2", 16)}


def rungs(kernels: str) -> list[Recipe]:
    """From the lecture's start to fastgpt's own step, by the implementation `kernels` of its operations."""
    optimizer_ops = ("adamw_", "grad_norm")
    steps: list[tuple[str, dict[str, Any]]] = [
        ("TF32", {"precision": "tf32"}),
        ("bf16 autocast", {"precision": "autocast"}),
        ("torch.compile", {"compile": "default"}),
        ("flash attention", {"flash": True}),
        ("padded vocabulary", {"padded": True}),
        ("fused AdamW", {"optimizer": "torch-fused"}),
        (
            f"{kernels} kernels",  # in place of those that torch.compile writes
            {"compile": None, "ops": kernels, "eager_ops": ("linear_cross_entropy", *optimizer_ops)},
        ),
        ("fused classifier", {"eager_ops": optimizer_ops}),
        ("bf16 weights", {"precision": "bf16", "optimizer": "fastgpt", "eager_ops": ()}),
        ("CUDA graph", {"graph": True}),
    ]
    ladder = [Recipe("fp32", "fp32", optimizer="torch", flash=False, padded=False)]
    for name, changes in steps:
        ladder.append(dataclasses.replace(ladder[-1], name=name, **changes))
    return ladder


@dataclass
class LadderArgs:
    """Time the lecture's speed-ups of GPT-2 one after another, and then fastgpt's."""

    preset: str | None = None
    """By default char-cpu on a CPU, gpt2 on a GPU."""
    micro_batch: int | None = None
    """Sequences in a step; by default 12 on a CPU and the lecture's 16 on a GPU."""
    block_size: int | None = None
    """Tokens in a sequence; by default the preset's."""
    kernels: str | None = None
    """fastgpt's rungs by the implementation triton or native; by default triton on a GPU, native on a CPU."""
    steps: int = 10
    """Steps whose losses must agree before anything is timed."""
    device: str = "auto"
    """auto, cuda, cuda:N or cpu."""
    threads: int | None = None
    """Of a CPU; by default one for each core."""
    budget: float = 90.0
    """Seconds for all: rounds go on until they have passed, and there are 7 at least."""
    out: Path = RESULTS
    """Results go to OUT/MACHINE/RUN.csv."""
    run: str | None = None
    """A name for this run; by default the time."""
    resume: bool = False
    """Go on with that run, or without --run with this machine's newest: do nothing if it has a ladder."""


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    run_ladder(parse(LadderArgs, args, "bench ladder"))


def run_ladder(given: LadderArgs) -> Path:
    """Run the suite; returns the file of results.

    Raises:
        InputError: an option names what does not exist, or is out of range.
    """
    device = resolve_device(given.device)
    if device.type not in SIZE:
        raise InputError(f"device {given.device!r}: steps are timed on cuda and cpu")
    name, batch = given.preset or SIZE[device.type][0], given.micro_batch or SIZE[device.type][1]
    kernels = given.kernels or KERNELS[device.type]
    if kernels not in KERNELS.values():
        raise InputError(f"kernels = {kernels!r}: choose triton or native")
    for option, value, least in (("micro_batch", batch, 1), ("steps", given.steps, 2)):
        if value < least:
            raise InputError(f"{option} = {value}: it must be at least {least}")
    config = preset(name)
    block_size = config.model.block_size if given.block_size is None else given.block_size
    # The vocabulary as it is; its padding is one of the rungs.
    vocab_size = CHARACTERS if config.tokenizer == "char" else config.model.vocab_size
    model = dataclasses.replace(config.model, vocab_size=vocab_size, block_size=block_size, dropout=0.0)
    start = time.monotonic()
    with working(device, given.threads), cold_compiler():
        run = Run.open("ladder", given, device)
        case = Case(
            initial_model(model),
            dataclasses.replace(config, model=model),
            random_batches(model, batch, device),
            check_steps=given.steps,
            seconds=lambda: given.budget - (time.monotonic() - start),
        )
        print(f"{run.where['device_name']}, run {run.name}: {name} {case.shape} -> {run.path}", flush=True)
        if run.done:
            print("it has a ladder already")
            return run.path
        recipes = rungs(kernels)
        reference = Reference.of(case, [recipe.precision for recipe in recipes])
        with clocks_during(device) as clocks:
            entries = contest(recipes, case, reference, baseline=lambda passed: passed[0])
    lecture = LECTURE_MS if (name, batch, block_size) == LECTURE_SIZE else {}
    rows = [_row(entry, case, run, clocks.text, lecture) for entry in entries]
    append(rows, run.path)
    print(mfu_formula(case.initial, device))
    print(f"\n{table(rows, entries, lecture)}\n\n{losses(entries, reference)}")
    return run.path


def _row(entry: Entry, case: Case, run: Run, clocks: str, lecture: dict[str, int]) -> Row:
    name = entry.recipe.name
    if name in lecture:
        entry.note = "; ".join(filter(None, [entry.note, f"the lecture, on an A100: {lecture[name]} ms"]))
    return row_of(entry, case, run.where, suite="ladder", operation=name, contender=name, clocks=clocks)


def gain(entry: Entry, before: Entry) -> float:
    """How many times faster than another rung: the median over the rounds they share."""
    assert entry.timing is not None and before.timing is not None
    pairs = zip(before.timing.samples_us, entry.timing.samples_us, strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def table(rows: Sequence[Row], entries: Sequence[Entry], lecture: dict[str, int]) -> str:
    """A line for each rung: its time, its gain over the timed rung before it and over the first, and the
    lecture's time where it is for the same step."""
    title = ["rung", "ms a step", "x before", "x first", "tokens/s", "MFU", "GB", "compile s", "lecture's ms"]
    lines, before = [title], None
    for row, entry in zip(rows, entries, strict=True):
        cells = [row.contender, row.status, *[""] * 6]
        if row.median_us is not None:
            memory = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e9
            over_before = gain(entry, before) if before and row.baseline else None
            cells = [row.contender, f"{row.median_us / 1e3:.4g}", number(over_before, ".2f")]
            cells += [number(row.ratio, ".2f"), number(row.tokens_per_s, ",.0f"), format_mfu(row.mfu)]
            cells += [number(memory, ".3g"), number(row.compile_s, ".1f")]
            before = entry
        lines.append([*cells, str(lecture.get(row.contender, ""))])
    notes = [f"{row.contender}: {row.status}, {row.note}" for row in rows if row.status != "ok"]
    return "\n".join([aligned(lines), *notes])
