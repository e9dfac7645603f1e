"""The page: a part for each machine in one HTML file that needs nothing else, and its charts as PNGs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.benchmarks.comparison import OURS, Comparison, Machine, Verdict, compare, latest, machine
from fastgpt.benchmarks.report.drawing import theme
from fastgpt.benchmarks.report.sections import KINDS, RIVALS, Section, sections, slug
from fastgpt.benchmarks.results import Row

TEMPLATE = "page.html"


@dataclass(frozen=True)
class Part:
    """What the page says of one machine."""

    name: str
    title: str
    environment: list[tuple[str, str]]
    scores: list[tuple[str, Counter[Verdict]]]
    sections: list[Section]


def _part(place: Machine, rows: Sequence[Row]) -> Part:
    name = slug(f"{place.name} {place.device} {place.threads or ''}")
    return Part(
        name,
        str(place),
        _environment(rows),
        _scores([comparison for comparison in compare(rows) if comparison.row.suite == "ops"]),
        sections(name, rows),
    )


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every distinct value: rows of several runs may differ in the driver or the clocks."""

    def values(name: str) -> str:
        return "; ".join(
            dict.fromkeys(str(value) for row in rows if (value := getattr(row, name)) not in ("", None))
        )

    names = ("machine", "device_name", "device", "threads", "driver", "clocks", "versions", "git", "run")
    times = sorted(row.time for row in rows if row.time)
    when = [("time", f"{times[0]} to {times[-1]}" if times[0] != times[-1] else times[0])] if times else []
    return [(name.replace("_", " "), found) for name in names if (found := values(name))] + when


def _scores(comparisons: Sequence[Comparison]) -> list[tuple[str, Counter[Verdict]]]:
    """How many of our timings are slower, level and faster: measured ones, or computed ones said to be so."""
    found = []
    for kind in KINDS:
        for _, words, ratio in RIVALS:
            intervals = [ratio(comparison) for comparison in comparisons if comparison.row.kind == kind]
            counts = Counter(interval.verdict for interval in intervals if interval is not None)
            if counts:
                found.append((f"against {words}, {kind}", counts))
    return found


def write(rows: Sequence[Row], out: Path, changed: Section | None = None) -> list[Path]:
    """Write index.html and its charts as PNGs into `out`. Returns the files, the page first."""
    places: dict[Machine, list[Row]] = {}
    for row in latest(rows):
        places.setdefault(machine(row), []).append(row)
    parts = [_part(place, chosen) for place, chosen in sorted(places.items(), key=lambda item: str(item[0]))]
    older = len(rows) - sum(map(len, places.values()))
    values = {"parts": parts, "changed": changed, "rows": len(rows), "older": older, "ours": OURS}
    return render(TEMPLATE, out, [section for part in parts for section in part.sections], values)


def render(template: str, out: Path, shown: Sequence[Section], values: dict[str, Any]) -> list[Path]:
    """Write `template`, filled with `values`, as index.html, and the charts of its sections as PNGs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("fastgpt.benchmarks.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "index.html"]
    html = templates.get_template(template).render(theme=theme(), **values)
    written[0].write_text(html, encoding="utf-8")
    for section in shown:
        for chart in section.charts:
            written.append(out / f"{chart.name}.png")
            chart.drawing.png(written[-1])
    return written
