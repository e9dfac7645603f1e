"""What rows say about each other: the latest of each case, and how the contenders of one case compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fastgpt.benchmarks.results import Row

OURS = ("triton", "native")
BASELINE = "eager"
Verdict = Literal["slower", "level", "faster"]


@dataclass(frozen=True, order=True)
class Machine:
    """Rows of different machines, or of different thread counts, never share a chart."""

    name: str
    device: str
    device_name: str
    threads: int | None

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else ""
        return f"{self.device_name or self.name} ({self.device}{threads})"


def machine(row: Row) -> Machine:
    """Where a row comes from. The number of threads is that of a CPU; a GPU's rows have none."""
    return Machine(row.machine, row.device, row.device_name, row.threads if row.device == "cpu" else None)


@dataclass(frozen=True)
class Interval:
    """A ratio with its spread; above 1 is faster."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Level unless the whole interval lies on one side of 1."""
        return "slower" if self.high < 1 else "faster" if self.low > 1 else "level"

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Comparison:
    """One of our contenders beside eager and beside the fastest of the others in its case."""

    row: Row
    eager: Interval | None
    peer: Row | None
    over_peer: Interval | None

    @property
    def intervals(self) -> list[Interval]:
        return [interval for interval in (self.eager, self.over_peer) if interval is not None]

    @property
    def loses(self) -> bool:
        return any(interval.verdict == "slower" for interval in self.intervals)

    @property
    def worst(self) -> float:
        """The lower of the two ratios, by which what loses comes first."""
        return min((interval.median for interval in self.intervals), default=float("inf"))


def timed(row: Row) -> bool:
    return row.status == "ok" and bool(row.median_us)


def spread(row: Row) -> tuple[float, float]:
    """Microseconds at p20 and p80. A row without them (a computed one) is a point."""
    median = row.median_us or 0.0
    return row.p20_us or median, row.p80_us or median


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each case the rows of the last run that has it, in the order they were written.

    Contenders of one run were interleaved; those of two runs were not, so that a case is taken from one.
    """
    rows = list(rows)
    last: dict[tuple[object, ...], Row] = {}
    for row in rows:
        known = last.get(_place(row))
        if known is None or row.time >= known.time:
            last[_place(row)] = row
    kept = {(_place(row), row.contender): row for row in rows if row.run == last[_place(row)].run}
    return list(kept.values())


def _place(row: Row) -> tuple[object, ...]:
    return (row.case, row.kind, machine(row))


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Our contenders in each case of `rows` (of `latest`), worst first."""
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in filter(timed, rows):
        cases.setdefault(_place(row), []).append(row)
    found = [_comparison(row, case) for case in cases.values() for row in case if row.contender in OURS]
    return sorted(found, key=lambda comparison: comparison.worst)


def _comparison(row: Row, case: list[Row]) -> Comparison:
    eager = next((other for other in case if other.contender == BASELINE), None)
    peers = [other for other in case if other.contender not in (BASELINE, *OURS)]
    peer = min(peers, key=lambda other: other.median_us or 0.0, default=None)
    return Comparison(
        row,
        times_as_fast(row, eager) if eager else None,
        peer,
        times_as_fast(row, peer) if peer else None,
    )


def own_ratio(row: Row) -> Interval | None:
    """How many times as fast as its baseline a row is, measured round by round."""
    return Interval(row.ratio, row.ratio_p20 or row.ratio, row.ratio_p80 or row.ratio) if row.ratio else None


def times_as_fast(row: Row, other: Row) -> Interval:
    """How many times as fast as `other` a row is, both timed in one run.

    The row's own ratio where `other` is its baseline: it was taken round by round. Otherwise that of the
    medians, from the worst of the one to the best of the other at p20 and p80, which overstates the spread.
    """
    if row.baseline == other.contender and (ratio := own_ratio(row)):
        return ratio
    (p20, p80), (other_p20, other_p80) = spread(row), spread(other)
    return Interval((other.median_us or 0.0) / (row.median_us or 1.0), other_p20 / p80, other_p80 / p20)


def sizes(shape: str) -> dict[str, int]:
    """ "B=8 T=1024" as numbers by name; what is not NAME=INTEGER is left out."""
    pairs = (part.partition("=") for part in shape.split())
    return {name: int(value) for name, _, value in pairs if value.isdigit()}
