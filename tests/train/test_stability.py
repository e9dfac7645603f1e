"""The guard against steps that stand out, and what is logged to watch a run by."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import each_rank
from runs import last, logged, start

from fastgpt import stability
from fastgpt.config import TrainConfig
from fastgpt.distributed import World
from fastgpt.errors import InputError, TrainingStopped
from fastgpt.metrics import read_metrics
from fastgpt.optim import AdamW
from fastgpt.stability import Guard
from fastgpt.train import Trainer, train

MUTANTS = {
    "fastgpt/stability.py": [
        ("cut = torch.where(full, torch.minimum(x, mean + self.config.guard_z * spread), x)", "cut = x"),
        ("z = torch.where(full, (x - mean) / spread, 0.0)", "z = (x - mean) / spread"),
        ("(z > self.config.guard_z)", "(z.abs() > self.config.guard_z)"),
        (" | ~finite).any()", ").any()"),
        (".any() & ~overflowed", ".any()"),
        ("dist.all_reduce(shared, dist.ReduceOp.MAX)", "pass"),
        ("(outlier | (stopped > 0)).float()", "outlier.float()"),
        ("entered = finite.all() & (stopped == 0)", "entered = finite.any()"),
        ("go_back(stopped - 1)", "go_back(stopped)"),
        ("if in_a_row >= MOST_IN_A_ROW", "if False"),
        ("self._window.copy_(window)", "pass"),
        ("self._counts.copy_(tensors", "self._counts.sub_(tensors"),
        ("logits.abs().max()", "logits.max()"),
        ('("ln_", "norm")', '("ln_1", "norm")'),
    ],
    "fastgpt/optim.py": [
        ("        if self.veto is not None:\n", "        if False:\n"),
        ("        optimizer.found_inf = found\n", "        pass\n"),
        (
            "return torch.maximum(found_inf.reshape(()), veto",
            "return torch.minimum(found_inf.reshape(()), veto",
        ),
    ],
}

Tiny = Callable[..., TrainConfig]
ONE = World(torch.device("cpu"))


def guarded(tiny: Tiny, **changes: Any) -> TrainConfig:
    return tiny(**{"guard": "skip", "guard_window": 4, **changes})


def judged(guard: Guard, loss: float, norm: float = 1.0) -> float:
    """Whether the guard leaves a step of that loss and norm out."""
    judge = guard.veto(1, torch.tensor(loss))
    assert judge is not None
    verdict = judge(torch.tensor(norm))
    return 0.0 if verdict is None else verdict.item()


def a_guard(tiny: Tiny, window: int = 8, **changes: Any) -> Guard:
    """That has seen a full window of losses near 3 and norms near 1."""
    guard = Guard(guarded(tiny, guard_window=window), ONE, **changes)
    for i in range(window):
        assert judged(guard, 3 + 0.02 * (-1) ** i, 1.1 ** (-1) ** i) == 0
    return guard


# -- what is an outlier --------------------------------------------------------------------------------------


def test_only_what_is_far_above_the_window_is_left_out(tiny: Tiny) -> None:
    """Loss: mean 3, standard deviation 0.02, floor 0.01; log norm: 0, log 1.1 = 0.095, 0.05."""
    far, log_far = 6 * 0.03, 6 * (math.log(1.1) + 0.05)
    cases = [
        ((3 + 0.99 * far, 1.0), 0.0),
        ((3 + 1.01 * far, 1.0), 1.0),
        ((3.0, math.exp(0.99 * log_far)), 0.0),
        ((3.0, math.exp(1.01 * log_far)), 1.0),
        ((0.1, 1e-6), 0.0),  # far below
        ((math.nan, 1.0), 1.0),
        ((math.inf, 1.0), 1.0),
        ((3.0, math.nan), 1.0),
        ((3.0, math.inf), 1.0),
    ]
    for (loss, norm), expected in cases:
        assert judged(a_guard(tiny), loss, norm) == expected, (loss, norm)


def test_nothing_is_judged_before_the_window_is_full_but_what_is_not_finite(tiny: Tiny) -> None:
    guard = Guard(guarded(tiny, guard_window=8), ONE)
    assert [judged(guard, loss) for loss in (11, 11, 900, 7, math.nan, 6)] == [0, 0, 0, 0, 1, 0]


def test_a_fast_descent_is_not_an_outlier(tiny: Tiny) -> None:
    guard = Guard(guarded(tiny, guard_window=8), ONE)
    assert not any(judged(guard, 2 + 9 * 0.9**i, 20 * 0.9**i + 0.3) for i in range(100))


def test_one_outlier_does_not_hide_the_next_and_a_new_level_is_accepted(tiny: Tiny) -> None:
    guard = a_guard(tiny, window=16)
    assert [judged(guard, loss) for loss in (1e6, 3.0, 50.0, 3.01)] == [1, 0, 1, 0]
    verdicts = [judged(guard, 4.5) for _ in range(16)]
    assert verdicts[0] == 1
    assert verdicts[-1] == 0


def test_an_overflow_that_the_scaler_handles_is_no_outlier(tiny: Tiny) -> None:
    guard = a_guard(tiny, scaled=True)
    assert judged(guard, 3.0, math.inf) == 0
    assert judged(guard, math.nan, math.inf) == 1


# -- what is done about it -----------------------------------------------------------------------------------

KINDS = {
    "torch": {},
    "fp16": {"precision": "fp16"},
    "own": {"weights": "bf16", "precision": "auto"},
}


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, factor: float = 8.0) -> None:
    """Multiply the losses, and so the gradients, of these steps, counted from 1."""
    original = Trainer.step

    def step(self: Trainer) -> Any:
        network = self.network
        if self.steps_done + 1 in steps:
            self.network = lambda *args, **options: (None, factor * network(*args, **options)[1])
        try:
            return original(self)
        finally:
            self.network = network

    monkeypatch.setattr(Trainer, "step", step)


def state(trainer: Trainer) -> list[torch.Tensor]:
    optimizer = [value for found in trainer.optimizer.state.values() for value in found.values()]
    return [tensor.detach().clone() for tensor in [*trainer.model.parameters(), *optimizer]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("factor", [8.0, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_left_out_changes_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kind: str, factor: float
) -> None:
    """Neither weights nor moments nor the optimizer's count of steps, by each optimizer and with a scaler."""
    spoil(monkeypatch, 7, factor=factor)
    trainer = start(guarded(tiny, **KINDS[kind]))
    assert isinstance(trainer.optimizer, AdamW) == (kind == "own")
    for _ in range(6):
        trainer.step()
    before = state(trainer)
    trainer.step()
    assert same(before, state(trainer))
    trainer.step()
    assert not same(before, state(trainer))
    trainer.check()
    assert trainer.guard.row()["outliers"] == 1
    assert trainer.guard.tensors()["guard:window"].isfinite().all()


def test_a_quiet_guard_changes_nothing(tiny: Tiny) -> None:
    trainers = [start(tiny(guard=action, guard_window=2, guard_z=1e3)) for action in ("off", "skip")]
    for trainer in trainers:
        torch.manual_seed(0)
        for _ in range(4):
            trainer.step()
    assert same(*map(state, trainers))


def test_a_warning_is_printed_and_the_step_done(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 7)
    trainer = train(guarded(tiny, guard="warn"))
    assert "step      8   guard: 1 outlier done all the same, 1 in all" in capsys.readouterr().out
    steps = {value["step"].item() for value in trainer.optimizer.state.values()}
    assert steps == {12.0}
    rows = {row["step"]: row for row in read_metrics(trainer.out_dir)}
    assert [rows[step]["outliers"] for step in (6, 8, 12)] == [0, 1, 1]
    assert rows[8]["loss_z"] is not None
    assert rows[8]["grad_norm_z"] is not None


def test_stopping_goes_back_to_before_the_outlier(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after it, until the host looks, are not done either; resumed with skip the run goes on."""
    spoil(monkeypatch, 7)
    config = guarded(tiny, guard="stop", log_every=6, eval_every=6, checkpoint_every=6)
    plain = start(dataclasses.replace(config, guard="off"))
    for _ in range(6):
        plain.step()
    with pytest.raises(TrainingStopped, match=r"step 7: loss \d+.*step-000006 is the state before it"):
        train(config)
    assert config.out_dir is not None
    saved = last(config.out_dir)
    assert saved.state["step"] == 6
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(saved.model[name], weight)
    trainer = train(dataclasses.replace(config, resume=True, guard="skip"))
    assert trainer.guard.row()["outliers"] == 1
    assert {value["step"].item() for value in trainer.optimizer.state.values()} == {11.0}


def test_stopping_between_checkpoints_writes_one(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 8)
    config = guarded(tiny, guard="stop", log_every=5, eval_every=100, checkpoint_every=100)
    with pytest.raises(TrainingStopped, match="step-000007 is the state before it"):
        train(config)
    assert config.out_dir is not None
    assert {int(v) for k, v in last(config.out_dir).training().items() if k.endswith(":step")} == {7}


def test_weights_that_are_beyond_help_stop_a_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "MOST_IN_A_ROW", 4)
    spoil(monkeypatch, *range(6, 13), factor=math.nan)
    with pytest.raises(TrainingStopped, match="step 10: loss nan.*left out 5 steps in a row"):
        train(guarded(tiny))


def test_resuming_judges_as_an_uninterrupted_run_does(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after step 7; step 9 is an outlier only for a guard that remembers."""
    spoil(monkeypatch, 6, 9)
    whole = guarded(tiny, out_dir=tmp_path / "whole", guard_window=5)
    train(whole)
    assert read_metrics(tmp_path / "whole")[-1]["outliers"] == 2
    cut = dataclasses.replace(whole, out_dir=tmp_path / "cut")
    trainer = start(cut)
    while trainer.steps_done < 7:
        trainer.step()
    trainer.save()
    train(dataclasses.replace(cut, resume=True))
    assert_same_guard(tmp_path / "whole", tmp_path / "cut")
    longer = dataclasses.replace(cut, resume=True, max_steps=14, guard_window=3)
    assert train(longer).guard.row()["outliers"] == 0  # another window begins anew


def assert_same_guard(run: Path, other: Path) -> None:
    assert_same_state_but_for_losses(run, other)
    resumed = {row["step"]: row for row in logged(other)}
    assert all(resumed[row["step"]] == row for row in logged(run) if row["step"] > 7)


def assert_same_state_but_for_losses(run: Path, other: Path) -> None:
    a, b = last(run).training(), last(other).training()
    assert a.keys() == b.keys()
    assert "guard:window" in a
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_ranks_leave_a_step_out_together(tiny: Tiny, layout: str) -> None:
    """Step 5 is bad for both ranks, step 6 for one. Split parameters are updated by PyTorch's AdamW."""

    common = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 7, "sample_tokens": 0}
    config = guarded(tiny, parallel=layout, **common)

    def run() -> list[bool]:
        judge = Guard._judge
        moved: list[bool] = []

        def one_sees_more(self: Guard, number: int, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
            alone = number == 6 and self.world.rank == 1
            return judge(self, number, loss * math.nan if alone else loss, norm)

        def watched(self: Trainer) -> Any:
            before = [local(p).detach().clone() for p in self.model.parameters()]
            found = step(self)
            moved.append(not same(before, [local(p) for p in self.model.parameters()]))
            return found

        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, 5)
            step = Trainer.step
            patch.setattr(Trainer, "step", watched)
            patch.setattr(Guard, "_judge", one_sees_more)
            train(config)
        return moved

    assert each_rank(2, run) == [[True, True, True, True, False, False, True]] * 2


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# -- what grows ----------------------------------------------------------------------------------------------


def test_logits_and_gradients_are_logged_at_evaluations(tiny: Tiny) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    norms: list[dict[str, float]] = []
    parts = {"attention": ".attn.", "mlp": ".mlp.", "norm": "ln_", "embedding": ".wte.", "all": ""}
    trainer = start(tiny(grad_clip=0.0, model=dataclasses.replace(tiny().model, dropout=0.0)))

    def watch(*_: Any) -> None:
        grads = {name: p.grad for name, p in trainer.model.named_parameters()}
        pair = [grads.pop(f"transformer.{name}.weight").flatten() for name in ("wte", "wpe")]
        grads["transformer.wte."] = torch.cat(pair)
        norms.append(
            {
                group: torch.cat([g.flatten() for name, g in grads.items() if part in name]).norm().item()
                for group, part in parts.items()
            }
        )

    trainer.optimizer.register_step_pre_hook(watch)
    trainer.run()
    rows = {row["step"]: row for row in read_metrics(trainer.out_dir)}
    groups = [f"grad_norm_{group}" for group in stability.GROUPS]
    for step in (4, 8, 12):
        for group in stability.GROUPS:
            assert rows[step][f"grad_norm_{group}"] == pytest.approx(norms[step - 1][group], rel=1e-5)
        assert rows[step]["grad_norm"] == pytest.approx(norms[step - 1]["all"], rel=1e-5)
    assert all(rows[2][name] is None for name in [*groups, "max_logit", "log_sum_exp"])
    windows = torch.cat([torch.from_numpy(x) for x, _ in trainer.growth._windows.batches(1)])
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(windows)[0]
    assert rows[12]["max_logit"] == pytest.approx(logits.abs().max().item(), rel=1e-5)
    assert rows[12]["log_sum_exp"] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)
    with torch.no_grad():
        for p in trainer.model.transformer.ln_f.parameters():
            p.neg_()  # and so all logits: the largest of them is the most negative now
    assert trainer.growth.row(contextlib.nullcontext())["max_logit"] == pytest.approx(rows[12]["max_logit"])
    events = EventAccumulator(str(trainer.out_dir / "tensorboard"))
    events.Reload()
    assert {"max_logit", "log_sum_exp", *groups} <= set(events.Tags()["scalars"])


def test_bad_settings(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="guard = 'halt': it must be one of off, warn, skip, stop"):
        tiny(guard="halt")
    with pytest.raises(InputError, match="guard_window = 1: it must be at least 2"):
        tiny(guard_window=1)
    with pytest.raises(InputError, match="guard_z = 0: it must be greater than 0"):
        tiny(guard_z=0)
