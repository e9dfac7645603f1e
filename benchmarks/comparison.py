"""What rows say about each other: the latest of each case, and how the contenders of one case compare."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fastgpt.benchmarks.results import Row

OURS = ("triton", "native")
BASELINE = "eager"
Verdict = Literal["slower", "level", "faster"]


def family(contender: str) -> str:
    """Whose a contender is: that of "native-bf16" and of "native, no cache" is native."""
    return re.split(r"[^a-z]", contender, maxsplit=1)[0]


def ours(row: Row) -> bool:
    return family(row.contender) in OURS


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
    """One of our contenders beside the baseline, eager, and beside the fastest of the others in its case."""

    row: Row
    over_baseline: Interval | None
    peer: Row | None
    over_peer: Interval | None

    @property
    def intervals(self) -> list[Interval]:
        return [interval for interval in (self.over_baseline, self.over_peer) if interval is not None]

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
    """Of each contender in each case the last row, in the order they were written."""
    last: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (_place(row), row.contender)
        if key not in last or row.time >= last[key].time:
            last[key] = row
    return list(last.values())


def _place(row: Row) -> tuple[object, ...]:
    return (row.case, row.kind, machine(row))


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Our contenders in each case of `rows` (of `latest`), worst first.

    Whole steps of all precisions are one case: a contender's precision is what makes it fast. The ladder's
    rungs are compared with each other, not here.
    """
    cases: dict[tuple[object, ...], list[Row]] = {}
    for row in filter(timed, rows):
        if row.suite != "ladder":
            together = dataclasses.replace(row, dtype="") if row.suite == "train" else row
            cases.setdefault(_place(together), []).append(row)
    found = [_comparison(row, case) for case in cases.values() for row in case if ours(row)]
    return sorted(found, key=lambda comparison: comparison.worst)


def _comparison(row: Row, case: list[Row]) -> Comparison:
    baseline = next((other for other in case if other.contender == (row.baseline or BASELINE)), None)
    peers = [
        (ratio.median, other, ratio)
        for other in case
        if other is not baseline and not ours(other) and (ratio := times_as_fast(row, other))
    ]
    _, peer, over_peer = min(peers, key=lambda found: found[0], default=(None, None, None))
    return Comparison(row, times_as_fast(row, baseline) if baseline else None, peer, over_peer)


def own_ratio(row: Row) -> Interval | None:
    """How many times as fast as its baseline a row is, measured round by round."""
    return Interval(row.ratio, row.ratio_p20 or row.ratio, row.ratio_p80 or row.ratio) if row.ratio else None


def times_as_fast(row: Row, other: Row) -> Interval | None:
    """How many times as fast as `other` a row of the same case is; None where the two cannot be compared.

    The row's own ratio where `other` is its baseline: it was taken round by round. Otherwise that of the
    medians in one run, or of the ratios to the same baseline in two, from the worst of the one to the best of
    the other, which overstates the spread.
    """
    mine, its = own_ratio(row), own_ratio(other)
    if row.baseline == other.contender and mine:
        return mine
    if row.run == other.run:
        (p20, p80), (other_p20, other_p80) = spread(row), spread(other)
        return Interval((other.median_us or 0.0) / (row.median_us or 1.0), other_p20 / p80, other_p80 / p20)
    if mine and its and row.baseline == other.baseline:
        return Interval(mine.median / its.median, mine.low / its.high, mine.high / its.low)
    return None


def sizes(shape: str) -> dict[str, int]:
    """ "B=8 T=1024" as numbers by name; what is not NAME=INTEGER is left out."""
    pairs = (part.partition("=") for part in shape.split())
    return {name: int(value) for name, _, value in pairs if value.isdigit()}
