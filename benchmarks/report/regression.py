"""What became slower between two files of results."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fastgpt.benchmarks.comparison import Machine, latest, machine, spread, timed
from fastgpt.benchmarks.results import Row
from fastgpt.errors import InputError

Outcome = Literal["lost", "slower", "level", "faster", "gained"]
WORST_FIRST: tuple[Outcome, ...] = ("lost", "slower", "level", "gained", "faster")


@dataclass(frozen=True)
class Change:
    """The same contender in the same case, before and now.

    Slower or faster by more than the threshold counts only where the two intervals from p20 to p80 do not
    overlap: a median that moved inside the spread of its own rounds is noise. `lost` was timed and no longer
    is (it failed, was wrong or ran out of memory); `gained` is the reverse.
    """

    old: Row
    new: Row
    outcome: Outcome

    @property
    def change(self) -> float | None:
        """The change of the median time: 0.1 is 10% slower. None where one was not timed."""
        if not (timed(self.old) and timed(self.new)):
            return None
        return (self.new.median_us or 0.0) / (self.old.median_us or 1.0) - 1


@dataclass(frozen=True)
class Regression:
    """All changes, worst first, and how many rows had no counterpart."""

    changes: list[Change]
    only_old: int
    only_new: int

    def of(self, *outcomes: Outcome) -> list[Change]:
        return [change for change in self.changes if change.outcome in outcomes]


def percentage(text: str) -> float:
    """ "5%" as 0.05.

    Raises:
        InputError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip())
    if found is None:
        raise InputError(f"--fail-if-slower {text!r}: it must be a percentage such as 5%")
    return float(found[1]) / 100


def regression(
    new: Iterable[Row], old: Iterable[Row], threshold: float, *, different_machines: bool = False
) -> Regression:
    """Match rows by case, contender and kind (and machine), and say how each changed.

    Raises:
        InputError: nothing in common, or only between different machines unless that is allowed, or several
            machines in one file where rows are matched across machines.
    """
    new, old = latest(new), latest(old)
    after, before = _by_key(new, different_machines), _by_key(old, different_machines)
    common = [key for key in after if key in before]
    if not common:
        raise InputError(_nothing_in_common(new, old))
    changes = [
        Change(before[key], after[key], _outcome(before[key], after[key], threshold)) for key in common
    ]
    changes.sort(key=lambda change: (WORST_FIRST.index(change.outcome), -(change.change or 0.0)))
    return Regression(changes, len(before) - len(common), len(after) - len(common))


def _by_key(rows: list[Row], different_machines: bool) -> dict[tuple[object, ...], Row]:
    places = {machine(row) for row in rows}
    if not different_machines:
        return {(row.case, row.contender, row.kind, machine(row)): row for row in rows}
    if len({place.device for place in places}) < len(places):
        raise InputError(
            f"several machines in one set of results ({_names(places)}): --allow-different-machines compares "
            "one with one"
        )
    return {(row.case, row.contender, row.kind): row for row in rows}


def _nothing_in_common(new: list[Row], old: list[Row]) -> str:
    known = {(row.case, row.contender, row.kind) for row in old}
    if any((row.case, row.contender, row.kind) in known for row in new):
        return (
            f"different machines, {_names(map(machine, new))} and {_names(map(machine, old))}, whose times "
            "say nothing about the code: --allow-different-machines compares them all the same"
        )
    return "the two files have no row in common (the same case and contender)"


def _names(machines: Iterable[Machine]) -> str:
    return " and ".join(sorted({f"{place.name} [{place}]" for place in machines}))


def _outcome(old: Row, new: Row, threshold: float) -> Outcome:
    if not timed(old) or not timed(new):
        return "lost" if timed(old) else "gained" if timed(new) else "level"
    change = (new.median_us or 0.0) / (old.median_us or 1.0) - 1
    (old_p20, old_p80), (new_p20, new_p80) = spread(old), spread(new)
    if change > threshold and new_p20 > old_p80:
        return "slower"
    return "faster" if change < -threshold and new_p80 < old_p20 else "level"


def text(found: Regression, threshold: float) -> str:
    """For the console: one line for each change that counts, then the counts."""
    lines = []
    for change in found.of("lost", "slower", "faster", "gained"):
        row = change.new
        what = f"{row.suite} {row.operation} {row.direction} {row.dtype} [{row.shape}] {row.contender}"
        if change.change is None:
            how = f"{change.old.status} -> {row.status}" + (f" ({row.note})" if row.note else "")
        else:
            how = f"{change.old.median_us:.1f} -> {row.median_us:.1f} us ({change.change:+.1%})"
        lines.append(f"{change.outcome:<7} {what}: {how}")
    counts = ", ".join(f"{len(found.of(outcome))} {outcome}" for outcome in WORST_FIRST)
    lines.append(f"{len(found.changes)} compared at a threshold of {threshold:.1%}: {counts}")
    if found.only_old or found.only_new:
        lines.append(f"without a counterpart: {found.only_old} old, {found.only_new} new")
    return "\n".join(lines)
