"""The page of a training run: the curves of its metrics.jsonl, its evaluations as a table, its settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.benchmarks.report.charts import axes_of, short, styled
from fastgpt.benchmarks.report.drawing import LIGHT, Drawing
from fastgpt.benchmarks.report.page import render
from fastgpt.benchmarks.report.sections import Chart, Section, slug
from fastgpt.benchmarks.report.tables import Column, Table, number
from fastgpt.config import CONFIG
from fastgpt.errors import InputError
from fastgpt.exam import SCORES
from fastgpt.metrics import KEYS, METRICS, read_metrics
from fastgpt.stability import GROUPS

TEMPLATE = "run.html"
MARKED = 60  # points, above which a line alone is clearer
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Curves:
    """A chart: the keys of metrics.jsonl that it draws over the steps, and what it calls them."""

    name: str
    title: str
    unit: str
    keys: Mapping[str, str]
    from_zero: bool = False
    log: bool = False


CURVES = (
    Curves("loss", "Loss", "nats a token", {"train_loss": "train, one batch", "val_loss": "validation"}),
    Curves(
        "hellaswag", "HellaSwag", "accuracy", {"hellaswag_acc": "acc", "hellaswag_acc_norm": "acc_norm"}, True
    ),
    Curves(
        "accuracy",
        "Right answers to held-out problems",
        "accuracy",
        {"accuracy": "all", **SCORES},
        True,
    ),
    Curves("lr", "Learning rate", "learning rate", {"lr": ""}, True),
    Curves("grad-norm", "Gradient norm, before clipping", "norm", {"grad_norm": ""}, log=True),
    Curves(
        "grad-norms",
        "Gradient norms by group",
        "norm",
        {f"grad_norm_{group}": group for group in GROUPS},
        log=True,
    ),
    Curves("logits", "Logits", "", {"max_logit": "largest", "log_sum_exp": "log-sum-exp"}),
    Curves("tokens-per-s", "Speed", "tokens/s", {"tokens_per_s": ""}, True),
    Curves("mfu", "Share of the chip's peak", "MFU", {"mfu": ""}, True),
)
EVALUATED = ("val_loss", "hellaswag_acc")  # a line of the table has one of these
NOTE = "Each point is one step, or one evaluation: nothing is smoothed."


def write(run: Path, out: Path) -> list[Path]:
    """Write index.html and its charts as PNGs into `out`. Returns the files, the page first.

    Raises:
        InputError: the run has logged nothing yet.
    """
    rows = read_metrics(run)
    if not rows:
        raise InputError(f"{run / METRICS} holds no step yet")
    drawn = [
        Chart(f"run-{curves.name}", curves.title, ("measured",), drawing)
        for curves in CURVES
        if (drawing := draw(rows, curves)) is not None
    ]
    shown = [Section("run-curves", "Curves", NOTE, drawn)]
    evaluations = [row for row in rows if any(row.get(key) is not None for key in EVALUATED)]
    if evaluations:
        table = Table("Evaluations", [_column(key) for key in KEYS], evaluations)
        shown.append(Section("run-evaluations", "Evaluations", "", (), table))
    values = {
        "title": f"Training run {run.resolve().name}",
        "summary": summary(rows),
        "sections": shown,
        "environment": [*_recorded(run / CONFIG), *_recorded(run / "environment.json")],
    }
    return render(TEMPLATE, out, shown, values)


def summary(rows: Rows) -> str:
    """One sentence for the head of the page."""
    last = rows[-1]
    losses = [(row["val_loss"], row["step"]) for row in rows if row["val_loss"] is not None]
    text = f"{last['step']:,} steps, {last['tokens']:,} tokens, {last['seconds']:,.0f} s of training"
    if not losses:
        return f"{text}; train loss {last['train_loss']:.4f}, not evaluated yet."
    best, at = min(losses)
    return f"{text}; validation loss {losses[-1][0]:.4f}, the best {best:.4f} after step {at:,}."


def points(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values, where there is a finite value; runs of older versions lack some keys."""
    found = [(row["step"], value) for row in rows if (value := row.get(key)) is not None]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in found], [value for _, value in found]


@styled
def draw(rows: Rows, curves: Curves) -> Drawing | None:
    """One chart over the steps; None where no row has a value of it."""
    found = {key: points(rows, key) for key in curves.keys}
    if not any(steps for steps, _ in found.values()):
        return None
    figure, axes = axes_of(2.6)
    drawing = Drawing(figure)
    for number_of, (key, (x, y)) in enumerate(found.items(), 1):
        if not x:
            continue
        label, color = curves.keys[key], LIGHT[f"c{number_of}"]
        axes.plot(x, y, color=color, linewidth=1.2, label=label or None)
        if len(x) <= MARKED:
            axes.scatter(x, y, color=color, s=12, gid=f"points-{slug(key)}", zorder=3, linewidth=0)
            drawing.tooltips[f"points-{slug(key)}"] = [
                f"step {step:,}\n{label or curves.title}: {value:,.5g}"
                for step, value in zip(x, y, strict=True)
            ]
    if curves.log and all(value > 0 for _, values in found.values() for value in values):
        axes.set_yscale("log")
    if curves.from_zero:
        axes.set_ylim(bottom=0)
    if curves.name == "tokens-per-s":
        axes.yaxis.set_major_formatter(short)
    axes.set(xlabel="step", ylabel=curves.unit)
    if any(curves.keys.values()):
        figure.legend(loc="outside upper left", ncols=4, handlelength=1.6, columnspacing=1.2)
    return drawing


def _column(key: str) -> Column:
    form = "{:,}" if key in ("step", "tokens", "outliers") else "{:,.5g}"
    return Column(key.replace("_", " "), number(lambda row: row.get(key), form.format), numeric=True)


def _recorded(path: Path) -> Iterable[tuple[str, str]]:
    """The values of a JSON object in the run's folder, those of an object inside it beside them."""
    if not path.exists():
        return
    for name, value in json.loads(path.read_text()).items():
        inner = value.items() if isinstance(value, dict) else [(name, value)]
        for key, found in inner:
            if found is not None:
                yield key.replace("_", " "), str(found)
