"""Whole runs with Muon and the modern network: resuming, several ranks, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import each_rank
from runs import Transfers, assert_same_state, last, logged, start

from fastgpt import GPT, checkpoint
from fastgpt.config import TrainConfig, override
from fastgpt.distributed import joined
from fastgpt.errors import InputError
from fastgpt.pretrained import model_from, read_pretrained
from fastgpt.sharding import arranged
from fastgpt.train import train

MUTANTS = {
    "fastgpt/train.py": [
        ('group.get("initial_lr")', "None"),
        ('(optimizer := saved.state.get("optimizer", "adamw")) != self.config.optimizer', "False"),
    ],
    "fastgpt/pretrained.py": [('if want.position == "learned":', "if True:")],
}

Tiny = Callable[..., TrainConfig]
MODERN = {
    "position": "rope",
    "norm": "rms_norm",
    "qk_norm": True,
    "activation": "relu2",
    "bias": False,
    "tied_head": False,
}


@pytest.fixture
def modern(tiny: Tiny) -> Tiny:
    """As `tiny`, with all that the preset modern changes, and a learning rate of Muon's own."""

    def config(**changes: object) -> TrainConfig:
        dropout = changes.pop("dropout", 0.1)
        base = override(tiny(), {**MODERN, "dropout": dropout}, source="test")
        return dataclasses.replace(base, optimizer="muon", muon_learning_rate=6e-3, **changes)

    return config


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resuming_is_bit_exact(modern: Tiny, tmp_path: Path, precision: str) -> None:
    """With dropout and accumulation; both learning rates follow the schedule; the loss falls."""
    whole = modern(out_dir=tmp_path / "whole", precision=precision)
    trainer = train(whole)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
        [3e-4 + 2.7e-3 * 0.5 * (1 + np.cos(np.pi * 0.9))] * 2
        + [6e-4 + 5.4e-3 * 0.5 * (1 + np.cos(np.pi * 0.9))] * 2
    )
    cut = dataclasses.replace(whole, out_dir=tmp_path / "cut", checkpoint_every=7)
    trainer = start(cut)
    while trainer.steps_done < 7:
        trainer.step()
    trainer.evaluate()
    trainer.best_val_loss = logged(tmp_path / "whole")[1]["val_loss"]
    trainer.save()
    train(dataclasses.replace(cut, resume=True, checkpoint_every=4))
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    assert any(name.endswith("c_attn.weight:momentum_buffer") for name in last(tmp_path / "cut").training())
    assert logged(tmp_path / "whole")[-1]["val_loss"] < logged(tmp_path / "whole")[1]["val_loss"]
    model = model_from(read_pretrained(str(tmp_path / "cut")), block_size=8)  # as other commands read it
    assert model.config.block_size == 8


def test_two_ranks_train_as_one_process_does(modern: Tiny, tmp_path: Path) -> None:
    common = {"dropout": 0.0, "max_steps": 4, "eval_tokens": 64, "batch_size": 8}
    one = train(modern(out_dir=tmp_path / "one", micro_batch_size=8, **common)).model.state_dict()
    several = modern(out_dir=tmp_path / "several", micro_batch_size=2, **common)

    def weights() -> dict[str, np.ndarray]:
        return {name: w.numpy() for name, w in train(several).model.state_dict().items()}

    first, second = each_rank(2, weights)
    for name, weight in one.items():
        assert np.array_equal(first[name], second[name]), name
        np.testing.assert_allclose(first[name], weight.numpy(), rtol=1e-3, atol=1e-5, err_msg=name)


def test_split_over_ranks_in_bf16_rotations_stay_fp32(tiny: Tiny) -> None:
    """FSDP rounds the tensors that a block is called with."""
    config = override(tiny(), {**MODERN, "dropout": 0.0, "vocab_size": 65}, source="test").model
    idx = torch.randint(65, (2, 16), generator=torch.Generator().manual_seed(0))

    def model() -> GPT:
        torch.manual_seed(0)
        return GPT(config)

    def dtypes() -> tuple[torch.dtype, torch.dtype, float]:
        with joined("cpu", 1) as world:
            network, seen = model(), []
            network.transformer.h[0].attn.register_forward_pre_hook(
                lambda _, args: seen.append((args[0].dtype, args[1].cos.dtype))
            )
            loss = arranged(network, world, "fsdp", "bf16")(idx, idx, return_logits=False)[1]
            loss.backward()
            return *seen[0], loss.item()

    expected = model()(idx, idx)[1].item()
    for x, cos, loss in each_rank(2, dtypes):
        assert (x, cos) == (torch.bfloat16, torch.float32)
        assert loss == pytest.approx(expected, rel=0.02)


def test_a_step_reads_nothing_back_from_the_device(modern: Tiny) -> None:
    trainer = start(modern())
    with Transfers() as transfers:
        trainer.step()
        trainer.step()
    assert transfers.count == 0


def test_a_run_goes_on_with_the_optimizer_it_began_with(modern: Tiny) -> None:
    config = modern(max_steps=2)
    train(config)
    with pytest.raises(InputError, match="has the state of optimizer = 'muon': resume with that"):
        train(dataclasses.replace(config, optimizer="adamw", resume=True))
    assert train(dataclasses.replace(config, resume=True, max_steps=3)).steps_done == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights": "bf16", "precision": "auto"},
            "weights = 'bf16': it must be fp32 with optimizer = 'muon'",
        ),
        ({"parallel": "fsdp"}, "parallel = 'fsdp': it must be ddp with optimizer = 'muon'"),
        ({"parallel": "zero1"}, "parallel = 'zero1': it must be ddp with optimizer = 'muon'"),
        ({"guard": "skip"}, "guard = 'skip': it must be off or warn with optimizer = 'muon'"),
        ({"recompute": "gelu"}, "recompute = 'gelu': it must be none or block, with relu2"),
    ],
)
def test_what_does_not_go_together_is_refused(modern: Tiny, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        modern(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer = 'sgd': it must be one of adamw, muon"),
        ({"muon_learning_rate": 0.0}, "muon_learning_rate = 0.0: it must be greater than 0"),
    ],
)
def test_bad_values_are_refused(tiny: Tiny, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**changes)


def test_checkpoints_from_before_the_option_resume(tiny: Tiny) -> None:
    config = tiny(max_steps=2)
    train(config)
    path = checkpoint.find(config.out_dir, "last")
    for name, gone in (("state.json", ["optimizer"]), ("config.json", ["position", "norm", "qk_norm"])):
        values = json.loads((path / name).read_text())
        for key in gone:
            del values[key]
        (path / name).write_text(json.dumps(values))
    (path / checkpoint.SUMS).unlink()
    checkpoint._write_sums(path)
    assert train(dataclasses.replace(config, resume=True, max_steps=3)).steps_done == 3
    assert torch.is_tensor(last(config.out_dir).model["transformer.wpe.weight"])
