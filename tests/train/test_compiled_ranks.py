"""torch.compile under torchrun: in every layout, and with what backward computes again, the losses of a run
that is not compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import each_rank
from runs import logged
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from fastgpt.config import TrainConfig
from fastgpt.train import train

MUTANTS = {
    "fastgpt/train.py": [
        (
            "torch.compile(self.parallel) if config.compile",
            "torch.compile(self.model) if config.compile",
            "-m slow tests/train/test_compiled_ranks.py -k ddp-none",
        ),
        (
            "torch.compile(self.parallel) if config.compile",
            "self.parallel if config.compile",
            "-m slow tests/train/test_compiled_ranks.py -k ddp-none",
        ),
    ]
}

Tiny = Callable[..., TrainConfig]


def graphs(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Train on two ranks, with DDP's gradients in buckets as large networks have them: how many graphs each
    rank compiled. (By itself DDP has one bucket of 25 MB, which this network would not fill.)"""
    small = functools.partial(DistributedDataParallel, bucket_cap_mb=0.05)
    monkeypatch.setattr("fastgpt.distributed.DistributedDataParallel", small)
    monkeypatch.setattr("torch.distributed._DEFAULT_FIRST_BUCKET_BYTES", 10_000)  # no more than the others

    def count() -> int:
        torch._dynamo.reset()  # this process may have compiled the network for other sizes
        counters.clear()
        train(config)
        return counters["stats"]["unique_graphs"]

    return each_rank(2, count)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
@pytest.mark.parametrize("layout", ["ddp", "zero1", "fsdp"])
def test_compiled_ranks_train_as_others_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, recompute: str
) -> None:
    """Two micro-batches a step, the first without an exchange of gradients where the layout has that."""
    config = tiny(
        model=dataclasses.replace(tiny().model, dropout=0.0),  # compiled code draws other numbers
        batch_size=8,
        micro_batch_size=2,
        max_steps=4,
        eval_every=2,
        log_every=1,
        parallel=layout,
        recompute=recompute,
    )
    plain = dataclasses.replace(config, out_dir=tmp_path / "plain")
    compiled = dataclasses.replace(config, out_dir=tmp_path / "compiled", compile=True)
    assert graphs(plain, monkeypatch) == [0, 0]
    assert min(graphs(compiled, monkeypatch)) >= 2  # of training and of evaluation; a split one has more
    rows = [logged(tmp_path / name) for name in ("plain", "compiled")]
    for a, b in zip(*rows, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == (None if b[key] is None else pytest.approx(b[key], rel=1e-5)), key
    assert rows[0][0]["train_loss"] > rows[0][-1]["train_loss"] + 0.1
