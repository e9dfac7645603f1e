"""`fastgpt bench modern`: what it trains, that it goes on where it was, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastgpt.benchmarks import modern
from fastgpt.benchmarks.modern import BASELINE, FIELDS, VARIANTS, ModernArgs, rates, run_modern, table
from fastgpt.benchmarks.study import read_rows
from fastgpt.cli import main
from fastgpt.config import TrainConfig, override, preset
from fastgpt.errors import InputError, TrainingStopped
from fastgpt.train import Trainer

MUTANTS = {
    "fastgpt/benchmarks/modern.py": [
        ("if _key(key) not in done:", "if True:"),
        ("text[: int(len(text) * share)]", "text"),
        ('float(run["loss"]) - base[run["seed"]]', 'float(run["loss"])'),
        ("if trainer.steps_done < config.max_steps:", "if False:"),
        ("if [row[name] for name in same] == asked]", "]"),
    ],
    "fastgpt/benchmarks/study.py": [("eval_tokens=None,", "")],
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """What would be trained; its loss is the learning rate times 100, plus a thousandth of the seed."""
    seen: list[TrainConfig] = []

    def run(config: TrainConfig, times: bool) -> dict[str, Any]:
        seen.append(config)
        rate = config.muon_learning_rate if config.optimizer == "muon" else config.learning_rate
        loss = 100 * (rate or config.learning_rate) + config.seed / 1000
        found = {"parameters": 1000, "mflops_per_token": 1.5, "loss": round(loss, 4)}
        return found | {"ms_per_step": 7.0 if times else None}

    monkeypatch.setattr(modern, "_run", run)
    return seen


def test_each_variant_is_the_baseline_with_one_change() -> None:
    base = preset("char-cpu")
    singles = {name: changes for name, (start, changes) in VARIANTS.items() if start == "char-cpu"}
    together: dict[str, Any] = {}
    for name, changes in singles.items():
        assert override(base, changes, source=name) != base or name == BASELINE
        if name != "SwiGLU":  # of the two activations, `all` has the other
            together |= changes
    assert override(base, together, source="all") == preset("modern-cpu")


def test_seed_by_seed_and_never_twice(
    runs: list[TrainConfig], tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--corpus", str(text_file), "--out", str(tmp_path / "new" / "modern.csv"), "--steps", "7"]
    options += ["--variants", BASELINE, "RoPE", "--no-times"]
    assert main(["bench", "modern", *options, "--seeds", "1"]) == 0
    assert main(["bench", "modern", *options, "--seeds", "1", "2"]) == 0
    assert [(run.seed, run.model.position) for run in runs] == [
        *((1, "learned"), (1, "rope")),
        *((2, "learned"), (2, "rope")),
    ]
    assert all(run.max_steps == run.eval_every == 7 and run.eval_tokens is None for run in runs)
    assert len(read_rows(tmp_path / "new" / "modern.csv", FIELDS)) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"| {BASELINE} | 1,000 | 1.5 | 0.402 | 0.001 |  |  |"
    assert lines[-1] == "| RoPE | 1,000 | 1.5 | 0.402 | 0.001 | +0.000 ± 0.000 |  |"


def test_learning_rates_are_compared_on_the_training_split(
    runs: list[TrainConfig],
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts: list[str] = []
    run = modern._run

    def reading(config: TrainConfig, times: bool) -> dict[str, Any]:
        texts.append(Path(config.corpus).read_text())
        return run(config, times)

    monkeypatch.setattr(modern, "_run", reading)
    out = tmp_path / "modern.csv"
    given = ModernArgs(text_file, out, variants=(BASELINE, "Muon"), seeds=(1,), tune=(1e-3, 2e-3))
    run_modern(given)
    text = text_file.read_text()
    assert set(texts) == {text[: int(len(text) * 0.9)]}
    assert [(r.learning_rate, r.muon_learning_rate) for r in runs[:2]] == [(1e-3, None), (2e-3, None)]
    tuned = {r.muon_learning_rate for r in runs[2:]}
    assert tuned == {1e-3, 2e-3}
    assert {r.learning_rate for r in runs[2:]} == {preset("char-cpu").learning_rate}
    run_modern(ModernArgs(text_file, out, variants=(BASELINE,), seeds=(1,)))
    assert capsys.readouterr().out.splitlines()[-1] == f"| {BASELINE} | 1,000 | 1.5 | 0.401 |  |  | 7 |"
    rows = read_rows(out, FIELDS)
    assert [row["split"] for row in rows] == ["held out of training"] * 4 + ["validation"]
    assert rates(rows).splitlines()[-2] == "| Muon | 0.004 | 0.002 | 1 | 0.201 |"


def test_the_table_compares_seed_by_seed() -> None:
    common = {"parameters": "10", "mflops_per_token": "1", "ms_per_step": "5"}
    losses = {BASELINE: (1.0, 2.0), "RoPE": (0.9, 1.7), "Muon": (0.5,)}
    rows = [
        {"variant": variant, "seed": str(seed), "loss": str(loss), **common}
        for variant, found in losses.items()
        for seed, loss in enumerate(found)
    ]
    assert table(rows).splitlines()[2:] == [
        f"| {BASELINE} | 10 | 1 | 1.500 | 0.707 |  | 5 |",
        "| RoPE | 10 | 1 | 1.300 | 0.566 | -0.200 ± 0.141 | 5 |",
        "| Muon | 10 | 1 | 0.500 |  | -0.500 | 5 |",
    ]


def test_a_real_run_and_its_interruption(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "modern.csv"
    given = ModernArgs(text_file, out, variants=("all, SwiGLU",), seeds=(1,), steps=1)
    run_modern(given)
    (row,) = read_rows(out, FIELDS)
    assert 3 < float(row["loss"]) < 5
    assert float(row["ms_per_step"]) > 0
    assert int(row["parameters"]) > 800_000
    monkeypatch.setattr(Trainer, "run", lambda self: None)  # as after a signal
    with pytest.raises(TrainingStopped, match="the same command goes on"):
        run_modern(ModernArgs(text_file, out, variants=(BASELINE,), seeds=(1,), steps=1))
    assert len(read_rows(out, FIELDS)) == 1


def test_bad_options_are_refused(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(InputError, match="no variant 'rope': choose from baseline, no biases, RoPE"):
        run_modern(ModernArgs(text_file, tmp_path / "x.csv", variants=("rope",)))
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="has other columns"):
        run_modern(ModernArgs(text_file, tmp_path / "x.csv"))
