"""`fastgpt bench modern`: what came after GPT-2, one change at a time, by what a small budget buys.

Every run has the preset char-cpu's batch and schedule, and its network unless options make that smaller, for
fewer steps; its loss is that over the whole validation split. Runs go seed by seed, a row is written after
each, and rows that are in the file are not run again: what is cut off goes on with the same command.

`--tune` compares learning rates without the validation split: the training split's last tenth judges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.benchmarks.study import append_rows, judged_at_the_end, read_rows
from fastgpt.config import TrainConfig, override, preset
from fastgpt.errors import InputError, TrainingStopped
from fastgpt.files import read_text

BASELINE = "baseline"
# Name: (preset, the fields that are changed).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("char-cpu", {}),
    "no biases": ("char-cpu", {"bias": False}),
    "RoPE": ("char-cpu", {"position": "rope"}),
    "RMSNorm": ("char-cpu", {"norm": "rms_norm"}),
    "QK-norm": ("char-cpu", {"qk_norm": True}),
    "ReLU^2": ("char-cpu", {"activation": "relu2"}),
    "SwiGLU": ("char-cpu", {"activation": "swiglu"}),
    "untied head": ("char-cpu", {"tied_head": False}),
    "Muon": (
        "char-cpu",
        {"optimizer": "muon", "muon_learning_rate": preset("modern-cpu").muon_learning_rate},
    ),
    "all": ("modern-cpu", {}),
    "all, SwiGLU": ("modern-cpu", {"activation": "swiglu"}),
    "all, AdamW": ("modern-cpu", {"optimizer": "adamw"}),
}
KEY = ("variant", "split", "n_layer", "n_embd", "seed", "steps", "learning_rate", "muon_learning_rate")
FIELDS = (*KEY, "parameters", "mflops_per_token", "loss", "ms_per_step")


@dataclass
class ModernArgs:
    """Train the preset char-cpu with one change at a time, and with all: a table of losses over seeds."""

    corpus: Path
    """A text file, such as tiny Shakespeare."""
    out: Path
    """The file of results (.csv); rows that it holds are not run again."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which changes, by name."""
    seeds: tuple[int, ...] = (1337, 1338, 1339)
    """One run of each variant for each seed."""
    steps: int = 500
    """Optimizer steps of a run."""
    n_layer: int = preset("char-cpu").model.n_layer
    """Blocks of the network: fewer for a machine with little time."""
    n_embd: int = preset("char-cpu").model.n_embd
    """Its width."""
    tune: tuple[float, ...] = ()
    """Compare these peak learning rates instead (of Muon, where a variant has it), on the training split."""
    times: bool = True
    """Keep the time of a step: pass --no-times on a machine that has other work."""


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    run_modern(parse(ModernArgs, args, "bench modern"))


def run_modern(given: ModernArgs) -> None:
    """Run what the file of results lacks, and print its table.

    Raises:
        InputError: an option names what does not exist, or the file has other columns.
        TrainingStopped: a run was interrupted, or its loss is no longer finite.
    """
    for name in given.variants:
        if name not in VARIANTS:
            raise InputError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}")
    done = {_key(row) for row in read_rows(given.out, FIELDS)}
    with tempfile.TemporaryDirectory() as folder, _text(given, Path(folder)) as corpus:
        for seed in given.seeds:
            for variant, config in _configs(given):
                config = dataclasses.replace(config, corpus=str(corpus), seed=seed)
                key = _row(given, variant, config)
                if _key(key) not in done:
                    out_dir = Path(folder) / f"{len(done)}"
                    found = _run(dataclasses.replace(config, out_dir=out_dir), given.times)
                    append_rows(given.out, FIELDS, [key | found])
                    done.add(_key(key))
    same = ("split", "n_layer", "n_embd", "steps")
    asked = [str(value) for value in (_split(given), given.n_layer, given.n_embd, given.steps)]
    rows = [row for row in read_rows(given.out, FIELDS) if [row[name] for name in same] == asked]
    print(rates(rows) if given.tune else table(rows))


def _configs(given: ModernArgs) -> Iterator[tuple[str, TrainConfig]]:
    """Each variant, with each of the learning rates to compare."""
    for variant in given.variants:
        base, changes = VARIANTS[variant]
        size = {"n_layer": given.n_layer, "n_embd": given.n_embd}
        config = override(preset(base), {**changes, **size}, source=variant)
        config = judged_at_the_end(config, given.steps)
        tuned = "muon_learning_rate" if config.optimizer == "muon" else "learning_rate"
        for rate in given.tune or (getattr(config, tuned),):
            yield variant, override(config, {tuned: rate}, source=variant)


@contextlib.contextmanager
def _text(given: ModernArgs, folder: Path) -> Iterator[Path]:
    """The corpus; to tune on, its training split alone, of which the last tenth will be held out."""
    if not given.tune:
        yield given.corpus
        return
    text = read_text(given.corpus).encode()
    part = folder / "training-split.txt"
    share = 1 - TrainConfig().val_fraction
    part.write_text(text[: int(len(text) * share)].decode(errors="ignore"))
    yield part


def _split(given: ModernArgs) -> str:
    return "held out of training" if given.tune else "validation"


def _row(given: ModernArgs, variant: str, config: TrainConfig) -> dict[str, Any]:
    """What identifies a run."""
    return {
        "variant": variant,
        "split": _split(given),
        "n_layer": config.model.n_layer,
        "n_embd": config.model.n_embd,
        "seed": config.seed,
        "steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "muon_learning_rate": config.muon_learning_rate if config.optimizer == "muon" else None,
    }


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple("" if row[name] is None else str(row[name]) for name in KEY)


def _run(config: TrainConfig, times: bool) -> dict[str, Any]:
    """Train once: what is found goes beside `_row`."""
    from fastgpt.train import train

    trainer = train(config)
    if trainer.steps_done < config.max_steps:
        raise TrainingStopped("interrupted: the same command goes on with this run")
    return {
        "parameters": trainer.model.num_params(),
        "mflops_per_token": round(trainer.model.flops_per_token() / 1e6, 3),
        "loss": round(trainer.best_val_loss, 4),
        "ms_per_step": round(1e3 * trainer.seconds / config.max_steps, 1) if times else None,
    }


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: the mean loss of each variant, its spread over seeds, and what it differs from the baseline.

    The difference is taken seed by seed, where initial weights (as far as shapes allow) and the order of the
    data are the same; its spread says whether it is more than chance.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    base = {row["seed"]: float(row["loss"]) for row in found.get(BASELINE, [])}
    lines = [
        "| change | parameters | MFLOP a token | loss, mean | spread | against the baseline | ms a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, runs in found.items():
        losses = [float(run["loss"]) for run in runs]
        gains = [float(run["loss"]) - base[run["seed"]] for run in runs if run["seed"] in base]
        times = [float(run["ms_per_step"]) for run in runs if run["ms_per_step"]]
        against = ""
        if gains and variant != BASELINE:
            against = f"{statistics.mean(gains):+.3f}" + (f" ± {_spread(gains)}" if len(gains) > 1 else "")
        lines.append(
            f"| {variant} | {int(runs[0]['parameters']):,} | {runs[0]['mflops_per_token']} | "
            f"{statistics.mean(losses):.3f} | {_spread(losses)} | {against} | "
            f"{f'{statistics.median(times):.0f}' if times else ''} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """The standard deviation of a sample; nothing for a single value."""
    return f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""


def rates(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: the loss of each variant at each learning rate."""
    lines = ["| change | learning rate | of Muon | seed | loss |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row[name] for name in ("variant", "learning_rate", "muon_learning_rate", "seed", "loss")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
