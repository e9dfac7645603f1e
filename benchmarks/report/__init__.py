"""`fastgpt bench report`: a page about results, and what changed since others, or about a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from fastgpt.benchmarks import results
from fastgpt.errors import InputError

DEFAULT_THRESHOLD = "5%"


@dataclass
class ReportArgs:
    """Write a page about recorded results, or the curves of a training run, with its charts as PNGs."""

    results: Positional[Path]
    """A file of results, a folder: all files under it, or a training run."""
    out: Path = Path("report")
    """The folder to write: index.html, which needs nothing else, and PNGs."""
    against: Path | None = None
    """Earlier results (file or folder): also say what changed since."""
    fail_if_slower: str | None = None
    """With --against, exit with status 1 where a median grew by more than this, such as 5%, and the intervals
    from p20 to p80 do not overlap, or where something is no longer timed."""
    allow_different_machines: bool = False
    """Compare with results of another machine all the same."""


def command(args: Sequence[str]) -> None:
    """Run `fastgpt bench report`.

    Raises:
        InputError: nothing to report or to compare, or an unreadable file.
        SystemExit: with status 1 where --fail-if-slower found something.
    """
    from fastgpt.cli import parse

    given = parse(ReportArgs, args, "bench report")
    if given.against is None and (given.fail_if_slower or given.allow_different_machines):
        option = "--fail-if-slower" if given.fail_if_slower else "--allow-different-machines"
        raise InputError(f"{option} needs --against OLD, the results to compare with")
    from fastgpt.benchmarks.report import page, regression, run, sections
    from fastgpt.metrics import METRICS

    if (given.results / METRICS).exists():
        if given.against is not None:
            raise InputError(f"--against is for results, and {given.results} is a training run")
        written = run.write(given.results, given.out)
        print(f"{written[0]}: {len(written) - 1} charts of {given.results}")
        return
    rows = _rows(given.results)
    found, changed = None, None
    if given.against is not None:
        threshold = regression.percentage(given.fail_if_slower or DEFAULT_THRESHOLD)
        found = regression.regression(
            rows, _rows(given.against), threshold, different_machines=given.allow_different_machines
        )
        changed = sections.changes(found, threshold, str(given.against))
        print(regression.text(found, threshold))
    written = page.write(rows, given.out, changed)
    print(f"{written[0]}: {len(rows)} rows, {len(written) - 1} charts")
    if given.fail_if_slower and found and found.of("lost", "slower"):
        raise SystemExit(1)


def _rows(path: Path) -> list[results.Row]:
    rows = results.read(path)
    if not rows:
        raise InputError(f"{path} holds no rows of results")
    return rows
