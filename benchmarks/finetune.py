"""`fastgpt bench finetune`: what pretraining on another text is worth, after the same steps on this one.

Two arms for each seed, with the network, batch and settings of the preset char-cpu, and bytes as tokens, so
that any two texts share a vocabulary: `from scratch` trains on the corpus; `pretrained` starts from the
weights of a run on the other text, and then does the same steps on the same batches. Losses are over the
whole validation split of the corpus. Rows are written after each arm, and arms in the file are not run again.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.benchmarks.study import append_rows, judged_at_the_end, read_rows
from fastgpt.config import TrainConfig, preset
from fastgpt.errors import InputError, TrainingStopped

SCRATCH, PRETRAINED = "from scratch", "pretrained"
KEY = ("arm", "pretrained_on", "pretrain_steps", "steps", "seed")
FIELDS = (*KEY, "step", "val_loss")
POINTS = 10  # of a curve


@dataclass
class FinetuneArgs:
    """Train the preset char-cpu on a text, from scratch and pretrained on another: a table and a figure."""

    corpus: str
    """What to finetune on, such as tiny Shakespeare: anything that `fastgpt train --corpus` takes."""
    out: Path
    """The file of results (.csv); arms that it holds are not run again. The figure goes beside it (.png)."""
    pretrain: str = "pydocs"
    """The other text: a larger one, the more like the corpus the better."""
    pretrain_steps: int = preset("char-cpu").max_steps
    """Steps on the other text."""
    steps: int = 500
    """Steps on the corpus, in both arms."""
    seeds: tuple[int, ...] = (1337, 1338, 1339)
    """One run of each arm for each seed."""
    figure: Path | None = None
    """Where to draw it instead."""


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    run_finetune(parse(FinetuneArgs, args, "bench finetune"))


def run_finetune(given: FinetuneArgs) -> None:
    """Run what the file of results lacks, print its table and draw its figure.

    Raises:
        InputError: steps that make no curve, or the file has other columns.
        TrainingStopped: a run was interrupted, or its loss is no longer finite.
    """
    if given.steps < POINTS:
        raise InputError(f"steps = {given.steps}: a curve needs at least {POINTS}")
    done = {_key(row) for row in read_rows(given.out, FIELDS)}
    for seed in given.seeds:
        for arm in (SCRATCH, PRETRAINED):
            about = _about(given, arm, seed)
            if _key(about) not in done:
                curve = _curve(given, arm, seed)
                rows = [about | {"step": step, "val_loss": round(loss, 4)} for step, loss in curve.items()]
                append_rows(given.out, FIELDS, rows)
    asked = {_key(_about(given, arm, seed)) for arm in (SCRATCH, PRETRAINED) for seed in given.seeds}
    rows = [row for row in read_rows(given.out, FIELDS) if _key(row) in asked]
    curves = _curves(rows)
    plot(curves, given, given.figure or given.out.with_suffix(".png"))
    print(table(curves))


def _about(given: FinetuneArgs, arm: str, seed: int) -> dict[str, Any]:
    """What identifies a run."""
    pretrained = arm == PRETRAINED
    return {
        "arm": arm,
        "pretrained_on": Path(given.pretrain).name if pretrained else "",
        "pretrain_steps": given.pretrain_steps if pretrained else 0,
        "steps": given.steps,
        "seed": seed,
    }


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def _curve(given: FinetuneArgs, arm: str, seed: int) -> dict[int, float]:
    """The validation loss at each evaluation of one run."""
    from fastgpt.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        config = _settings(given.corpus, given.steps, seed, Path(folder) / "run")
        config = dataclasses.replace(config, eval_every=given.steps // POINTS)
        if arm == PRETRAINED:
            before = _settings(given.pretrain, given.pretrain_steps, seed, Path(folder) / "before")
            _train(before)
            config = dataclasses.replace(config, init_from=str(before.out_dir))
        _train(config)
        rows = read_metrics(Path(folder) / "run")
    return {row["step"]: row["val_loss"] for row in rows if row["val_loss"] is not None}


def _settings(corpus: str, steps: int, seed: int, out_dir: Path) -> TrainConfig:
    config = dataclasses.replace(
        preset("char-cpu"), corpus=corpus, tokenizer="byte", seed=seed, out_dir=out_dir
    )
    return judged_at_the_end(config, steps)


def _train(config: TrainConfig) -> None:
    from fastgpt.train import train

    if train(config).steps_done < config.max_steps:
        raise TrainingStopped("interrupted: the same command begins this run again")


Curves = dict[str, list[dict[int, float]]]
"""Of each arm, for each seed: the loss by step."""


def _curves(rows: Sequence[dict[str, str]]) -> Curves:
    runs: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        runs.setdefault((row["arm"], row["seed"]), {})[int(row["step"])] = float(row["val_loss"])
    return {arm: [curve for (own, _), curve in runs.items() if own == arm] for arm in (SCRATCH, PRETRAINED)}


def table(curves: Curves) -> str:
    """Markdown: the loss of each arm by step, the mean over seeds, and at the end that of each seed."""
    steps = sorted(curves[SCRATCH][0])
    lines = [f"| steps | {SCRATCH} | {PRETRAINED} |", "|---|---|---|"]
    for step in steps:
        means = [statistics.mean(curve[step] for curve in curves[arm]) for arm in (SCRATCH, PRETRAINED)]
        lines.append(f"| {step} | {means[0]:.3f} | {means[1]:.3f} |")
    each = [", ".join(f"{curve[steps[-1]]:.3f}" for curve in curves[arm]) for arm in (SCRATCH, PRETRAINED)]
    lines.append(f"| {steps[-1]}, each seed | {each[0]} | {each[1]} |")
    return "\n".join(lines)


def plot(curves: Curves, given: FinetuneArgs, path: Path) -> None:
    """A line for each run."""
    from matplotlib.figure import Figure

    labels = {
        SCRATCH: SCRATCH,
        PRETRAINED: f"pretrained: {given.pretrain_steps} steps on {Path(given.pretrain).name}",
    }
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (arm, runs), color in zip(curves.items(), ("#3182bd", "#d94801"), strict=True):
        mean = statistics.mean(list(curve.values())[-1] for curve in runs)
        for number, curve in enumerate(runs):
            label = f"{labels[arm]}: {mean:.3f} (mean of {len(runs)})" if number == 0 else None
            axes.plot(list(curve), list(curve.values()), color=color, linewidth=1.5, alpha=0.8, label=label)
    axes.set(xlabel=f"step on {Path(given.corpus).name}", ylabel="validation loss (nats a byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
