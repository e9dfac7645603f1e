"""The loss that a CPU's budget buys on tiny Shakespeare: preset char-cpu beside nanoGPT's recipe.

    python benchmarks/char_cpu.py --machine NAME [--corpus input.txt] [--seeds 1337 1338 1339]

Both have nanoGPT's CPU budget: 4 layers, 4 heads, 128 wide, block 64, batch 12, 2000 steps, dropout 0. Every
loss is over the whole validation split. Writes results/NAME/char_cpu.json and docs/images/char-cpu.png.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastgpt.benchmarks.study import ROOT, record
from fastgpt.cli import load_settings
from fastgpt.config import TrainConfig
from fastgpt.metrics import read_metrics
from fastgpt.train import train

SETTINGS = {
    "fastgpt char-cpu": "char-cpu",
    "nanoGPT's settings": str(ROOT / "examples/nanogpt-char-cpu.yaml"),
}
NANOGPT = 1.906  # its own code on a two-core machine, one seed, over the whole validation split


@dataclass
class Args:
    machine: str
    """The name of this machine, under which results are kept."""
    corpus: str = "shakespeare"
    """Tiny Shakespeare, by name or as a file."""
    seeds: tuple[int, ...] = (1337, 1338, 1339)
    """One run of each setting for each seed."""


def run(settings: str, corpus: str, seed: int, out_dir: Path) -> dict[str, Any]:
    """Train once. Returns the validation loss at each evaluation and the seconds spent training."""
    config: TrainConfig = load_settings(settings)
    config = dataclasses.replace(
        config, corpus=corpus, seed=seed, out_dir=out_dir, eval_tokens=None, device="cpu", sample_tokens=0
    )
    train(config)
    rows = [row for row in read_metrics(out_dir) if row["val_loss"] is not None]
    curve = {row["step"]: round(row["val_loss"], 4) for row in rows}
    return {
        "seed": seed,
        "val_loss": curve[rows[-1]["step"]],
        "train_seconds": round(rows[-1]["seconds"], 1),
        "curve": curve,
    }


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (name, runs), color in zip(results.items(), ("#d94801", "#3182bd"), strict=True):
        mean = statistics.mean(r["val_loss"] for r in runs)
        for number, r in enumerate(runs):
            label = f"{name}: {mean:.3f} (mean of {len(runs)} seeds)" if number == 0 else None
            axes.plot(
                list(r["curve"]),
                list(r["curve"].values()),
                color=color,
                alpha=0.8,
                linewidth=1.5,
                label=label,
            )
    axes.axhline(NANOGPT, color="gray", linestyle="--", label=f"nanoGPT's own code: {NANOGPT}")
    axes.set(xlabel="step", ylabel="validation loss (nats a character)", ylim=(1.6, 2.7))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: [run(settings, args.corpus, seed, Path(folder) / f"{number}-{seed}") for seed in args.seeds]
            for number, (name, settings) in enumerate(SETTINGS.items())
        }
    record(args.machine, "char_cpu", results=results)
    plot(results, ROOT / "docs" / "images" / "char-cpu.png")
    for name, runs in results.items():
        print(f"{name:<20} {[r['val_loss'] for r in runs]} in {[r['train_seconds'] for r in runs]} s")


if __name__ == "__main__":
    main(tyro.cli(Args))
