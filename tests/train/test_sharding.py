"""Weights and optimizer split over ranks: the same training, and checkpoints for any number of ranks."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import each_rank, outcomes
from runs import last, logged
from safetensors.torch import load_file
from torch import is_tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook

from fastgpt import checkpoint
from fastgpt.config import TrainConfig
from fastgpt.errors import InputError
from fastgpt.pretrained import model_from, read_pretrained
from fastgpt.train import train

MUTANTS = {
    "fastgpt/sharding.py": [
        ("network.set_requires_gradient_sync(last)", "network.set_requires_gradient_sync(False)"),
        ("network.set_reshard_after_backward(last)", "network.set_reshard_after_backward(False)"),
        ("param_dtype=torch.bfloat16", "param_dtype=torch.float32"),
    ],
    "fastgpt/checkpoint.py": [
        ("    load_shards(shards, tensors)\n", ""),
        ('folder.rglob("*") if path.is_file()', 'folder.glob("*") if path.is_file()'),
    ],
}

Tiny = Callable[..., TrainConfig]


def settings(tiny: Tiny, out_dir: Path, **changes: object) -> TrainConfig:
    """Without dropout, which each rank draws for itself: the number of ranks then makes no difference."""
    model = dataclasses.replace(tiny().model, dropout=0.0)
    common = {"model": model, "batch_size": 8, "micro_batch_size": 1, "max_steps": 4, "eval_every": 2}
    return tiny(out_dir=out_dir, **{**common, **changes})


def assert_close(run: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """The weights of the last checkpoints, but for the biases of keys, whose gradient is rounding alone."""
    ours, theirs = last(run).model, last(other).model
    for name, weight in ours.items():
        pair = [weight.numpy(), theirs[name].numpy()]
        if name.endswith("c_attn.bias"):
            pair = [np.delete(b, np.s_[32:64]) for b in pair]
        np.testing.assert_allclose(*pair, rtol=rtol, atol=atol, err_msg=name)
    for a, b in zip(logged(run), logged(other), strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=10 * rtol), key


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process, made by the first test that needs it."""
    return tmp_path_factory.mktemp("one")


def single(tiny: Tiny, one: Path) -> Path:
    if not checkpoint.checkpoints(one):
        train(settings(tiny, one))
    return one


@pytest.mark.parametrize(("size", "layout"), [(2, "fsdp"), (4, "zero1"), (4, "hsdp")])
def test_split_over_ranks_it_trains_as_one_process_does(
    tiny: Tiny, tmp_path: Path, one: Path, size: int, layout: str
) -> None:
    """Accumulation included; each rank holds its part; sampling, evaluating and a checkpoint need all."""
    config = settings(tiny, tmp_path / "several", parallel=layout)

    def parts() -> tuple[float, str]:
        trainer = train(config)
        held = sum(p.to_local().numel() for p in trainer.model.parameters() if isinstance(p, DTensor))
        moments = [s["exp_avg"].to_local().numel() for s in trainer.optimizer.state.values()]
        assert sum(moments) == held
        return held / trainer.model.num_params(), trainer.sample()

    ranks = each_rank(size, parts, local_size=2)
    shared_over = 2 if layout == "hsdp" else size
    assert all(held == pytest.approx(1 / shared_over, rel=0.2) for held, _ in ranks)  # padded rows count
    assert len(ranks[0][1]) > 5
    assert all(text == "" for _, text in ranks[1:])
    assert_close(tmp_path / "several", single(tiny, one))
    assert model_from(read_pretrained(str(tmp_path / "several")))  # whole, as every other command reads it


def test_a_checkpoint_of_four_ranks_resumes_on_one_two_and_four(tiny: Tiny, tmp_path: Path) -> None:
    """Split in the same way or another, or not at all."""
    start = settings(tiny, tmp_path / "run", parallel="fsdp", max_steps=2, schedule="constant")
    whole = dataclasses.replace(start, out_dir=tmp_path / "whole", max_steps=4)
    each_rank(4, lambda: train(whole).steps_done)
    each_rank(4, lambda: train(start).steps_done)
    path = checkpoint.find(tmp_path / "run", "last")
    shards = sorted(file.name for file in (path / "optimizer").iterdir())
    assert len(shards) == 4
    assert all(name.endswith(".safetensors") for name in shards)
    for size, layout in [(1, "fsdp"), (2, "zero1"), (4, "fsdp"), (2, "ddp")]:
        copy = tmp_path / f"{size}-{layout}"
        shutil.copytree(tmp_path / "run", copy)
        rest = dataclasses.replace(start, out_dir=copy, parallel=layout, resume=True, max_steps=4)
        each_rank(size, lambda rest=rest: train(rest).steps_done)
        assert_close(copy, tmp_path / "whole")
    assert_same_optimizer(tmp_path / "4-fsdp", tmp_path / "whole")


def assert_same_optimizer(run: Path, other: Path) -> None:
    """Equal to the bit: the same number of ranks wrote them."""
    for ours in sorted((checkpoint.find(run, "last") / "optimizer").iterdir()):
        theirs = checkpoint.find(other, "last") / "optimizer" / ours.name
        written, expected = load_file(ours), load_file(theirs)
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in written)


def test_bf16_weights_are_gathered_from_fp32_shards(tiny: Tiny, tmp_path: Path) -> None:
    common = {"weights": "bf16", "precision": "auto", "sample_tokens": 0}
    train(settings(tiny, tmp_path / "one", **common))
    several = settings(tiny, tmp_path / "several", parallel="fsdp", **common)

    def dtypes() -> set[torch.dtype]:
        seen: set[torch.dtype] = set()
        handle = register_module_forward_hook(lambda _, __, y: seen.add(y.dtype) if is_tensor(y) else None)
        trainer = train(several)
        handle.remove()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        return seen

    assert each_rank(2, dtypes) == [{torch.bfloat16}] * 2
    assert_close(tmp_path / "several", tmp_path / "one", rtol=0.05, atol=3e-3)  # half a step of AdamW


def test_layouts_that_cannot_work_are_refused(tiny: Tiny) -> None:
    for ended, message in outcomes(2, lambda: train(tiny(parallel="hsdp"))):
        assert not ended
        assert "2 processes, 2 on this machine, are not several equal machines: use fsdp" in message
    with pytest.raises(InputError, match="precision = 'fp16': it must be bf16 or fp32 with zero1"):
        tiny(parallel="zero1", precision="fp16")
