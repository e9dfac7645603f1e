"""`fastgpt bench summary`: the rows of a run as tables in the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from fastgpt.benchmarks.results import Row, read
from fastgpt.benchmarks.runs import aligned, number
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
    parts += [_winners(compared), _contenders(compared)] if compared else []
    bad = [row for row in rows if row.status in ("wrong", "failed")]
    if bad:
        parts.append(
            "\n".join(f"{row.status}: {' '.join(row.case[1:5])} {row.contender}: {row.note}" for row in bad)
        )
    return "\n\n".join(parts) or "nothing was timed"


def _winners(rows: Sequence[Row]) -> str:
    """The contender with the best mean of each operation and direction, over the cases that all ran."""
    table = [("fastest", "direction", "contender", "cases", "mean", "least", "most", "spread")]
    for (operation, direction), compared in _grouped(rows, lambda row: (row.operation, row.direction)):
        cases = {row.case for row in compared}
        means = {
            name: statistics.geometric_mean(ratios)
            for (name,), found in _grouped(compared, lambda row: (row.contender,))
            if len(ratios := _ratios(found)) == len(cases)
        }
        if not means:
            continue
        best = max(means, key=lambda name: means[name])
        winner = [row for row in compared if row.contender == best]
        ratios = _ratios(winner)
        spread = statistics.median(_spread(row) for row in winner)
        figures = (f"{x:.2f}" for x in (means[best], min(ratios), max(ratios)))
        table.append((operation, direction, best, str(len(cases)), *figures, f"+-{spread:.0%}"))
    note = "times as fast as eager: geometric mean over cases, least and most; half of p20 to p80 of a case"
    return f"{aligned(table)}\n{note}"


def _contenders(rows: Sequence[Row]) -> str:
    """How each contender did against eager over the cases of an operation and direction, losers first."""
    others = [row for row in rows if row.ratio is not None and row.contender != row.baseline]
    groups = _grouped(others, lambda row: (row.operation, row.direction, row.contender))
    table = [("all", "direction", "contender", "cases", "least", "most")]
    for key, found in sorted(groups, key=lambda item: min(_ratios(item[1]))):
        ratios = _ratios(found)
        table.append((*key, str(len(ratios)), f"{min(ratios):.2f}", f"{max(ratios):.2f}"))
    return aligned(table)


def _grouped(
    rows: Sequence[Row], key: Callable[[Row], tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _ratios(rows: Sequence[Row]) -> list[float]:
    return [row.ratio for row in rows if row.ratio is not None]


def _spread(row: Row) -> float:
    """Half the distance from p20 to p80 of the ratio, as a share of it."""
    if row.ratio is None or row.ratio_p20 is None or row.ratio_p80 is None:
        return 0.0
    return (row.ratio_p80 - row.ratio_p20) / (2 * row.ratio)


def _steps(rows: Sequence[Row]) -> str:
    table = [("suite", "what", "contender", "tokens/s", "of baseline")]
    for row in rows:
        what = f"{row.operation} {row.direction} {row.shape}"
        figures = (number(row.tokens_per_s, ",.0f"), number(row.ratio, ".2f"))
        table.append((row.suite, what, row.contender, *figures))
    return aligned(table)
