"""`fastgpt bench finetune`: what its two arms train, that none runs twice, its table and figure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from texts import pseudo_text

from fastgpt.benchmarks import finetune
from fastgpt.benchmarks.finetune import FIELDS, PRETRAINED, SCRATCH, FinetuneArgs, run_finetune, table
from fastgpt.benchmarks.study import read_rows
from fastgpt.cli import main
from fastgpt.config import TrainConfig, preset
from fastgpt.errors import InputError, TrainingStopped
from fastgpt.train import Trainer

MUTANTS = {
    "fastgpt/benchmarks/finetune.py": [
        ("if _key(about) not in done:", "if True:"),
        ("init_from=str(before.out_dir)", "init_from=None"),
        ("seed=seed, out_dir=out_dir", "out_dir=out_dir"),
        (
            " for row in read_rows(given.out, FIELDS) if _key(row) in asked]",
            " for row in read_rows(given.out, FIELDS)]",
        ),
        ("if train(config).steps_done < config.max_steps:", "if not train(config):"),
    ],
}


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(pseudo_text(8000, seed=1))
    return path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """What is trained, of a tenth of the size."""
    seen: list[TrainConfig] = []
    original = finetune._train

    def train(config: TrainConfig) -> None:
        seen.append(config)
        model = dataclasses.replace(config.model, n_layer=1, n_head=2, n_embd=16, block_size=16)
        original(dataclasses.replace(config, model=model, warmup_steps=2))

    monkeypatch.setattr(finetune, "_train", train)
    return seen


def test_both_arms_do_the_same_steps_and_one_starts_from_the_other_text(
    runs: list[TrainConfig],
    tmp_path: Path,
    text_file: Path,
    other_text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "finetune.csv"
    options = ["--corpus", str(text_file), "--pretrain", str(other_text), "--out", str(out)]
    options += ["--steps", "20", "--pretrain-steps", "40"]
    assert main(["bench", "finetune", *options, "--seeds", "1"]) == 0
    scratch, before, pretrained = runs
    assert (scratch.corpus, scratch.max_steps, scratch.init_from) == (str(text_file), 20, None)
    assert (before.corpus, before.max_steps, before.init_from) == (str(other_text), 40, None)
    same = dataclasses.replace(pretrained, init_from=None, out_dir=scratch.out_dir)
    assert same == scratch
    assert pretrained.init_from == str(before.out_dir)
    char = preset("char-cpu")
    assert all((r.model, r.batch_size, r.learning_rate) == (char.model, 12, char.learning_rate) for r in runs)
    assert all(r.tokenizer == "byte" and r.seed == 1 and r.eval_tokens is None for r in runs)

    rows = read_rows(out, FIELDS)
    assert [int(row["step"]) for row in rows] == 2 * list(range(2, 21, 2))
    first, last = (
        {row["arm"]: float(row["val_loss"]) for row in rows if row["step"] == s} for s in ("2", "20")
    )
    assert first[PRETRAINED] < first[SCRATCH] - 0.5  # letters and their order are half of it
    assert last[PRETRAINED] < first[PRETRAINED]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    figure = tmp_path / "figure.png"
    assert main(["bench", "finetune", *options, "--seeds", "1", "2", "--figure", str(figure)]) == 0
    assert [run.seed for run in runs] == [1, 1, 1, 2, 2, 2]
    assert figure.exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-13].startswith("| steps | from scratch | pretrained |")
    assert lines[-1].startswith("| 20, each seed |")


def test_the_table_has_means_over_seeds_and_only_what_was_asked_for() -> None:
    curves: Any = {
        SCRATCH: [{1: 3.0, 2: 2.0}, {1: 4.0, 2: 3.0}],
        PRETRAINED: [{1: 2.0, 2: 1.0}, {1: 2.5, 2: 1.5}],
    }
    assert table(curves).splitlines()[2:] == [
        "| 1 | 3.500 | 2.250 |",
        "| 2 | 2.500 | 1.250 |",
        "| 2, each seed | 2.000, 3.000 | 1.000, 1.500 |",
    ]


def test_other_runs_in_the_file_are_left_alone(
    runs: list[TrainConfig],
    tmp_path: Path,
    text_file: Path,
    other_text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "finetune.csv"
    given = FinetuneArgs(
        str(text_file), out, pretrain=str(other_text), pretrain_steps=3, steps=10, seeds=(1,)
    )
    run_finetune(given)
    one = capsys.readouterr().out.splitlines()[-13:]
    run_finetune(dataclasses.replace(given, seeds=(2,), pretrain_steps=4))
    run_finetune(given)
    assert capsys.readouterr().out.splitlines()[-13:] == one
    assert len(runs) == 6
    assert len(read_rows(out, FIELDS)) == 40


def test_interruptions_and_bad_options(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = FinetuneArgs(str(text_file), tmp_path / "x.csv", steps=10)
    with pytest.raises(InputError, match="steps = 9: a curve needs at least 10"):
        run_finetune(dataclasses.replace(given, steps=9))
    monkeypatch.setattr(Trainer, "run", lambda self: None)  # as after a signal
    with pytest.raises(TrainingStopped, match="begins this run again"):
        run_finetune(given)
    assert not given.out.exists()
    given.out.write_text("a,b\n")
    with pytest.raises(InputError, match="has other columns"):
        run_finetune(given)
