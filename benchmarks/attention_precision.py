"""Does bf16 attention train like fp32 attention? A long run of each, all else being the same and in fp32.

    python benchmarks/attention_precision.py --machine NAME [--corpus input.txt] [--steps 2000 ...]

Preset char-cpu, with the same batches, initial weights and operations, attention excepted. Two fp32
implementations show how far rounding alone drives runs apart; `rounded before dividing` is the rounding that
arXiv 2510.04212 blames for late divergence. Writes results/NAME/attention_precision.json and
docs/images/attention-precision.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor

from fastgpt import ops
from fastgpt.benchmarks.study import ROOT, judged_at_the_end, record
from fastgpt.config import preset
from fastgpt.metrics import read_metrics
from fastgpt.train import train

LAST = 20  # logged losses that the table's gap is over


@dataclass
class Args:
    machine: str
    """The name of this machine, under which results are kept."""
    corpus: str = "shakespeare"
    """Tiny Shakespeare, by name or as a file."""
    steps: int = 2000
    """Of each run."""
    batch_size: int = 12
    """Sequences of a step."""
    seed: int = 1337
    """Of every run."""


class RoundedBeforeDividing(torch.autograd.Function):
    """Causal attention of (B, H, T, D) whose sum exp(s - max) v is rounded to v's dtype, and then divided.

    Where several weights of a row are 1 and values have one sign, that sum is a sum of few numbers of 8 bits,
    halfway between two of them as often as not, and what the small weights add decides all such ties alike.
    Kernels that divide in fp32 and round once have no such ties.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = _scores(q, k)  # (B, H, T, T)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        summed = (weights.to(v.dtype).float() @ v.float()).to(v.dtype)
        o = (summed.float() / total).to(v.dtype)
        ctx.save_for_backward(q, k, v, o, top + total.log())
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, lse = ctx.saved_tensors
        p = (_scores(q, k) - lse).exp()
        delta = (do.float() * o.float()).sum(-1, keepdim=True)
        ds = (p * (do.float() @ v.float().mT - delta)).to(q.dtype).float()
        scale = q.shape[-1] ** -0.5
        dq, dk = scale * ds @ k.float(), scale * ds.mT @ q.float()
        dv = p.to(q.dtype).float().mT @ do.float()
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    s = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return s.masked_fill(hidden, -torch.inf)


def rounded_before_dividing(qkv: Tensor) -> Tensor:
    """(B, T, H, D) from packed qkv (B, T, 3, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return RoundedBeforeDividing.apply(q, k, v).transpose(1, 2).contiguous()


def _implementation(name: str) -> Callable[[Tensor], Tensor]:
    attend = ops.causal_attention_qkvpacked
    return lambda qkv: attend(qkv, backend=name)


# Name: dtype of attention's inputs and outputs, and what computes it. The first is what others are held to.
CONTENDERS: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "fp32, PyTorch": (torch.float32, _implementation("eager")),
    "bf16, native": (torch.bfloat16, _implementation("native")),
    "fp32, native": (torch.float32, _implementation("native")),
    "bf16, rounded before dividing": (torch.bfloat16, rounded_before_dividing),
}


@contextlib.contextmanager
def attention(dtype: torch.dtype, attend: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, models attend in `dtype` by `attend`; dropout must be 0."""

    def packed(qkv: Tensor, *, dropout_p: float = 0.0) -> Tensor:
        assert dropout_p == 0
        return attend(qkv.to(dtype)).to(qkv.dtype)

    with mock.patch.object(ops, "causal_attention_qkvpacked", packed):
        yield


def run(name: str, args: Args, out_dir: Path, **changes: Any) -> dict[str, Any]:
    """Train once. Returns the logged training losses and gradient norms, and the last validation loss."""
    config = dataclasses.replace(
        judged_at_the_end(preset("char-cpu"), args.steps),
        corpus=args.corpus,
        batch_size=args.batch_size,
        seed=args.seed,
        out_dir=out_dir,
        precision="fp32",
        **changes,
    )
    with attention(*CONTENDERS[name]):
        train(config)
    rows = read_metrics(out_dir)
    return {
        "val_loss": round(rows[-1]["val_loss"], 4),
        "steps": [row["step"] for row in rows],
        "train_loss": [round(row["train_loss"], 5) for row in rows],
        "grad_norm": [round(row["grad_norm"], 5) for row in rows],
    }


def gap(result: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Mean and largest size of the differences of the last logged training losses."""
    pairs = zip(result["train_loss"][-LAST:], base["train_loss"][-LAST:], strict=True)
    differences = [a - b for a, b in pairs]
    return statistics.mean(differences), max(map(abs, differences))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Lines of a Markdown table."""
    base = next(iter(results.values()))
    lines = [
        f"| attention | validation loss | training loss less the first's, mean of last {LAST} | largest |",
        "|---|---|---|---|",
    ]
    for name, result in results.items():
        mean, largest = gap(result, base)
        lines.append(f"| {name} | {result['val_loss']:.4f} | {mean:+.5f} | {largest:.5f} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    base, *others = results
    for name in others:
        pairs = zip(results[name]["train_loss"], results[base]["train_loss"], strict=True)
        axes.plot(results[base]["steps"], [a - b for a, b in pairs], linewidth=1, alpha=0.8, label=name)
    axes.set(xlabel="step", ylabel=f"training loss less that of {base}")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def write(results: dict[str, dict[str, Any]], args: Args) -> None:
    """What is there so far: a long run that is cut short leaves its finished parts."""
    settings = {"steps": args.steps, "batch_size": args.batch_size, "seed": args.seed}
    record(args.machine, "attention_precision", settings=settings, results=results)
    if len(results) > 1:
        plot(results, ROOT / "docs" / "images" / "attention-precision.png")


def main(args: Args) -> None:
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(CONTENDERS):
            results[name] = run(name, args, Path(folder) / str(number))
            write(results, args)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args))
