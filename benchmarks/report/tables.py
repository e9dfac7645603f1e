"""The tables of the report: columns of rows, of comparisons and of changes, and what each sorts by."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt.benchmarks.comparison import Comparison, Interval, own_ratio, spread, timed
from fastgpt.benchmarks.report.charts import microseconds
from fastgpt.benchmarks.report.drawing import TIMES, TO
from fastgpt.benchmarks.report.regression import Change
from fastgpt.benchmarks.results import Row


@dataclass(frozen=True)
class Cell:
    """`sort` is what its column sorts by; None comes last either way."""

    text: str
    sort: str | float | None
    style: str = ""


@dataclass(frozen=True)
class Column:
    name: str
    cell: Callable[[Any], Cell]
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[Column]
    items: Sequence[Any]

    @property
    def shown(self) -> list[Column]:
        """The columns that say something of at least one item."""
        return [column for column in self.columns if any(column.cell(item).text for item in self.items)]

    @property
    def lines(self) -> list[list[Cell]]:
        return [[column.cell(item) for column in self.shown] for item in self.items]


def text(value: Callable[[Any], str]) -> Callable[[Any], Cell]:
    return lambda item: Cell(value(item), value(item))


def number(
    value: Callable[[Any], float | None], form: Callable[[float], str] = "{:,.4g}".format
) -> Callable[[Any], Cell]:
    def cell(item: Any) -> Cell:
        found = value(item)
        return Cell("", None) if found is None else Cell(form(found), found)

    return cell


def ratio(interval: Callable[[Any], Interval | None]) -> Callable[[Any], Cell]:
    """Coloured where it is slower or faster by more than its spread."""

    def cell(item: Any) -> Cell:
        found = interval(item)
        if found is None:
            return Cell("", None)
        return Cell(
            f"{found.median:.2f}{TIMES} ({found.low:.2f}{TO}{found.high:.2f})", found.median, found.verdict
        )

    return cell


def time(row: Row) -> Cell:
    if not timed(row):
        return Cell(row.status, None)
    return Cell(microseconds(row.median_us, *spread(row)), row.median_us)


def outcome(word: str) -> Cell:
    """A word that is the name of its colour in the page's style sheet, such as failed or slower."""
    return Cell(word, word, word)


def of_row(*columns: Column) -> list[Column]:
    """The same columns for comparisons or changes, which hold a row."""
    return [_of_row(column) for column in columns]


def _of_row(column: Column) -> Column:
    def cell(item: Comparison | Change) -> Cell:
        return column.cell(item.new if isinstance(item, Change) else item.row)

    return Column(column.name, cell, column.numeric)


def _by_size(shape: str) -> str:
    """A shape with its numbers padded, so that B=8 sorts before B=16."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(12), shape)


def _percent_of_limit(row: Row) -> float | None:
    return 100 * row.limit_us / row.median_us if row.limit_us and row.median_us else None


def _a_second(amount: int | None, row: Row, unit: float) -> float | None:
    return amount / row.median_us * 1e6 / unit if amount and row.median_us else None


def _gibibytes(row: Row) -> float | None:
    return row.peak_memory_bytes / 2**30 if row.peak_memory_bytes else None


OPERATION = Column("operation", text(lambda row: row.operation))
DIRECTION = Column("direction", text(lambda row: row.direction))
DTYPE = Column("dtype", text(lambda row: row.dtype))
SHAPE = Column("shape", lambda row: Cell(row.shape, _by_size(row.shape)))
CONTENDER = Column("contender", text(lambda row: row.contender))
TIME = Column(f"median (p20{TO}p80)", time, numeric=True)
RATIO = Column("vs baseline", ratio(own_ratio), numeric=True)
LIMIT = Column("of limit", number(_percent_of_limit, "{:.0f}%".format), numeric=True)
WORK = Column("TFLOP/s", number(lambda row: _a_second(row.flops, row, 1e12), "{:.3g}".format), numeric=True)
TRAFFIC = Column("GB/s", number(lambda row: _a_second(row.bytes, row, 1e9), "{:.3g}".format), numeric=True)
MEMORY = Column("peak GiB", number(_gibibytes, "{:.3g}".format), numeric=True)
TOKENS = Column("tokens/s", number(lambda row: row.tokens_per_s, "{:,.0f}".format), numeric=True)
MFU = Column("MFU", number(lambda row: row.mfu, "{:.1%}".format), numeric=True)
COMPILE = Column("compile s", number(lambda row: row.compile_s, "{:.3g}".format), numeric=True)
LOSS = Column("last loss", number(lambda row: row.loss, "{:.4f}".format), numeric=True)
NOTE = Column("note", text(lambda row: row.note))
KIND = Column("kind", lambda row: Cell(row.kind, row.kind, f"kind {row.kind}"))
