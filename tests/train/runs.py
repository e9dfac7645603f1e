"""What the tests of whole runs share: their checkpoints and logs, the command that starts one, a counter."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import checkpoint
from fastgpt.config import TrainConfig
from fastgpt.metrics import KEYS, read_metrics
from fastgpt.model import GPT
from fastgpt.train import Trainer, open_data


def last(run: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.find(run, "last"))


def assert_same_state(run: Path, other: Path) -> None:
    """Weights, optimizer and generators of the last checkpoints are equal to the bit."""
    a, b = last(run), last(other)
    assert a.state["step"] == b.state["step"]
    for left, right in ((a.model, b.model), (a.training(), b.training())):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
    drop = ("seconds",)
    assert {k: v for k, v in a.state.items() if k not in drop} == {
        k: v for k, v in b.state.items() if k not in drop
    }


def logged(run: Path) -> list[dict[str, Any]]:
    """The metrics that do not depend on the clock."""
    return [{k: row[k] for k in KEYS if k not in ("tokens_per_s", "seconds")} for row in read_metrics(run)]


def command(config: TrainConfig, *more: str) -> list[str]:
    shape = "--n-layer 2 --n-head 2 --n-embd 32 --block-size 16 --batch-size 4 --dropout 0.1 --device cpu"
    rest = "--eval-every 20 --checkpoint-every 5 --log-every 5 --eval-tokens 64"
    names = ["--corpus", config.corpus, "--out-dir", str(config.out_dir), "--sample-tokens", "5"]
    return [
        sys.executable,
        "-m",
        "fastgpt",
        "train",
        "char-cpu",
        *shape.split(),
        *rest.split(),
        *names,
        *more,
    ]


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not checkpoint.checkpoints(run):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def start(config: TrainConfig) -> Trainer:
    """A trainer at step 0, as `train` makes it."""
    data, config = open_data(config, None)
    torch.manual_seed(config.seed)
    assert config.out_dir is not None
    config.out_dir.mkdir(exist_ok=True)
    return Trainer(config, config.out_dir, data, GPT(config.model))


class Transfers(TorchDispatchMode):
    """Counts where the host asks a tensor for its value, which on a GPU waits for all that was queued."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))
