"""Whole runs: what they leave behind, resuming to the bit, interruption, and numbers that go wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_state, command, last, logged, start, wait_for_checkpoint

from fastgpt import checkpoint
from fastgpt.config import TrainConfig
from fastgpt.data import TokenDataset, prepared
from fastgpt.errors import InputError, TrainingStopped
from fastgpt.metrics import KEYS, read_metrics
from fastgpt.train import Trainer, open_data, train

MUTANTS = {
    "fastgpt/train.py": [
        ("(summed / tokens).backward()", "(summed / (y.size * len(micro_batches))).backward()"),
        ("runtime.set_rng_state(mine, self.device)", "pass"),
        ('self.scaler.load_state_dict(saved.state["scaler"])', "pass"),
        ("self.loader.micro_batches(step, ", "self.loader.micro_batches(0, "),
        ("        self.check()\n        generators", "        generators"),
        ("self.val_loss = self._sample = None", "self.val_loss = None"),
        ("self.val_loss is not None and self.config.sample_tokens", "self.val_loss is not None"),
        ("        if self._sample is None:", "        if True:"),
        ("seed=config.seed, graph=False", "seed=config.seed"),
    ],
    "fastgpt/metrics.py": [('if row["step"] <= first_step', "if True")],
    "fastgpt/evaluate.py": [("    model.eval()\n", "")],
}

Tiny = Callable[..., TrainConfig]


def test_a_run_leaves_its_record(tiny: Tiny) -> None:
    config = tiny()
    train(config)
    run = config.out_dir
    assert run is not None
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(tuple(row) == KEYS for row in rows)
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [4, 8, 12]
    assert rows[-1]["tokens"] == 12 * 6 * 16
    assert rows[-1]["val_loss"] < rows[1]["val_loss"] < math.log(40)
    assert all(row["mfu"] is None for row in rows)  # a CPU's peak is unknown
    assert all(row["tokens_per_s"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((run / "config.json").read_text())
    assert saved["model"]["vocab_size"] == last(run).tokenizer.vocab_size
    assert saved["seed"] == 1337
    record = json.loads((run / "environment.json").read_text())
    assert {"torch", "git", "python", "device", "command"} <= record.keys()
    state = last(run).state
    assert state["step"] == 12
    assert state["val_loss"] == rows[-1]["val_loss"]
    assert_tensorboard_holds(run)


def assert_tensorboard_holds(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("val_loss")] == [4, 8, 12]
    assert "sample/text_summary" in events.Tags()["tensors"]


def test_the_same_seed_gives_the_same_run_and_another_does_not(tiny: Tiny, tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train(tiny(out_dir=tmp_path / name, seed=seed))
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    assert_same_state(tmp_path / "a", tmp_path / "b")
    assert logged(tmp_path / "a") != logged(tmp_path / "c")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resuming_is_bit_exact(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    """With dropout on and accumulation; the run is cut between two log lines, after step 7 of 12."""
    whole = tiny(out_dir=tmp_path / "whole", precision=precision)
    train(whole)
    cut = dataclasses.replace(whole, out_dir=tmp_path / "cut", checkpoint_every=7)
    trainer = start(cut)
    while trainer.steps_done < 7:
        trainer.step()
        if trainer.steps_done == 4:  # evaluating and sampling draw no random numbers that training would
            trainer.evaluate()
            trainer.sample()
            trainer.best_val_loss = trainer.val_loss or 0.0
    trainer.save()
    train(dataclasses.replace(cut, resume=True, checkpoint_every=4))
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    resumed = {row["step"]: row for row in logged(tmp_path / "cut")}
    assert all(resumed[row["step"]] == row for row in logged(tmp_path / "whole") if row["step"] > 7)


def test_metrics_after_the_last_checkpoint_are_dropped_when_resuming(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(out_dir=tmp_path / "whole"))
    config = tiny(out_dir=tmp_path / "cut")
    train(config)
    for path in checkpoint.checkpoints(tmp_path / "cut"):
        if path.name > "step-000008":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "tra')  # a line that the kill cut short
    train(dataclasses.replace(config, resume=True))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert_same_state(tmp_path / "whole", tmp_path / "cut")


def test_resuming_a_finished_run_with_more_steps(tiny: Tiny) -> None:
    config = tiny(max_steps=4, schedule="constant")
    train(config)
    train(dataclasses.replace(config, resume=True))  # nothing left to do
    trainer = train(dataclasses.replace(config, resume=True, max_steps=8))
    assert trainer.steps_done == 8
    assert [row["step"] for row in read_metrics(trainer.out_dir)] == [2, 4, 6, 8]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5, None])
def test_micro_batches_do_not_change_the_gradient(tiny: Tiny, micro_batch_size: int | None) -> None:
    """Sums over all tokens of the batch: equal to one large batch up to rounding, for uneven splits too."""
    model = dataclasses.replace(tiny().model, dropout=0.0)
    whole = start(tiny(model=model, micro_batch_size=6))
    split = start(tiny(model=model, micro_batch_size=micro_batch_size))
    for _ in range(3):
        expected, got = whole.step(), split.step()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_accumulation_weighs_by_tokens_not_by_micro_batch(tiny: Tiny) -> None:
    """With most targets of one micro-batch ignored, the loss is still the mean over counted tokens."""
    trainer = start(tiny(model=dataclasses.replace(tiny().model, dropout=0.0), micro_batch_size=3))
    batches = trainer.loader.micro_batches(0, 3)
    batches[0][1][:, 2:] = -100
    trainer.loader.micro_batches = lambda *_: batches  # type: ignore[method-assign]
    x, y = (torch.cat([torch.from_numpy(pair[i]) for pair in batches]) for i in (0, 1))
    expected = trainer.model(x, y)[1]
    loss, _ = trainer.step()
    torch.testing.assert_close(loss, expected)


def test_each_step_trains_on_its_own_batch(tiny: Tiny) -> None:
    trainer = start(tiny())
    seen: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for step in range(3):
        seen.clear()
        trainer.step()
        assert torch.equal(torch.cat(seen), torch.from_numpy(trainer.loader.batch(step)[0]))


def test_evaluating_and_sampling_do_not_disturb_training(tiny: Tiny) -> None:
    trainer = start(tiny(model=dataclasses.replace(tiny().model, dropout=0.5)))
    trainer.model.train()
    before = torch.get_rng_state()
    assert trainer.evaluate() == trainer.evaluate()  # without dropout
    first, trainer._sample = trainer.sample(), None
    assert trainer.sample() == first
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in trainer.model.modules())
    assert all(p.grad is None for p in trainer.model.parameters())


def test_sampling_captures_no_cuda_graph(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a capture would be an error."""
    monkeypatch.setattr("fastgpt.generate.can_capture", lambda device: True)
    assert start(tiny()).sample()


def test_a_sample_is_generated_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """For TensorBoard and for whoever asks afterwards; again for other weights."""
    made: list[int] = []

    def sample_text(*arguments: Any, **options: Any) -> str:
        made.append(len(made))
        return f"sample {len(made)}"

    monkeypatch.setattr("fastgpt.train.sample_text", sample_text)
    config = tiny(max_steps=4, eval_every=2)
    trainer = train(config)
    assert trainer.sample() == "sample 2"
    assert len(made) == 2
    trainer.step()
    assert trainer.sample() == "sample 3"
    trainer.restore(last(trainer.out_dir))
    assert trainer.sample() == "sample 4"


def test_no_sample_where_none_is_wanted(tiny: Tiny) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tiny(max_steps=2, eval_every=2, sample_tokens=0))
    events = EventAccumulator(str(trainer.out_dir / "tensorboard"))
    events.Reload()
    assert events.Scalars("val_loss")
    assert not events.Tags()["tensors"]


def test_weight_decay_pulls_on_matrices_only(tiny: Tiny) -> None:
    trainer = start(tiny())
    decay, keep = trainer.optimizer.param_groups
    assert decay["weight_decay"] == 0.1
    assert keep["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decay["params"])
    assert all(p.dim() == 1 for p in keep["params"])
    assert len(decay["params"]) + len(keep["params"]) == len(list(trainer.model.parameters()))


def test_gradients_are_clipped_and_the_norm_before_it_reported(tiny: Tiny) -> None:
    def norm_of(optimizer: torch.optim.Optimizer) -> float:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        return torch.cat(gradients).norm().item()

    norms: list[float] = []
    steps: list[float] = []
    for clip in (0.0, 1e-3):
        trainer = start(tiny(grad_clip=clip, weight_decay=0.0))
        trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: steps.append(norm_of(optimizer)))
        norms.append(trainer.step()[1].item())
    assert norms[0] == norms[1] > 0.1
    assert steps[0] == pytest.approx(norms[0], rel=1e-5)
    assert steps[1] == pytest.approx(1e-3, rel=1e-3)


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(log_every=5, eval_every=100, checkpoint_every=5)
    original = Trainer.step

    def step(self: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
        if self.steps_done == 7:  # in the middle of a logging interval
            with torch.no_grad():
                self.model.token_embedding[0, 0] = math.nan
        return original(self)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(TrainingStopped, match=r"step 8: loss nan.*The last good checkpoint is .*step-000005"):
        train(config)
    assert config.out_dir is not None
    saved = last(config.out_dir)
    assert saved.state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in saved.model.values())


def test_a_nan_is_never_saved(tiny: Tiny) -> None:
    trainer = start(tiny())
    trainer.step()
    trainer.save()
    with torch.no_grad():
        trainer.model.token_embedding.fill_(math.nan)
    trainer.step()
    with pytest.raises(TrainingStopped, match="step 2: loss nan"):
        trainer.save()
    assert [path.name for path in checkpoint.checkpoints(trainer.out_dir)] == ["step-000001"]


def test_a_huge_learning_rate_is_stopped_too(tiny: Tiny) -> None:
    with pytest.raises(TrainingStopped, match=r"step \d+: .*learning-rate"):
        train(tiny(learning_rate=1e30, grad_clip=0.0, max_steps=40))


def test_initialising_from_a_run(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(out_dir=tmp_path / "first"))
    model = dataclasses.replace(tiny().model, block_size=8, dropout=0.3)
    config = tiny(out_dir=tmp_path / "second", init_from=str(tmp_path / "first"), model=model, max_steps=2)
    trainer = train(config)
    first = checkpoint.load(checkpoint.find(tmp_path / "first"))
    assert trainer.model.config.block_size == 8
    assert trainer.data.tokenizer == first.tokenizer
    moved = (
        trainer.model.state_dict()["transformer.wte.weight"] - first.model["transformer.wte.weight"]
    ).abs()
    assert 0 < moved.max() < 0.02  # two steps away from it


def test_initialising_from_another_shape_or_vocabulary(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(out_dir=tmp_path / "first"))
    wider = dataclasses.replace(tiny().model, n_layer=3, block_size=32)
    second = {"out_dir": tmp_path / "second", "init_from": str(tmp_path / "first")}
    with pytest.raises(
        InputError, match="n_layer = 2, block_size = 16, but this run has n_layer = 3, block_size = 32"
    ):
        train(tiny(model=wider, **second))
    other = tmp_path / "other.txt"
    other.write_text("ÄÖÜ " * 1000)
    with pytest.raises(InputError, match="Ä"):
        train(tiny(corpus=str(other), **second))
    tokens = prepared(str(other), "byte")
    with pytest.raises(InputError, match="another vocabulary"):
        train(tiny(corpus=str(tokens), **second))
    assert not (tmp_path / "second").exists()


def test_resuming_needs_the_same_data_and_shape(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text_file.read_text())
    config = tiny(corpus=str(own), max_steps=4)
    train(config)
    wider = dataclasses.replace(config.model, n_embd=64)
    with pytest.raises(InputError, match="n_embd = 32, but this run has n_embd = 64"):
        train(dataclasses.replace(config, resume=True, model=wider))
    shorter = dataclasses.replace(config.model, block_size=8)
    with pytest.raises(InputError, match="another shape"):
        train(dataclasses.replace(config, resume=True, model=shorter))
    own.write_text(text_file.read_text()[:15_000])
    with pytest.raises(InputError, match="not those that .* was trained on"):
        train(dataclasses.replace(config, resume=True))


def test_an_existing_run_is_not_overwritten(tiny: Tiny) -> None:
    train(tiny(max_steps=1))
    with pytest.raises(InputError, match="already holds a run: add --resume"):
        train(tiny(max_steps=1))


def test_bad_input_is_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match="shorter than a window"):
        train(tiny(corpus=str(short)))
    with pytest.raises(InputError, match="'€'"):
        train(tiny(sample_prompt="€"))
    with pytest.raises(InputError, match="vocab_size = 99.*leave vocab_size out"):
        train(tiny(model=dataclasses.replace(tiny().model, vocab_size=99)))
    with pytest.raises(InputError, match="tf32 needs an NVIDIA GPU"):
        train(tiny(precision="tf32"))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="finds no usable CUDA GPU"):
            train(tiny(device="cuda"))
    with pytest.raises(InputError, match="unknown device 'tpuu'"):
        train(tiny(device="tpuu"))
    assert not (tmp_path / "run").exists()


def test_compiled_training_gives_the_same_losses(tiny: Tiny, tmp_path: Path) -> None:
    model = dataclasses.replace(tiny().model, dropout=0.0)
    for compile in (False, True):
        train(
            tiny(
                model=model, out_dir=tmp_path / str(compile), compile=compile, max_steps=6, micro_batch_size=6
            )
        )
    eager, compiled = (logged(tmp_path / name) for name in ("False", "True"))
    for a, b in zip(eager, compiled, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["val_loss"] == (None if b["val_loss"] is None else pytest.approx(b["val_loss"], rel=1e-4))


def test_an_unreachable_corpus_falls_back_only_when_told_to(
    tiny: Tiny, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastgpt.data import DownloadError

    def offline(name: str, *args: Any, **options: Any) -> Path:
        if name == "shakespeare":
            raise DownloadError("could not download shakespeare.")
        return prepared(name, *args, **options)

    monkeypatch.setattr("fastgpt.data.dataset.prepared", offline)
    with pytest.raises(DownloadError):
        open_data(tiny(corpus="shakespeare"), None)
    data, config = open_data(tiny(corpus="shakespeare", fallback_corpus=str(text_file)), None)
    assert isinstance(data, TokenDataset)
    assert config.corpus == str(text_file)  # and so the run's record and --resume name what was used
    assert capsys.readouterr().out.count("\n") == 1


# -- real processes and signals ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_writes_a_checkpoint_and_exits_cleanly(tiny: Tiny, number: signal.Signals) -> None:
    config = tiny()
    assert config.out_dir is not None
    process = subprocess.Popen(
        command(config, "--max-steps", "1000000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_checkpoint(config.out_dir, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    step = last(config.out_dir).state["step"]
    assert f"interrupted after step {step}" in out
    assert f"--resume --out-dir {config.out_dir}" in out


def test_a_killed_run_resumes_to_the_same_end(tiny: Tiny, tmp_path: Path) -> None:
    whole, killed = tiny(out_dir=tmp_path / "whole"), tiny(out_dir=tmp_path / "killed")
    subprocess.run(command(whole, "--max-steps", "60"), check=True, capture_output=True)
    process = subprocess.Popen(
        command(killed, "--max-steps", "60"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert killed.out_dir is not None
    wait_for_checkpoint(killed.out_dir, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    resume = [sys.executable, "-m", "fastgpt", "train", "--resume", "--out-dir", str(killed.out_dir)]
    subprocess.run(resume, check=True, capture_output=True)
    assert_same_state(tmp_path / "whole", tmp_path / "killed")
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
