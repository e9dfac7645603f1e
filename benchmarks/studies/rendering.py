"""The tables of a study, and their places in its page: between <!-- NAME --> and <!-- /NAME -->."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton

from fastgpt.benchmarks.studies.microscope import Seen
from fastgpt.benchmarks.studies.study import LAUNCH_S, Study
from fastgpt.benchmarks.study import ROOT, record_path
from fastgpt.benchmarks.timing import Timing
from fastgpt.errors import InputError
from fastgpt.inspect import sass
from fastgpt.inspect.report import Analysis

COMPUTED, MEASURED = "computed", "measured"


def page_of(study: Study) -> Path:
    return ROOT / "docs" / "optimise" / f"{study.name}.md"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown, with the keys of the first row as its head."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(text: str) -> list[dict[str, dict[str, str]]]:
    """The tables of a text of Markdown: for each, its rows by their first cells (and second, if it has a
    kernel), as cells by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        head, _, *rows = [
            [cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()
        ]
        named = [dict(zip(head, row, strict=True)) for row in rows]
        found.append({" ".join([row["step"], row.get("kernel", "")]).strip(): row for row in named})
    return found


# -- computed ------------------------------------------------------------------------------------------------


def computed(study: Study, seen: Sequence[Sequence[Seen]]) -> str:
    """What the steps come to on all chips, in one table, and in another one the kernels on one chip.

    Args:
        seen: the steps on each chip.
    """
    first = next((steps for steps in seen if steps[0].chip.name == "h100"), seen[0])
    rows = []
    for number, step in enumerate(study.steps):
        row = {
            "step": step.name,
            "launches": f"{first[number].launches}",
            "MB": f"{first[number].bytes / 1e6:.1f}",
        }
        for steps in seen:
            one, name = steps[number], steps[number].chip.name
            row[f"{name}, predicted us"] = number_of(step.prediction.microseconds(one.chip))
            row[f"{name}, computed us"] = f"{number_of(one.ceiling * 1e6)} {one.binding}"
        rows.append(row)
    kernels = [_kernel(one, analysis) for one in first for analysis in one.kernels()]
    return (
        f"**Computed** from what Triton {triton.__version__} compiles for {study.sizes}. Times are ceilings, "
        f"with what binds; a launch counts as {1e6 * LAUNCH_S:.0f} us at least.\n\n{table(rows)}"
        f"\n\nThe kernels on {first[0].chip.name}, **computed**:\n\n{table(kernels)}"
    )


def _kernel(seen: Seen, analysis: Analysis) -> dict[str, str]:
    built, fits = analysis.built, analysis.fits
    widths = sass.widths(built.code.instructions)
    loads = {**widths.get("global load", {}), **widths.get("global to shared", {})}
    names = sorted({finding.split(":")[0] for finding in analysis.findings})
    return {
        "step": seen.step.name,
        "kernel": f"`{built.name}`",
        "programs": f"{analysis.launch.programs if analysis.launch else 0}",
        "warps": f"{built.warps}",
        "registers": f"{built.registers}",
        "spilled": f"{built.local_bytes}",
        "shared": f"{built.shared_bytes}",
        "occupancy": f"{fits.share:.0%}",
        "widest load, store": f"{max([*loads, 0])}, {max([*widths.get('global store', {}), 0])}",
        "ceiling, us": f"{number_of(analysis.bounds.ceiling * 1e6 if analysis.bounds else None)}",
        "findings": ", ".join(names) or "none",
    }


def number_of(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# -- measured ------------------------------------------------------------------------------------------------


def timings(found: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Of each contender what a record keeps: microseconds, and times the first one's speed."""
    return [{"step": name, **found[name].fields()} for name in found]


def record_of(study: Study, machine: str) -> Path:
    return record_path(machine, f"study-{study.name}")


def measured(study: Study, rows: Sequence[Mapping[str, Any]], where: str) -> str:
    """The table of what was measured; `where` names the machine.

    "times the first" are medians of ratios in the same rounds, "times the one before" their quotients.
    """
    shown, before = [], None
    for row in rows:
        step = study.step(row["step"])
        if row["status"] != "ok":
            shown.append(dict(zip(_COLUMNS, [row["step"], row["note"], *"-----"], strict=True)))
            continue
        ratio, us = row["ratio"] if shown else 1.0, [row[f"{name}_us"] for name in ("median", "p20", "p80")]
        predicted = step.prediction.cpu if step is not None else None
        spread = f" ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})" if shown else ""
        values = [
            row["step"],
            step.cpu_form if step is not None else "for comparison",
            number_of(us[0]),
            f"{number_of(us[1])} to {number_of(us[2])}",
            f"{ratio:.2f}{spread}",
            "-" if step is None or before is None else f"{ratio / before:.2f}",
            "-" if predicted is None else f"{predicted:.1f}",
        ]
        shown.append(dict(zip(_COLUMNS, values, strict=True)))
        before = ratio if step is not None else before
    return f"**Measured** on {where}.\n\n{table(shown)}"


_COLUMNS = (
    "step", "CPU form", "median, us", "p20 to p80", "times the first", "times the one before", "predicted"
)  # fmt: skip


# -- pages ---------------------------------------------------------------------------------------------------


def section(text: str, name: str) -> str:
    """What stands between the markers of that name.

    Raises:
        InputError: the text has no such markers.
    """
    match = re.search(_between(name), text, re.DOTALL)
    if match is None:
        raise InputError(
            f"the page has no <!-- {name} --> and <!-- /{name} -->: there is no place for a table"
        )
    return match[2].strip()


def write(page: Path, name: str, text: str) -> None:
    """Put a text between the markers of that name in a page.

    Raises:
        InputError: no such page, or no such markers.
    """
    if not page.exists():
        raise InputError(f"{page}: no such file")
    before = page.read_text(encoding="utf-8")
    section(before, name)
    after = re.sub(_between(name), lambda m: f"{m[1]}\n\n{text}\n\n{m[3]}", before, flags=re.DOTALL)
    page.write_text(after, encoding="utf-8")


def _between(name: str) -> str:
    return rf"(<!-- {name} -->)(.*?)(<!-- /{name} -->)"


def recorded(study: Study, machine: str) -> str:
    """The table of a machine's record.

    Raises:
        InputError: there is none.
    """
    path = record_of(study, machine)
    if not path.exists():
        raise InputError(f"{path}: no such file: measure with --machine {machine}")
    found = json.loads(path.read_text(encoding="utf-8"))
    return measured(study, found["rows"], found["where"])
