"""`fastgpt bench summary`: the rows of a run as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from fastgpt.benchmarks.results import Row, read
from fastgpt.errors import InputError


@dataclass
class SummaryArgs:
    """Print what a run found: operations against eager, the losers first, and whole steps."""

    results: Positional[Path]
    """A file of results, or a folder: all files under it."""


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    path = parse(SummaryArgs, args, "bench summary").results
    rows = read(path)
    if not rows:
        raise InputError(f"{path} holds no rows of results")
    print(summary(rows))


def summary(rows: Sequence[Row]) -> str:
    """Tables of whole steps and of operations, and what was wrong or failed."""
    steps = [row for row in rows if row.suite != "ops" and row.status == "ok"]
    parts = [_steps(steps)] if steps else []
    compared = [row for row in rows if row.suite == "ops" and row.status == "ok"]
    parts += [_operations(compared)] if compared else []
    bad = [row for row in rows if row.status in ("wrong", "failed")]
    if bad:
        parts.append(
            "\n".join(f"{row.status}: {' '.join(row.case[1:5])} {row.contender}: {row.note}" for row in bad)
        )
    return "\n\n".join(parts) or "nothing was timed"


def _operations(rows: Sequence[Row]) -> str:
    """How each contender did against eager over the cases of an operation and direction."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.ratio is not None and row.contender != row.baseline:
            ratios.setdefault((row.operation, row.direction, row.contender), []).append(row.ratio)
    title = f"{'operation':<22}{'direction':<11}{'contender':<22}{'cases':>5}  times as fast as eager"
    lines = [title, "-" * len(title)]
    for (operation, direction, name), found in sorted(ratios.items(), key=lambda item: min(item[1])):
        span = f"{min(found):.2f}" if len(found) == 1 else f"{min(found):.2f} to {max(found):.2f}"
        lines.append(f"{operation:<22}{direction:<11}{name:<22}{len(found):>5}  {span}")
    return "\n".join(lines)


def _steps(rows: Sequence[Row]) -> str:
    title = f"{'suite':<10}{'what':<24}{'contender':<24}{'tokens/s':>10}  times as fast as its baseline"
    lines = [title, "-" * len(title)]
    for row in rows:
        what = f"{row.operation} {row.direction} {row.shape}"
        speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"{row.suite:<10}{what:<24}{row.contender:<24}{speed:>10}  {ratio}")
    return "\n".join(lines)
