"""One invocation of a suite of whole steps: its name, its file, and what that holds already."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastgpt.benchmarks.environment import new_run, where
from fastgpt.benchmarks.results import Suite, newest_run, path_of, read
from fastgpt.errors import InputError


class Options(Protocol):
    """What the suites' options have in common."""

    threads: int | None
    out: Path
    run: str | None
    resume: bool


@dataclass(frozen=True)
class Run:
    name: str
    path: Path
    """Of the rows."""
    where: dict[str, Any]
    """The fields of a Row that say where and when."""
    done: set[tuple[str, str]]
    """Operation and shape of the suite's rows that are in the file."""

    @classmethod
    def open(cls, suite: Suite, given: Options, device: torch.device) -> Run:
        """The run that the options name, or a new one. Call this inside `timing.working`.

        Raises:
            InputError: it has rows of this suite, and the options do not say to go on with it.
        """
        found = where(device, run="", threads=given.threads)
        machine = found["machine"]
        name = given.run or (newest_run(given.out, machine) if given.resume else None) or new_run()
        path = path_of(given.out, machine, name)
        rows = [row for row in read(path) if row.suite == suite] if path.exists() else []
        if rows and not given.resume:
            raise InputError(f"{path} has such rows: give another --run, or --resume to go on with it")
        return cls(name, path, {**found, "run": name}, {(row.operation, row.shape) for row in rows})


@contextlib.contextmanager
def cold_compiler() -> Iterator[None]:
    """Here torch.compile finds nothing of earlier runs, so that its time is that of a first one."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The cells in columns: the first to the left, the others to the right; short rows end early."""
    widths: dict[int, int] = {}
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths.get(column, 0), len(cell))
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(widths[i]) for i, cell in enumerate(rest, 1))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
