"""What a run says and leaves behind: its record, metrics.jsonl, TensorBoard, loss.png, the progress bar."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fastgpt import exam, runtime
from fastgpt.config import CONFIG

if TYPE_CHECKING:
    from fastgpt.train import Trainer

METRICS = "metrics.jsonl"
KEYS = (
    *("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "seconds"),
    *("hellaswag_acc", "hellaswag_acc_norm"),
    *("accuracy", *exam.SCORES),  # of an exam
    *("loss_z", "grad_norm_z", "outliers"),  # with a guard
    *("max_logit", "log_sum_exp"),  # at evaluations, and so the gradient norms of groups of parameters
    *("grad_norm_embedding", "grad_norm_attention", "grad_norm_mlp", "grad_norm_norm"),
)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = run / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsLog:
    """Writes one JSON object a line, with every key of KEYS (null where there is no value).

    Args:
        run: the run's folder.
        first_step: lines of this step and later, left by a run that was killed after its last checkpoint,
            are dropped, so that a resumed run's log is that of an uninterrupted one.
        total_steps: for the progress bar.
    """

    def __init__(self, run: Path, *, first_step: int, total_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        kept = [row for row in read_metrics(run) if row["step"] <= first_step]
        self._file = (run / METRICS).open("w")
        for row in kept:
            self._write(row)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15,
        )

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def advance(self) -> None:
        self._bar.update()

    def log(self, row: dict[str, Any]) -> None:
        """Record one row; `tokens_per_s`, `seconds` and losses are in tokens, seconds and nats a token."""
        row = {key: row.get(key) for key in KEYS}
        self._write(row)
        for key in KEYS[2:]:
            if row[key] is not None:
                self._board.add_scalar(key, row[key], row["step"])
        self._bar.set_postfix_str(
            f"loss {row['train_loss']:.3f}, {row['tokens_per_s']:,.0f} tok/s", refresh=False
        )
        if row["val_loss"] is not None:
            self.say(
                f"step {row['step']:>6}   train loss {row['train_loss']:.4f}   "
                f"val loss {row['val_loss']:.4f}   lr {row['lr']:.2e}   "
                f"{row['tokens_per_s']:,.0f} tokens/s   MFU {format_mfu(row['mfu'])}"
            )
        if row["accuracy"] is not None:
            self.say(f"step {row['step']:>6}   {exam.describe(row)}")
        if row["hellaswag_acc"] is not None:
            self.say(
                f"step {row['step']:>6}   HellaSwag acc {row['hellaswag_acc']:.4f}   "
                f"acc_norm {row['hellaswag_acc_norm']:.4f}"
            )

    def sample(self, text: str, step: int) -> None:
        self._board.add_text("sample", text.replace("\n", "  \n"), step)

    def say(self, line: str) -> None:
        """A line on standard output, above the progress bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def step_row(trainer: Trainer, loss: float, norm: float, steps_per_second: float) -> dict[str, Any]:
    """The line of metrics.jsonl about the step just done."""
    tokens_per_step = trainer.config.batch_size * trainer.config.model.block_size
    tokens_per_s = steps_per_second * tokens_per_step
    flops_per_s = tokens_per_s * trainer.model.flops_per_token() / trainer.world.size
    peak = trainer.precision.peak_flops()
    return {
        "step": trainer.steps_done,
        "tokens": trainer.steps_done * tokens_per_step,
        "train_loss": loss,
        "val_loss": trainer.val_loss,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "grad_norm": norm if math.isfinite(norm) else None,  # not where the fp16 scaler skipped the step
        "tokens_per_s": tokens_per_s,
        "mfu": flops_per_s / peak if peak else None,
        "seconds": trainer.seconds,
    }


class Silent:
    """In place of a MetricsLog on ranks that leave the record to rank 0."""

    def advance(self) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        pass

    def sample(self, text: str, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def format_mfu(mfu: float | None) -> str:
    return "n/a" if mfu is None else f"{mfu:.1%}"


def plot_losses(run: Path) -> Path:
    """Draw loss.png from metrics.jsonl. Returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    evaluated = [row for row in rows if row["val_loss"] is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*_series(rows, "train_loss"), color="#9ecae1", linewidth=1, label="train (one batch)")
    axes.plot(*_series(evaluated, "val_loss"), color="#d94801", marker="o", markersize=4, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    if evaluated:
        axes.set_title(
            f"{run.name}: validation loss {evaluated[-1]['val_loss']:.4f} after {evaluated[-1]['step']} steps"
        )
    axes.grid(alpha=0.3)
    axes.legend()
    path = run / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row[key] for row in rows]


def write_record(trainer: Trainer) -> None:
    """The settings and the machine, beside the checkpoints."""
    trainer.out_dir.mkdir(parents=True, exist_ok=True)
    environment = {**runtime.environment(trainer.device), "processes": trainer.world.size}
    (trainer.out_dir / CONFIG).write_text(trainer.config.to_json())
    (trainer.out_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def announce(trainer: Trainer) -> None:
    """Print what is about to be trained, on what, and where to."""
    config, model = trainer.config, trainer.config.model
    sequences = config.max_steps * config.batch_size
    epochs = trainer.loader.epoch_of(config.max_steps)
    size, device = trainer.world.size, trainer.device
    where = f"{device}, " if size == 1 else f"{size} processes on {device.type}, each with "
    lines = {
        "data": f"{config.corpus}: {trainer.data.describe()}",
        "model": f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
        f"block {model.block_size}: {trainer.model.num_params():,} parameters",
        "training": f"{config.max_steps} steps of {config.batch_size} sequences "
        f"= {sequences * model.block_size:,} tokens, {epochs:.1f} epochs",
        "computing": f"{trainer.precision.name} on {where}{torch.get_num_threads()} CPU threads",
        "run": f"{trainer.out_dir}" + (f", after step {trainer.steps_done}" if trainer.steps_done else ""),
    }
    print("\n".join(f"{name:<10} {line}" for name, line in lines.items()), flush=True)
