"""What all tests share: one thread, Triton's interpreter, an own cache, small texts and small runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
from texts import pseudo_text

from fastgpt.config import GPTConfig, TrainConfig
from fastgpt.ops import choices

# One thread, here and in the processes that tests start: the cores belong to the test processes, and two
# OpenMP threads that wait for each other on a busy core are many times slower than one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

triton_interpreter.request()


@pytest.fixture(autouse=True, scope="session")
def _right_bf16() -> None:
    triton_interpreter.repair()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nothing that a test prepares may be found by, or come from, the user's own runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FASTGPT_OPS", raising=False)
        # What comes with the package may change with every measurement; without it `auto` is eager.
        patch.setattr(choices, "SHIPPED", tmp_path_factory.mktemp("shipped") / "measured.json")
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(pseudo_text(20_000))
    return path


@pytest.fixture
def tiny(text_file: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of seconds: dropout on and two micro-batches a step, so that nothing is left out."""

    def config(**changes: Any) -> TrainConfig:
        model = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
        base = TrainConfig(
            model=model,
            corpus=str(text_file),
            tokenizer="char",
            out_dir=tmp_path / "run",
            max_steps=12,
            batch_size=6,
            micro_batch_size=4,
            learning_rate=3e-3,
            warmup_steps=2,
            device="cpu",
            precision="fp32",
            log_every=2,
            eval_every=4,
            eval_tokens=320,
            checkpoint_every=4,
            sample_tokens=8,
        )
        return dataclasses.replace(base, **changes)

    return config
