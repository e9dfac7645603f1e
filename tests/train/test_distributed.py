"""Several processes train one network: the same losses and weights as one, and stop and resume together."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import each_rank, outcomes, pid_of_rank
from runs import assert_same_state, command, last, logged, wait_for_checkpoint

from fastgpt import runtime
from fastgpt.config import TrainConfig
from fastgpt.data import Batch
from fastgpt.distributed import Vote, joined
from fastgpt.errors import InputError
from fastgpt.train import Trainer, train

MUTANTS = {
    "fastgpt/distributed.py": [
        ("            value /= self.size\n", ""),
        ("        return yes\n", "        return mine\n"),
        ("    network(idx, idx, return_logits=False)[1].backward()\n", ""),
    ],
    "fastgpt/train.py": [
        ("        self.world.mean(loss)\n", ""),
        ("not stop(interrupted())", "not interrupted()"),
        ("tokens = self.world.mean(torch.full(", "tokens = (torch.full("),
        ("            runtime.set_rng_state(mine, self.device)\n", "            pass\n"),
        ("validation.share(*self.share)", "validation.share(0, self.world.size)"),
    ],
    "fastgpt/runtime.py": [("        if shared:\n", "        if False:\n")],
}

Tiny = Callable[..., TrainConfig]


def trained(config: TrainConfig) -> tuple[dict[str, np.ndarray], list[int]]:
    """The final weights of this rank, and the rows that its first step read (their hashes)."""
    seen: list[int] = []
    original = Trainer._micro_batches

    def uneven(self: Trainer, step: int) -> list[Batch]:
        """Ranks and micro-batches that count different numbers of tokens."""
        batches = original(self, step)
        for x, y in batches:
            if step == 0:
                seen.extend(hash(row.tobytes()) for row in x)
            y[x % 3 == 0] = -100
        return batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_micro_batches", uneven)
        trainer = train(config)
    return {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()}, seen


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_train_as_one_process_does(tiny: Tiny, tmp_path: Path, size: int) -> None:
    """Uneven accumulation (2 ranks: 4 and 2 rows; 4 ranks: 2 and 1), and ranks with fewer targets."""
    model = dataclasses.replace(tiny().model, dropout=0.0)
    common = {"model": model, "max_steps": 6, "eval_every": 3, "eval_tokens": 16 * 5, "batch_size": 12}
    weights, rows = trained(tiny(out_dir=tmp_path / "one", micro_batch_size=12, **common))
    several = tiny(out_dir=tmp_path / "several", micro_batch_size=8 // size, **common)
    ranks = each_rank(size, lambda: trained(several))
    for own, _ in ranks:
        for name, weight in own.items():
            assert np.array_equal(weight, ranks[0][0][name]), name
            expected = weights[name]
            if name.endswith("c_attn.bias"):  # whose middle, of the keys, has gradients of rounding alone,
                weight, expected = (np.delete(b, np.s_[32:64]) for b in (weight, expected))  # which AdamW
            np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)  # turns into whole steps
    shared = [row for _, seen in ranks for row in seen]
    assert len(rows) == len(set(rows)) == 12
    assert sorted(shared) == sorted(rows)  # each row of the batch once, by one rank
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "several"), strict=True):
        assert a == {
            key: value if value is None else pytest.approx(value, rel=1e-5) for key, value in b.items()
        }
    assert len(list((tmp_path / "several" / "tensorboard").iterdir())) == 1  # rank 0 alone writes


def test_resuming_is_bit_exact_for_each_number_of_ranks(tiny: Tiny, tmp_path: Path) -> None:
    """With dropout, which every rank draws for itself; 4 ranks add gradients in an order that matters."""
    whole = tiny(out_dir=tmp_path / "whole", batch_size=8, micro_batch_size=1, max_steps=6)
    cut = dataclasses.replace(whole, out_dir=tmp_path / "cut")

    def interrupted() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "run", interrupted_after(2))
            return train(cut).steps_done

    each_rank(4, lambda: train(whole).steps_done)
    assert each_rank(4, interrupted) == [4] * 4
    each_rank(4, lambda: train(dataclasses.replace(cut, resume=True)).steps_done)
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    generators = [
        tensor for name, tensor in last(tmp_path / "cut").training().items() if name.startswith("rng:")
    ]
    assert len({tuple(state.tolist()) for state in generators}) == 4


def interrupted_after(step: int, rank: int | None = None, number: int = signal.SIGTERM) -> Callable[..., Any]:
    """`Trainer.run` of a process (of that rank; of all) that gets a signal before its step after `step`."""
    run, advance = Trainer.run, Trainer.step

    def step_or_signal(self: Trainer) -> Any:
        if self.steps_done == step and rank in (None, self.world.rank):
            os.kill(os.getpid(), number)
        return advance(self)

    def patched(self: Trainer) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", step_or_signal)
            return run(self)

    return patched


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tiny: Tiny, tmp_path: Path) -> None:
    def interrupted() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "run", interrupted_after(3, rank=1))
            return train(tiny(max_steps=1000, eval_every=1000, checkpoint_every=1000)).steps_done

    steps = each_rank(2, interrupted)
    assert steps == [5, 5]  # voted after step 4, agreed after step 5
    assert last(tmp_path / "run").state["step"] == 5


def test_a_killed_rank_stops_the_others_with_a_clear_message(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out_dir=tmp_path / "killed", max_steps=8, checkpoint_every=2)

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "run", interrupted_after(5, rank=1, number=signal.SIGKILL))
            train(config)

    (ended, message), dead = outcomes(2, killed)
    assert dead == (False, None)
    assert not ended
    assert message.startswith("TrainingStopped: rank 0 of 2 lost the others: one of them died")
    assert "--resume continues from the last checkpoint" in message
    assert last(tmp_path / "killed").state["step"] == 4
    whole = dataclasses.replace(config, out_dir=tmp_path / "whole")

    each_rank(2, lambda: train(dataclasses.replace(config, resume=True)).steps_done)
    each_rank(2, lambda: train(whole).steps_done)
    assert_same_state(tmp_path / "whole", tmp_path / "killed")


def test_another_number_of_ranks_resumes_too(tiny: Tiny) -> None:
    config = tiny(max_steps=2)
    each_rank(2, lambda: train(config).steps_done)
    train(dataclasses.replace(config, resume=True, max_steps=4))
    longer = dataclasses.replace(config, resume=True, max_steps=6)
    assert each_rank(2, lambda: train(longer).steps_done) == [6, 6]  # rank 1 draws dropout anew


def test_an_overflow_on_one_rank_is_skipped_by_all() -> None:
    def step() -> tuple[float, float]:
        with joined("cpu", 1) as world:
            weight = torch.nn.Parameter(torch.ones(3))
            optimizer = torch.optim.SGD([weight], lr=1.0)
            scaler = runtime.resolve_precision("fp16", world.device).scaler(shared=True)
            scaler.scale(weight.sum() * (torch.inf if world.rank == 1 else 1.0)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            return weight.sum().item(), scaler.get_scale()

    assert each_rank(2, step) == [(3.0, 2.0**15)] * 2


def test_a_vote_is_answered_one_call_later() -> None:
    def votes() -> list[bool]:
        with joined("cpu", 1) as world:
            vote = Vote(world)
            return [vote(mine) for mine in (False, world.rank == 1, False, False)]

    assert each_rank(2, votes) == [[False, False, True, False]] * 2


def test_the_first_rank_of_each_machine_goes_first(tmp_path: Path) -> None:
    """Two machines of two processes; the file that the first writes is there for the second."""

    def found() -> bool:
        with joined("cpu", 1) as world:
            path = tmp_path / str(world.rank // 2)
            with world.one_first():
                there = path.exists()
                if world.local_rank == 0:
                    time.sleep(0.2)
                    path.touch()
            return there

    assert each_rank(4, found, local_size=2) == [False, True, False, True]


def test_setups_that_cannot_work_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but RANK and LOCAL_RANK are not both set: start"):
        train(tiny())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="'cuda:0' is one for all 2 processes: use --device cuda"):
        train(tiny(device="cuda:0"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="'cuda:1': this machine has 1 CUDA GPU"):
        train(tiny(device="cuda"))


def test_a_batch_that_ranks_cannot_share_is_refused(tiny: Tiny) -> None:
    for ended, message in outcomes(4, lambda: train(tiny())):
        assert not ended
        assert "InputError: batch_size 6 is not a multiple of the 4 processes: use 8" in message


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="reads /proc to find the process of a rank"
)
def test_torchrun_starts_a_killed_run_again_where_it_was(tiny: Tiny, tmp_path: Path) -> None:
    """The command line as it is used: rank 0 alone speaks, and --max-restarts needs no --resume."""
    killed, whole = tiny(out_dir=tmp_path / "killed"), tiny(out_dir=tmp_path / "whole")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--standalone", "-m"]
    arguments = command(killed, "--max-steps", "40")[2:]  # after `python -m`
    # PyTorch 2.14's workers would find the addresses of those before them in the store that is shared else.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*torchrun, *arguments], **pipes, text=True, env=environment)
    assert killed.out_dir is not None
    wait_for_checkpoint(killed.out_dir, process)
    os.kill(pid_of_rank(1, process.pid), signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "rank 0 of 2 lost the others" in err
    assert out.count("best checkpoint:") == 1
    assert "2 processes on cpu" in out
    whole_command = command(whole, "--max-steps", "40")[2:]
    subprocess.run([*torchrun, *whole_command], check=True, capture_output=True)
    assert_same_state(tmp_path / "whole", tmp_path / "killed")
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
