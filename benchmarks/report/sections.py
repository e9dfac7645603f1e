"""The sections of the report on one machine: which charts and tables, of which rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fastgpt.benchmarks.comparison import BASELINE, Comparison, Interval, compare, sizes, timed
from fastgpt.benchmarks.report import charts, tables
from fastgpt.benchmarks.report.drawing import Drawing
from fastgpt.benchmarks.report.regression import WORST_FIRST, Regression
from fastgpt.benchmarks.report.tables import Column, Table
from fastgpt.benchmarks.results import Kind, Row

KINDS: tuple[Kind, ...] = ("measured", "computed")
Ratio = Callable[[Comparison], Interval | None]
# What ours are compared with: a name for files, words, and the ratio.
RIVALS: tuple[tuple[str, str, Ratio], ...] = (
    ("eager", "eager", lambda comparison: comparison.over_baseline),
    ("peer", "the best peer", lambda comparison: comparison.over_peer),
)
CASE = (tables.OPERATION, tables.DIRECTION, tables.DTYPE, tables.SHAPE, tables.CONTENDER)


@dataclass(frozen=True)
class Chart:
    """One figure of the page. `badges` say which of what it shows was measured and which computed."""

    name: str
    title: str
    badges: tuple[str, ...]
    drawing: Drawing
    caption: str = ""

    @property
    def svg(self) -> str:
        return self.drawing.svg(self.name, f"{self.title} ({', '.join(self.badges)})")


@dataclass(frozen=True)
class Section:
    """A heading, what to know, the charts and a table."""

    name: str
    title: str
    text: str
    charts: Sequence[Chart] = ()
    table: Table | None = None


def slug(text: str) -> str:
    """For ids and names of files."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def sections(prefix: str, rows: Sequence[Row]) -> list[Section]:
    """All of them for the rows of one machine; `prefix` makes their names unique among machines."""
    suites = {
        suite: [row for row in rows if row.suite == suite] for suite in ("ops", "train", "ladder", "generate")
    }
    comparisons = compare(rows)
    found = [
        _losing(prefix, comparisons) if comparisons else None,
        _speedups(prefix, suites["ops"], [c for c in comparisons if c.row.suite == "ops"]),
        _limits(prefix, suites["ops"]),
        _steps(prefix, suites["train"]),
        _ladder(prefix, suites["ladder"]),
        _generation(prefix, suites["generate"]),
        _operations(prefix, suites["ops"]),
        _untimed(prefix, rows),
    ]
    return [section for section in found if section and (section.charts or section.table or section.text)]


def _losing(prefix: str, comparisons: Sequence[Comparison]) -> Section:
    losers = [comparison for comparison in comparisons if comparison.loses]
    title = "Where our kernels lose"
    if not losers:
        text = "No kernel is slower than eager PyTorch, or than the best peer, by more than its spread."
        return Section(f"{prefix}-losing", title, text)
    columns = [
        *tables.of_row(*CASE, tables.TIME),
        Column("vs baseline", tables.ratio(lambda comparison: comparison.over_baseline), numeric=True),
        Column("vs best peer", tables.ratio(lambda comparison: comparison.over_peer), numeric=True),
        Column(
            "that peer", tables.text(lambda comparison: comparison.peer.contender if comparison.peer else "")
        ),
        *tables.of_row(tables.KIND),
    ]
    text = (
        "Slower than the baseline, which is eager PyTorch, or than the best peer (the fastest of the others "
        "that are not ours), by more than the spread from p20 to p80. The worst is first."
    )
    return Section(f"{prefix}-losing", title, text, (), Table("Kernels that lose", columns, losers))


def _speedups(prefix: str, ops: Sequence[Row], comparisons: Sequence[Comparison]) -> Section:
    text = (
        "A dot is one shape and dtype, its line the spread from p20 to p80; the tinted side is where we "
        "lose, and operations that lose most come first. Gray is eager against itself, which is noise."
    )
    drawn = _charts(
        (
            f"{prefix}-{kind}-speedup-{direction}-{rival}",
            f"{direction.capitalize()}, against {words}",
            (kind,),
            charts.speedup(
                [c for c in comparisons if (c.row.kind, c.row.direction) == (kind, direction)],
                ratio,
                words,
                [row for row in ops if rival == BASELINE and _is_control(row, kind, direction)],
            ),
            "",
        )
        for kind in KINDS
        for direction in dict.fromkeys(row.direction for row in ops)
        for rival, words, ratio in RIVALS
    )
    return Section(f"{prefix}-speedup", "Speedup of each operation", text if drawn else "", drawn)


def _is_control(row: Row, kind: Kind, direction: str) -> bool:
    """Whether the ratio of a row is that of eager to itself."""
    return (row.kind, row.direction, row.contender, row.baseline) == (kind, direction, BASELINE, BASELINE)


def _limits(prefix: str, ops: Sequence[Row]) -> Section:
    text = (
        "The limit is the least time that the device's peak and bandwidth allow for the least work and bytes "
        "of the operation: computed, never measured. On a roofline a tick is the limit of the dot below it."
    )
    drawn: list[Chart] = []
    for kind in KINDS:
        rows = [row for row in ops if row.kind == kind]
        badges = (kind, "limit computed") if kind == "measured" else (kind,)
        drawn += _charts(
            (
                f"{prefix}-{kind}-limit-{direction}",
                f"{direction.capitalize()}, share of the limit",
                badges,
                charts.share_of_limit([row for row in rows if row.direction == direction]),
                "",
            )
            for direction in dict.fromkeys(row.direction for row in rows)
        )
        drawn += _charts(
            (
                f"{prefix}-{kind}-roofline-{dtype}",
                f"Roofline, {dtype}",
                badges if charts.has_roof(rows[0]) or any(row.limit_us for row in rows) else (kind,),
                charts.roofline([row for row in rows if row.dtype == dtype]),
                "" if charts.has_roof(rows[0]) else "No roof is drawn: the peak of this device is not known.",
            )
            for dtype in dict.fromkeys(row.dtype for row in rows)
        )
    return Section(f"{prefix}-limits", "How far from the limit", text if drawn else "", drawn)


def _steps(prefix: str, steps: Sequence[Row]) -> Section | None:
    """Tokens a second and memory over the micro-batch, in one chart for each preset and length."""

    def chart_of(row: Row) -> tuple[str, int | None]:
        return row.operation, sizes(row.shape).get("T")

    shown = [row for row in steps if timed(row)]
    drawn: list[Chart] = []
    for kind, key in dict.fromkeys((row.kind, chart_of(row)) for row in shown):
        chosen = [row for row in steps if chart_of(row) == key and (row.kind == kind or row.status == "oom")]
        full = any(row.status == "oom" for row in chosen)
        title = key[0] + (f", T={key[1]}" if key[1] else "")
        for what, unit, value in (
            ("tokens", "tokens/s", lambda row: row.tokens_per_s),
            ("memory", "GiB at the peak", lambda row: (row.peak_memory_bytes or 0) / 2**30),
        ):
            drawn += _charts(
                [
                    (
                        f"{prefix}-{kind}-train-{slug(title)}-{what}",
                        f"{title}: {unit}",
                        (kind,),
                        charts.by_batch(chosen, value, unit),
                        "A cross marks what did not fit, or by computation would not." if full else "",
                    )
                ]
            )
    columns = [
        Column("preset", tables.OPERATION.cell),
        *(tables.DTYPE, tables.SHAPE, tables.CONTENDER, tables.TOKENS, tables.TIME, tables.RATIO, tables.MFU),
        *(tables.MEMORY, tables.COMPILE, tables.LOSS, tables.NOTE, tables.KIND),
    ]
    text = "A step is forward, backward and update, from the same weights and on the same batches for all."
    return _with_table(f"{prefix}-train", "Whole training steps", text, drawn, columns, shown)


def _ladder(prefix: str, rungs: Sequence[Row]) -> Section | None:
    shown = [row for row in rungs if timed(row)]
    drawn = []
    for kind, shape in dict.fromkeys((row.kind, row.shape) for row in shown):
        chosen = [row for row in shown if (row.kind, row.shape) == (kind, shape)]
        runs = len({row.run for row in chosen})
        caption = f"These rungs come from {runs} runs." if runs > 1 else ""
        name = f"{prefix}-{kind}-ladder-{slug(shape)}"
        drawn.append((name, f"The ladder, {shape}", (kind,), charts.waterfall(chosen), caption))
    columns = [
        Column("rung", tables.OPERATION.cell),
        *(tables.DTYPE, tables.SHAPE, tables.TIME, tables.TOKENS, tables.RATIO, tables.MFU, tables.MEMORY),
        *(tables.COMPILE, tables.LOSS, tables.NOTE, tables.KIND),
    ]
    text = (
        "One change at a time. A bar reaches from a rung's time back to that of the rung before, so that on "
        "this logarithmic axis its length is the factor gained."
    )
    return _with_table(f"{prefix}-ladder", "The speed ladder", text, _charts(drawn), columns, shown)


def _generation(prefix: str, rows: Sequence[Row]) -> Section | None:
    shown = [row for row in rows if timed(row)]
    drawn = _charts(
        (
            f"{prefix}-{kind}-generate-{direction}-{slug(dtype)}",
            f"{direction.capitalize()}, {dtype}",
            (kind,),
            charts.generation(
                [row for row in shown if (row.kind, row.direction, row.dtype) == (kind, direction, dtype)]
            ),
            "",
        )
        for kind, direction, dtype in dict.fromkeys((row.kind, row.direction, row.dtype) for row in shown)
    )
    columns = [
        Column("model", tables.OPERATION.cell),
        *(
            tables.DIRECTION,
            tables.DTYPE,
            tables.SHAPE,
            tables.CONTENDER,
            tables.TOKENS,
            tables.TIME,
            tables.RATIO,
        ),
        *(tables.MEMORY, tables.NOTE, tables.KIND),
    ]
    text = "Prefill reads the prompt, decode writes token after token. A line is the spread from p20 to p80."
    return _with_table(f"{prefix}-generate", "Generation", text, drawn, columns, shown)


def _operations(prefix: str, ops: Sequence[Row]) -> Section | None:
    columns = [
        *(*CASE, tables.TIME, tables.RATIO, tables.LIMIT, tables.WORK, tables.TRAFFIC, tables.MEMORY),
        *(tables.COMPILE, tables.NOTE, tables.KIND),
    ]
    shown = [row for row in ops if timed(row)]
    return _with_table(f"{prefix}-operations", "Every operation and contender", "", [], columns, shown)


def _untimed(prefix: str, rows: Sequence[Row]) -> Section | None:
    columns = [
        Column("suite", tables.text(lambda row: row.suite)),
        *CASE,
        Column("status", lambda row: tables.outcome(row.status)),
        Column("reason", tables.NOTE.cell),
        tables.KIND,
    ]
    text = (
        "Wrong: its result was not the reference's, so it was not timed. Missing: not installed, or it "
        "cannot run here. Oom: memory did not suffice, or by computation would not. Failed: it raised."
    )
    untimed = [row for row in rows if not timed(row)]
    return _with_table(f"{prefix}-untimed", "What was not timed, and why", text, [], columns, untimed)


def changes(found: Regression, threshold: float, old: str) -> Section:
    """The regression view."""
    columns = [
        Column("outcome", lambda change: tables.outcome(change.outcome)),
        Column("suite", tables.text(lambda change: change.new.suite)),
        *tables.of_row(*CASE),
        Column("before", lambda change: tables.time(change.old), numeric=True),
        Column("now", lambda change: tables.time(change.new), numeric=True),
        Column("change of time", tables.number(lambda change: change.change, "{:+.1%}".format), numeric=True),
        *tables.of_row(tables.KIND),
    ]
    counts = ", ".join(f"{len(found.of(outcome))} {outcome}" for outcome in WORST_FIRST)
    text = (
        f"Compared with {old}: {counts}. A change counts above {threshold:.1%} and where the intervals from "
        f"p20 to p80 do not overlap. Without a counterpart: {found.only_old} old rows, {found.only_new} new."
    )
    table = Table("Changes, the worst first", columns, found.changes)
    return Section("changes", "What changed", text, (), table)


def _charts(
    drawn: Iterable[tuple[str, str, tuple[str, ...], Drawing | None, str]],
) -> list[Chart]:
    """Those for which there was something to draw."""
    return [
        Chart(name, title, badges, drawing, caption)
        for name, title, badges, drawing, caption in drawn
        if drawing is not None
    ]


def _with_table(
    name: str, title: str, text: str, drawn: Sequence[Chart], columns: Sequence[Column], rows: Sequence[Row]
) -> Section | None:
    return Section(name, title, text, drawn, Table(title, columns, rows)) if rows else None
