"""The charts of the report. Each takes rows of one machine and one kind; None: there is nothing to draw."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

from fastgpt.benchmarks.comparison import OURS, Comparison, Interval, family, ours, sizes, spread, timed
from fastgpt.benchmarks.report.drawing import LIGHT, STYLE, TIMES, TO, Drawing
from fastgpt.benchmarks.results import Row
from fastgpt.chips import chip_named

WIDTH = 4.4  # inches: 422 pixels in the page, so that text is readable on a phone without zooming
MARKERS = {"triton": "o", "native": "s"}
UNITS = (("s", 1e6), ("ms", 1e3), ("µs", 1.0))
FIXED = {"triton": "c1", "native": "c2", "eager": "c3", "compile": "c4"}
OTHERS = ("c5", "c6", "c7")
VARIANTS: tuple[tuple[Any, float], ...] = (("-", 0.9), ((0, (4, 2)), 0.55), ((0, (1, 1.5)), 0.35))
PRECISIONS = {"float32": ("fp32", "tf32"), "bfloat16": ("bf16",), "float16": ("fp16",)}


@dataclass(frozen=True)
class Look:
    color: str
    marker: str
    line: Any
    alpha: float


def looks(rows: Iterable[Row]) -> dict[str, Look]:
    """How each contender is drawn: a colour for each family, a line and a shade for each of its members."""
    found: dict[str, Look] = {}
    members: dict[str, int] = {}
    for name in dict.fromkeys(row.contender for row in rows):
        number = members.setdefault(family(name), 0)
        members[family(name)] += 1
        others = [member for member in members if member not in FIXED]
        variable = FIXED.get(family(name)) or OTHERS[others.index(family(name)) % len(OTHERS)]
        line, alpha = VARIANTS[number % len(VARIANTS)]
        found[name] = Look(LIGHT[variable], MARKERS.get(family(name), "D"), line, alpha)
    return found


P = ParamSpec("P")


def styled(chart: Callable[P, Drawing | None]) -> Callable[P, Drawing | None]:
    """Draw in the report's style, whatever the user's matplotlib is set to."""

    @functools.wraps(chart)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Drawing | None:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return chart(*args, **kwargs)

    return draw


def axes_of(height: float) -> tuple[Any, Any]:
    """A figure as wide as all of the page's, of that height in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def describe(row: Row) -> str:
    """A tooltip's first line."""
    return f"{row.operation} {row.direction}, {row.contender}, {row.dtype}, {row.shape}"


def microseconds(*values: float | None) -> str:
    """A time with three digits and a unit that suits it; further ones are its spread, in brackets."""
    if not values[0]:
        return ""
    unit, size = next((pair for pair in UNITS if values[0] >= pair[1]), UNITS[-1])
    first, *rest = (f"{(value or 0.0) / size:#.3g}".rstrip(".") for value in values)
    return f"{first} {unit}" + (f" ({TO.join(rest)})" if rest else "")


# -- operations ----------------------------------------------------------------------------------------------


@styled
def speedup(
    comparisons: Sequence[Comparison],
    ratio: Callable[[Comparison], Interval | None],
    what: str,
    controls: Sequence[Row] = (),
) -> Drawing | None:
    """A line of dots for each operation, the one with the slowest dot first; `ratio` is over `what`.

    `controls` are eager's own rows, whose ratio is to itself: a gray bar shows what noise does to a ratio.
    """
    shown = [(c.row, interval) for c in comparisons if (interval := ratio(c)) is not None]
    if not shown:
        return None
    tooltips = [f"{describe(row)}\n{interval} of {what}" for row, interval in shown]
    drawing = _strips([row for row, _ in shown], [interval for _, interval in shown], tooltips)
    axes = drawing.figure.axes[0]
    low = min(interval.low for _, interval in shown) / 1.15
    high = max(interval.high for _, interval in shown) * 1.15
    low, high = min(low, 0.8), max(high, 1.25)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.axvspan(low, 1, color=LIGHT["loss-tint"], zorder=0, linewidth=0)
    axes.axvline(1, color=LIGHT["muted"], linewidth=1, zorder=1)
    for label in axes.get_yticklabels():
        noise = [
            row for row in controls if row.operation == label.get_text() and row.ratio_p20 and row.ratio_p80
        ]
        if noise:
            left = statistics.median(row.ratio_p20 or 1.0 for row in noise)
            right = statistics.median(row.ratio_p80 or 1.0 for row in noise)
            axes.barh(
                label.get_position()[1], right - left, left=left, height=0.7, color=LIGHT["line"], zorder=1
            )
    _plain_ticks(axes, low, high)
    axes.set_xlabel(f"slower  ←  times as fast as {what}  →  faster")
    return drawing


def _plain_ticks(axes: Any, low: float, high: float) -> None:
    """Ratios that are easy to read, as many as the range leaves room for."""
    from matplotlib.ticker import NullLocator

    close = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.7, 2, 2.4]
    powers = [2.0**power for power in range(-12, 13)]
    ticks = close if high / low < 2.5 else sorted({*powers, 0.7, 1.4, 2.8}) if high / low < 8 else powers
    if high / low > 100:
        ticks = [10.0**power for power in range(-4, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:.2g}{TIMES}" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())


@styled
def share_of_limit(rows: Sequence[Row]) -> Drawing | None:
    """How close our kernels come to the computed limit, for each operation, the farthest first."""
    shown = [row for row in rows if timed(row) and row.limit_us and ours(row)]
    if not shown:
        return None
    shares = []
    for row in shown:
        (p20, p80), limit = spread(row), 100 * (row.limit_us or 0.0)
        shares.append(Interval(limit / (row.median_us or 1.0), limit / p80, limit / p20))
    tooltips = [
        f"{describe(row)}\n{share.median:.0f}%: {microseconds(row.median_us)} of {microseconds(row.limit_us)}"
        for row, share in zip(shown, shares, strict=True)
    ]
    drawing = _strips(shown, shares, tooltips)
    axes = drawing.figure.axes[0]
    axes.set_xlim(0, max(105.0, *(share.high * 1.05 for share in shares)))
    axes.axvline(100, color=LIGHT["muted"], linewidth=1, zorder=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    axes.set_xlabel("computed limit / time")
    return drawing


def _strips(rows: Sequence[Row], values: Sequence[Interval], tooltips: Sequence[str]) -> Drawing:
    """Dots with their spread, one line for each operation and, within it, one for each contender."""
    slowest: dict[str, float] = {}
    for row, value in zip(rows, values, strict=True):
        slowest[row.operation] = min(value.median, slowest.get(row.operation, value.median))
    operations = sorted(slowest, key=lambda operation: slowest[operation])
    contenders = [name for name in OURS if any(row.contender == name for row in rows)]
    figure, axes = axes_of(0.75 + 0.28 * len(operations))
    drawing = Drawing(figure)
    for number, contender in enumerate(contenders):
        chosen = [index for index, row in enumerate(rows) if row.contender == contender]
        offset = 0.32 * (number - (len(contenders) - 1) / 2)
        y = [operations.index(rows[index].operation) + offset for index in chosen]
        x = [values[index] for index in chosen]
        color = LIGHT[FIXED[contender]]
        axes.hlines(y, [v.low for v in x], [v.high for v in x], color=color, alpha=0.45, linewidth=1.2)
        group = f"dots-{contender}"
        axes.scatter(
            [v.median for v in x],
            y,
            s=15,
            color=color,
            marker=MARKERS[contender],
            alpha=0.85,
            linewidth=0,
            label=contender,
            gid=group,
            zorder=3,
        )
        drawing.tooltips[group] = [tooltips[index] for index in chosen]
    axes.set_yticks(range(len(operations)), operations)
    axes.set_ylim(len(operations) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper right", ncols=len(contenders), handletextpad=0.1, columnspacing=1.2)
    return drawing


@styled
def roofline(rows: Sequence[Row]) -> Drawing | None:
    """Work per second over work per byte, on logarithmic axes. `rows` are of one dtype.

    A hairline joins each of our dots with its computed limit, a tick. The roof is that of the chip's peak and
    bandwidth where `fastgpt.chips` knows them.
    """
    shown = [row for row in rows if timed(row) and row.flops and row.bytes]
    if not shown:
        return None
    figure, axes = axes_of(3.4)
    drawing = Drawing(figure)
    others = [row for row in shown if not ours(row)]
    groups = [("others", others, LIGHT["c3"], "D", 6)]
    groups += [
        (name, [row for row in shown if row.contender == name], LIGHT[FIXED[name]], MARKERS[name], 13)
        for name in OURS
    ]
    for name, chosen, color, marker, size in groups:
        if not chosen:
            continue
        x, y = [_intensity(row) for row in chosen], [_teraflops(row, row.median_us) for row in chosen]
        axes.scatter(
            x, y, s=size, color=color, marker=marker, alpha=0.85, linewidth=0, label=name, zorder=3, gid=name
        )
        drawing.tooltips[name] = [
            f"{describe(row)}\n{_teraflops(row, row.median_us):.3g} TFLOP/s, its limit "
            + (f"{_teraflops(row, row.limit_us):.3g}" if row.limit_us else "unknown")
            for row in chosen
        ]
        limited = [row for row in chosen if row.limit_us] if name in OURS else []
        x, tops = [_intensity(row) for row in limited], [_teraflops(row, row.limit_us) for row in limited]
        axes.vlines(
            x,
            [_teraflops(row, row.median_us) for row in limited],
            tops,
            color=color,
            alpha=0.2,
            linewidth=0.8,
        )
        axes.scatter(x, tops, s=20, color=LIGHT["ink"], marker="_", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    _roofs(axes, shown[0])
    _names(axes, shown)
    figure.legend(loc="outside upper right", ncols=3, handletextpad=0.1, columnspacing=1.2)
    return drawing


def _intensity(row: Row) -> float:
    return (row.flops or 0) / (row.bytes or 1)


def _teraflops(row: Row, microseconds: float | None) -> float:
    return (row.flops or 0) / (microseconds or 1.0) / 1e6


def has_roof(row: Row) -> bool:
    return chip_named(row.device_name) is not None


def _roofs(axes: Any, row: Row) -> None:
    """The lines that the chip of `row` cannot pass, one for each way of multiplying its dtype."""
    chip = chip_named(row.device_name)
    if chip is None:
        return
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    for number, precision in enumerate(PRECISIONS.get(row.dtype, ())):
        peak = chip.peak(precision)
        if peak is None:
            continue
        ridge = peak / chip.bandwidth
        right, top = max(right, 4 * ridge), max(top, 2.5 * peak / 1e12)
        x = [left, ridge, right]
        y = [at / 1e12 for at in (left * chip.bandwidth, peak, peak)]
        axes.plot(x, y, color=LIGHT["muted"], linewidth=1, linestyle=("-", "--")[number], zorder=1)
        axes.text(right, 1.1 * y[-1], f"{precision} {y[-1]:.0f}", ha="right", va="bottom", fontsize=7)
    middle = math.sqrt(left * ridge)
    axes.text(
        middle,
        1.3 * middle * chip.bandwidth / 1e12,
        f"{chip.bandwidth / 1e9:.0f} GB/s",
        ha="right",
        fontsize=7,
    )
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _names(axes: Any, rows: Sequence[Row]) -> None:
    """An operation's name beside its fastest dot, where it covers no other dot or name."""
    fastest: dict[str, Row] = {}
    for row in sorted(filter(ours, rows), key=lambda row: _teraflops(row, row.median_us)):
        fastest[row.operation] = row
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()

    def place(row: Row) -> tuple[float, float]:
        """As a share of the axes' width and height."""
        x, y = _intensity(row), _teraflops(row, row.median_us)
        return math.log(x / left) / math.log(right / left), math.log(y / bottom) / math.log(top / bottom)

    taken = [place(row) for row in rows]
    for operation, row in fastest.items():
        across, up = place(row)
        sign = -1 if across > 0.75 else 1  # to the left of a dot that is far to the right
        if any(0.015 < sign * (a - across) < 0.28 and abs(u - up) < 0.05 for a, u in taken):
            continue
        taken += [(across + sign * step / 20, up) for step in range(1, 6)]
        axes.annotate(
            operation,
            (_intensity(row), _teraflops(row, row.median_us)),
            (5 * sign, 0),
            textcoords="offset points",
            ha="left" if sign > 0 else "right",
            va="center",
            fontsize=7,
        )


# -- whole steps, the ladder, generation ---------------------------------------------------------------------


@styled
def by_batch(rows: Sequence[Row], value: Callable[[Row], float | None], unit: str) -> Drawing | None:
    """A line for each contender over the micro-batch B of the shape; a cross where memory did not suffice."""
    shown = [row for row in rows if timed(row) and value(row) and "B" in sizes(row.shape)]
    if not shown:
        return None
    full = [row for row in rows if row.status == "oom" and "B" in sizes(row.shape)]
    figure, axes = axes_of(2.7)
    drawing = Drawing(figure)
    drawn_as = looks(rows)
    batches = sorted({sizes(row.shape)["B"] for row in [*shown, *full]})
    contenders = list(dict.fromkeys(row.contender for row in shown))
    for contender in contenders:
        chosen = sorted(
            (row for row in shown if row.contender == contender), key=lambda row: sizes(row.shape)["B"]
        )
        x = [batches.index(sizes(row.shape)["B"]) for row in chosen]
        y = [value(row) or 0.0 for row in chosen]
        look, group = drawn_as[contender], f"line-{contender}"
        color, marker, line = look.color, look.marker, look.line
        axes.plot(x, y, color=color, linewidth=1.4, linestyle=line)
        axes.scatter(x, y, color=color, s=16, marker=marker, gid=group, zorder=3, linewidth=0)
        axes.plot([], [], color=color, marker=marker, markersize=4, linestyle=line, label=contender)
        drawing.tooltips[group] = [
            f"{describe(row)}\n{at:,.4g} {unit}" for row, at in zip(chosen, y, strict=True)
        ]
    _crosses(drawing, axes, full, batches, drawn_as)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlim(-0.3, len(batches) - 0.7)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(short)
    axes.set(xlabel="micro-batch B", ylabel=unit)
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper left", ncols=3, handlelength=2.4, columnspacing=1.2)
    return drawing


def _crosses(
    drawing: Drawing, axes: Any, full: Sequence[Row], batches: list[int], drawn_as: dict[str, Look]
) -> None:
    """Out of memory, on the axis at the batch that did not fit."""
    for number, row in enumerate(full):
        group = f"oom-{number}"
        axes.scatter(
            [batches.index(sizes(row.shape)["B"])],
            [0.04 + 0.07 * list(drawn_as).index(row.contender)],
            transform=axes.get_xaxis_transform(),
            color=drawn_as[row.contender].color,
            marker="x",
            s=18,
            gid=group,
            zorder=3,
        )
        computed = ", by computation: not tried" if row.kind == "computed" else ""
        drawing.tooltips[group] = [f"{describe(row)}\nout of memory{computed}"]


@styled
def waterfall(rows: Sequence[Row]) -> Drawing | None:
    """Each rung's bar reaches from its time back to that of the rung before, on a logarithmic axis: the bar's
    length is the factor that the rung gained."""
    shown = [row for row in rows if timed(row)]
    if not shown:
        return None
    figure, axes = axes_of(0.6 + 0.28 * len(shown))
    drawing = Drawing(figure)
    times = [(row.median_us or 0.0) / 1e3 for row in shown]
    for number, (row, time) in enumerate(zip(shown, times, strict=True)):
        before = times[number - 1] if number else time
        color = LIGHT["loss"] if time > before else LIGHT["c4"]
        axes.barh(number, abs(before - time), left=min(before, time), height=0.6, color=color, alpha=0.55)
        if number:
            axes.vlines(before, number - 1, number, color=LIGHT["muted"], linewidth=0.8)
        p20, p80 = spread(row)
        axes.hlines(number, p20 / 1e3, p80 / 1e3, color=LIGHT["ink"], linewidth=1.2)
        gain = f", {before / time:.2f}{TIMES}" if number else ""
        label = f"{microseconds(row.median_us)}{gain}"
        axes.annotate(
            label,
            (max(before, time, p80 / 1e3), number),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.scatter(times, range(len(times)), color=LIGHT["ink"], s=12, zorder=3, gid="rungs")
    drawing.tooltips["rungs"] = [f"{describe(row)}\n{microseconds(row.median_us)}" for row in shown]
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 1.15, max(times) * (max(times) / min(times)) ** 0.35 * 1.2)
    _few_ticks(axes)
    axes.set_yticks(range(len(shown)), [row.operation for row in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms a step, logarithmic")
    return drawing


def _few_ticks(axes: Any) -> None:
    """1, 2, 5, 10, ... as plain numbers on a logarithmic x axis."""
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [step * 10.0**power for power in range(-4, 8) for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()


def short(value: float, _: Any = None) -> str:
    """1,234,567 as 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


@styled
def generation(rows: Sequence[Row]) -> Drawing | None:
    """Tokens a second of each contender and shape, the fastest first within a shape."""
    shown = [row for row in rows if timed(row) and row.tokens_per_s]
    if not shown:
        return None
    shapes = list(dict.fromkeys(row.shape for row in shown))
    shown.sort(key=lambda row: (shapes.index(row.shape), -(row.tokens_per_s or 0.0)))
    figure, axes = axes_of(0.7 + 0.27 * len(shown) + 0.27 * len(shapes))
    drawn_as, y, place, previous = looks(rows), [], 0.0, ""
    for row in shown:
        place += 1.0 if row.shape == previous or not previous else 2.0
        if row.shape != previous:
            axes.text(0, place - 0.95, f" {row.shape}", color=LIGHT["muted"], va="center", fontsize=7.5)
        y.append(place)
        previous = row.shape
        speed, (p20, p80) = row.tokens_per_s or 0.0, spread(row)
        median = row.median_us or 1.0
        look = drawn_as[row.contender]
        axes.barh(place, speed, height=0.66, color=look.color, alpha=look.alpha)
        axes.hlines(place, speed * median / p80, speed * median / p20, color=LIGHT["ink"], linewidth=1.2)
        axes.text(speed * median / p20, place, f"  {short(speed)}", va="center", fontsize=7.5)
    axes.set_yticks(y, [f"{row.operation} {row.contender}" for row in shown])
    axes.set_ylim(place + 0.6, -0.3)
    axes.set_xlim(0, 1.2 * max(row.tokens_per_s or 0.0 for row in shown))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(short)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("tokens/s")
    return Drawing(figure)
