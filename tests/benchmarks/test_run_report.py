"""`fastgpt bench report RUN`: the page of a training run. Every figure in this file is made up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastgpt.benchmarks.report import command
from fastgpt.benchmarks.report.run import CURVES, draw, summary
from fastgpt.errors import InputError
from fastgpt.metrics import KEYS, METRICS

MUTANTS = {
    "benchmarks/report/run.py": [
        ("if (value := row.get(key)) is not None", "if (value := row.get(key, 0.0)) is not None"),
        ("        if not x:\n", "        if len(x) < 3:\n"),
        ("min(losses)", "losses[-1]"),
        (" if math.isfinite(value)]", "]"),
        (" if any(row.get(key) is not None for key in EVALUATED)", ""),
    ],
    "benchmarks/report/__init__.py": [
        ("        if given.against is not None:\n            raise", "        if False:\n            raise")
    ],
}


def line(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl as a run on a CPU writes it."""
    row: dict[str, Any] = dict.fromkeys(KEYS)
    row |= {"step": step, "tokens": 1024 * step, "train_loss": 11 - step / 10, "lr": 1e-3 * step}
    return row | {"grad_norm": 1.5, "tokens_per_s": 1000.0 + step, "seconds": float(step)} | values


LINES = [
    line(5),
    line(10, val_loss=9.0, hellaswag_acc=0.25, hellaswag_acc_norm=0.5),
    line(15, grad_norm=None, max_logit=float("inf")),
    line(20, val_loss=9.5),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a-run"
    folder.mkdir()
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in LINES))
    (folder / "config.json").write_text(json.dumps({"corpus": "<made up>", "model": {"n_layer": 4}}))
    return folder


def test_the_page_shows_what_the_run_logged(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    command([str(run), "--out", str(out)])
    page = (out / "index.html").read_text()
    figures = re.findall(r'<figure class="chart" id="([^"]+)">', page)
    assert figures == [f"run-{name}" for name in ("loss", "hellaswag", "lr", "grad-norm", "tokens-per-s")]
    assert {path.stem for path in out.glob("*.png")} == set(figures)
    assert "Training run a-run" in page
    assert "validation loss 9.5000, the best 9.0000 after step 10." in page
    assert "&lt;made up&gt;" in page and "<made up>" not in page
    assert "<dt>n layer</dt><dd>4</dd>" in page
    table = page.split("<tbody>")[1].split("</tbody>")[0]
    assert table.count("<tr>") == 2  # evaluations alone
    assert not re.search(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", page)  # fetches nothing


def test_curves_have_the_logged_points() -> None:
    by_name = {curves.name: curves for curves in CURVES}
    loss = draw(LINES, by_name["loss"])
    assert loss is not None
    found = {drawn.get_label(): drawn.get_xydata().tolist() for drawn in loss.figure.axes[0].lines}
    assert found == {
        "train, one batch": [[5, 10.5], [10, 10.0], [15, 9.5], [20, 9.0]],
        "validation": [[10, 9.0], [20, 9.5]],
    }
    norm = draw(LINES, by_name["grad-norm"])
    assert norm is not None
    assert norm.figure.axes[0].lines[0].get_xdata().tolist() == [5, 10, 20]
    older = [{key: row[key] for key in ("step", "train_loss", "val_loss")} for row in LINES]
    assert draw(older, by_name["logits"]) is None
    assert draw(LINES, by_name["logits"]) is None  # infinite: nothing to draw


def test_long_runs_are_lines_without_marks() -> None:
    loss = draw([line(step) for step in range(1, 200)], CURVES[0])
    assert loss is not None and not loss.tooltips


def test_a_run_that_was_not_evaluated(run: Path, tmp_path: Path) -> None:
    assert summary([line(5)]).endswith("5 s of training; train loss 10.5000, not evaluated yet.")
    (run / METRICS).write_text(json.dumps(line(5)) + "\n")
    command([str(run), "--out", str(tmp_path / "report")])
    assert "<table>" not in (tmp_path / "report/index.html").read_text()


def test_what_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match="--against is for results, and .*a-run is a training run"):
        command([str(run), "--against", str(run)])
    (run / METRICS).write_text("")
    with pytest.raises(InputError, match=r"metrics\.jsonl holds no step yet"):
        command([str(run)])
