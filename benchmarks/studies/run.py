"""The command line that all studies share: check, look, measure, and write the page's tables.

python benchmarks/studies/NAME.py [--chips a100 h100 b200] [--size small] [--microscope] [--write]
TRITON_INTERPRET=1 python benchmarks/studies/NAME.py     checks the kernels, and does nothing else
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from fastgpt.benchmarks.check import Wrong
from fastgpt.benchmarks.studies import rendering
from fastgpt.benchmarks.studies.check import check_on_cpu, check_steps, interpreted
from fastgpt.benchmarks.studies.microscope import Seen, look
from fastgpt.benchmarks.studies.study import Size, Study
from fastgpt.benchmarks.study import record
from fastgpt.benchmarks.timing import Timing, measure, working
from fastgpt.chips import chip
from fastgpt.errors import InputError
from fastgpt.inspect.report import text
from fastgpt.runtime import device_name


@dataclass
class Args:
    chips: tuple[str, ...] = ("a100", "h100", "b200")
    """What to compute for. The table of kernels is of an H100 where that is among them, else of the first."""
    size: Size = "gpt2"
    """Of what is measured: GPT-2's, or small inputs, on which times say little."""
    rounds: int = 15
    """In which everything is timed once; 0 measures nothing."""
    threads: int | None = None
    """Of the CPU; by default one for each core."""
    microscope: bool = False
    """Print all that the microscope says of each kernel."""
    machine: str | None = None
    """The name of this machine, under which what is measured is kept in benchmarks/results/."""
    write: bool = False
    """Put the tables into the study's page: what was computed, and what is kept of --machine."""


def main(study: Study, args: list[str] | None = None) -> None:
    """Run a study.

    Raises:
        SystemExit: with a line about what is wrong: an option, or a step.
    """
    given = tyro.cli(Args, args=args, description=f"The steps of docs/optimise/{study.name}.md.")
    try:
        _main(study, given)
    except (InputError, Wrong) as error:
        sys.exit(f"{study.name}: {error}")


def _main(study: Study, given: Args) -> None:
    if given.rounds < 0:
        raise InputError(f"--rounds {given.rounds}: it must not be negative")
    chips = [chip(name) for name in given.chips]
    gpu = torch.cuda.is_available()
    if gpu or interpreted():
        check_steps(study, torch.device("cuda" if gpu else "cpu"), print)
    else:
        _check_in_another_process(study)
    if interpreted():
        return
    _tell(study)
    seen = [look(study, one) for one in chips]
    if given.microscope:
        _show(seen)
    computed = rendering.computed(study, seen)
    print(f"\n{computed}\n")
    if given.rounds:
        _measure(study, given, gpu)
    if given.write:
        rendering.write(rendering.page_of(study), rendering.COMPUTED, computed)
        if given.machine is not None:
            found = rendering.recorded(study, given.machine)
            rendering.write(rendering.page_of(study), rendering.MEASURED, found)


def _check_in_another_process(study: Study) -> None:
    """In this one Triton compiles kernels: whether it interprets them is settled when they are defined.

    Raises:
        Wrong: as `check_steps`.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(f"{study.name}.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Wrong(f"the check of its steps failed: {done.stderr.strip()}")
    print(done.stdout, end="")


def _tell(study: Study) -> None:
    for number, step in enumerate(study.steps, 1):
        print(f"\n{number}. {step.name}: {step.change}\n   Predicted: {step.prediction.text}")


def _show(seen: list[list[Seen]]) -> None:
    for steps in seen:
        for one in steps:
            for analysis in one.kernels():
                print(f"\n{text(analysis)}")


def _measure(study: Study, given: Args, gpu: bool) -> None:
    """On the CPU, and the kernels themselves where there is a GPU."""
    cpu = torch.device("cpu")
    with working(cpu, given.threads):
        check_on_cpu(study, given.size)
        found = _timed(study, given, cpu)
        where = f"{torch.get_num_threads()} threads of {device_name(cpu)}, torch {torch.__version__}"
    where = f"{where}, {given.rounds} rounds, {'small inputs' if given.size == 'small' else 'fp32'}"
    rows = rendering.timings(found)
    print(f"{rendering.measured(study, rows, where)}\n")
    if given.machine is not None:
        kept = rendering.record_of(study, given.machine)
        record(given.machine, kept.stem, where=where, size=given.size, rows=rows)
    if gpu:
        device = torch.device("cuda")
        with working(device):
            found = _timed(study, given, device)
        rows, name = rendering.timings(found), device_name(device)
        print(f"{rendering.measured(study, rows, f'{name}: the kernels themselves')}\n")


def _timed(study: Study, given: Args, device: torch.device) -> dict[str, Timing]:
    """All contenders on the same inputs, which a step that works in place goes on from."""
    torch.manual_seed(0)
    inputs = study.inputs(given.size, device)
    runs = study.on_cpu() if device.type == "cpu" else {step.name: step.run for step in study.steps}
    calls = {name: (lambda run=run: run(*inputs)) for name, run in runs.items()}
    return measure(
        calls, device=device, budget_s=0.0, min_rounds=given.rounds, max_rounds=given.rounds, control=False
    )
