"""Training on problems: exact answers counted, runs resumed and shared, and what the commands print."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import each_rank
from runs import assert_same_state, logged, start
from torch import Tensor, nn

from fastgpt.cli import main
from fastgpt.config import GPTConfig, TrainConfig, preset
from fastgpt.data import IGNORE_INDEX, ProblemSet, problem_set
from fastgpt.exam import NAMES, SHOWN, Exam, describe, solve
from fastgpt.metrics import KEYS, read_metrics
from fastgpt.model import GPT, KVCache
from fastgpt.train import train

MUTANTS = {
    "fastgpt/exam.py": [
        ("answer_of(text) == p.answer for", "text != '' for"),
        ("if p.operation == operation]", "]"),
        ("len(problems[i].prompt) != len(problems[batch[0]].prompt)", "False"),
        ("written[i] = problems[i].prompt", "written[batch[0]] = problems[i].prompt"),
        ("temperature=0, graph=False", "temperature=0"),
        ("model.config.block_size + 1 - idx.size(1)", "model.config.block_size - idx.size(1)"),
        ("counts = total(torch.tensor(own, dtype=torch.float64))", "counts = torch.tensor(own)"),
    ],
    "fastgpt/evaluate.py": [
        ("int((y != IGNORE_INDEX).sum())", "y.size"),
        ("mean(torch.tensor(", "(torch.tensor(", "tests/train/test_distributed.py"),
    ],
    "fastgpt/train.py": [("self.exam if self._due(self.config.eval_every) else None", "self.exam")],
}

ADDITION, CALCULATOR = problem_set("addition"), problem_set("calculator")
SMALL = "--n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --device cpu --eval-tokens 240".split()


class Solver(nn.Module):
    """In place of a GPT: continues each prompt as `text` says, one token after another."""

    def __init__(self, problems: ProblemSet, block_size: int, text: Callable[[str], str]) -> None:
        super().__init__()
        self.tokenizer, self.text = problems.tokenizer, text
        self.config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size, block_size=block_size, n_layer=1, n_head=1
        )
        self.token_embedding = torch.zeros(1)
        self.read = torch.zeros(0)

    def hidden(self, idx: Tensor, cache: KVCache) -> Tensor:
        self.read = torch.cat([self.read, idx], 1) if cache.length else idx
        cache.length += idx.size(1)
        assert self.read.size(1) <= self.config.block_size
        return self.read[:, None]

    def logits(self, x: Tensor) -> Tensor:
        rows = []
        for ids in x.tolist():
            written = self.tokenizer.decode(ids)
            prompt = written[: written.index("=") + 1]
            following = (self.text(prompt) + "\n" * len(written))[len(written)]
            (token,) = self.tokenizer.encode(following)
            rows.append(nn.functional.one_hot(torch.tensor(int(token)), self.config.vocab_size).float())
        return torch.stack(rows)


@functools.cache
def solutions(problems: ProblemSet) -> dict[str, str]:
    return {problem.prompt: problem.text for problem in problems.held_out()}


@pytest.mark.parametrize(("problems", "block_size"), [(ADDITION, 12), (CALCULATOR, 145)])
def test_a_perfect_model_has_every_answer(problems: ProblemSet, block_size: int) -> None:
    """Also the longest one, in a block that just holds it."""
    model: Any = Solver(problems, block_size, solutions(problems).__getitem__)
    chosen = [*problems.held_out(60), max(problems.held_out(), key=lambda problem: len(problem.text))]
    exam = Exam(problems, chosen)
    scores = exam.evaluate(model, batch_size=7)
    assert set(scores.values()) == {1.0}
    assert set(scores) <= set(KEYS)
    written = solve(model, problems.tokenizer, chosen, batch_size=7)
    assert written == [problem.text for problem in chosen]


def test_an_exam_captures_no_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would ask the solver for a step to capture, which it does not have."""
    monkeypatch.setattr("fastgpt.generate.can_capture", lambda device: True)
    chosen = ADDITION.held_out(3)
    model: Any = Solver(ADDITION, 12, solutions(ADDITION).__getitem__)
    assert solve(model, ADDITION.tokenizer, chosen) == [problem.text for problem in chosen]


def test_answers_count_by_operation_and_whatever_the_steps() -> None:
    def text(prompt: str) -> str:
        """The answer without its steps; to a difference with a 1 before it, to a product without an end."""
        right = solutions(CALCULATOR)[prompt].rstrip().rpartition("=")[2]
        return prompt + ("1" if "-" in prompt else "") + ("0" * 500 if "*" in prompt else right)

    scores = Exam.of(CALCULATOR, 33).evaluate(Solver(CALCULATOR, 160, text))  # type: ignore[arg-type]
    expected = {"add": 1.0, "subtract": 0.0, "multiply": 0.0, "divide": 1.0}
    assert scores == {"accuracy": pytest.approx(15 / 33)} | {f"accuracy_{k}": v for k, v in expected.items()}
    assert describe(scores) == (
        "accuracy 0.4545 (add 1.0000, subtract 0.0000, multiply 0.0000, divide 1.0000)"
    )
    assert list(NAMES.values()) == list(expected)


def test_shares_add_up_to_the_whole_exam() -> None:
    def text(prompt: str) -> str:
        """Right where the first number is even; a prompt is "a + b =" or the like."""
        return solutions(CALCULATOR)[prompt] if int(prompt[0]) % 2 == 0 else prompt + "7"

    exam, model = Exam.of(CALCULATOR, 41), Solver(CALCULATOR, 160, text)
    sums: list[Tensor] = []

    def add_up(own: Tensor) -> Tensor:
        sums.append(own + sums[-1] if sums else own)
        return sums[-1]

    scores = [exam.share(rank, 3).evaluate(model, total=add_up) for rank in range(3)]  # type: ignore[arg-type]
    assert scores[-1] == exam.evaluate(model)  # type: ignore[arg-type]
    assert 0 < scores[-1]["accuracy"] < 1
    assert sums[-1][0, 1] == 41


def test_an_untrained_model_has_none() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, block_size=12, n_layer=1, n_head=1, n_embd=16))
    assert Exam.of(ADDITION, 500).evaluate(model) == {"accuracy": 0.0, "accuracy_add": 0.0}


def test_what_is_shown() -> None:
    exam = Exam.of(ADDITION, 100)
    right: Any = Solver(ADDITION, 12, solutions(ADDITION).__getitem__)
    lines = exam.show(right).splitlines()
    assert len(lines) == SHOWN
    prompt, _, answer = lines[0].partition("=")
    a, b = map(int, prompt.split("+"))
    assert answer == f"{f'{a + b:04}'[::-1]}, which reads {a + b}: right"
    wrong: Any = Solver(ADDITION, 12, lambda prompt: prompt + "1000")
    assert exam.show(wrong).splitlines()[0] == f"{prompt}=1000, which reads 1: wrong, it is {a + b}"
    calculating: Any = Solver(CALCULATOR, 160, solutions(CALCULATOR).__getitem__)
    assert "reads" not in Exam.of(CALCULATOR, 2).show(calculating)


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def adding(tiny: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    def config(**changes: Any) -> TrainConfig:
        model = dataclasses.replace(tiny().model, block_size=12)
        return tiny(**{"corpus": "addition", "model": model, "eval_tokens": 240, **changes})

    return config


def test_the_validation_loss_is_that_of_the_solutions(adding: Callable[..., TrainConfig]) -> None:
    trainer = start(adding(model=dataclasses.replace(adding().model, dropout=0.0)))
    (x, y) = next(ADDITION.validation(12, max_samples=20).batches(20))
    logits, _ = trainer.model(torch.from_numpy(x))
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(y).flatten(), reduction="none"
    )
    assert (y != IGNORE_INDEX).sum() == 20 * 5
    assert trainer.evaluate() == pytest.approx(losses.sum().item() / 100, rel=1e-5)


def test_resuming_is_bit_exact(adding: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """An exam draws no random numbers, and the step alone says which problems come next."""
    whole = adding(out_dir=tmp_path / "whole", eval_every=6, checkpoint_every=6)
    train(whole)
    cut = dataclasses.replace(whole, out_dir=tmp_path / "cut")
    trainer = start(cut)
    for _ in range(5):
        trainer.step()
        assert trainer.exam is not None
        trainer.exam.evaluate(trainer.model)
    trainer.save()
    train(dataclasses.replace(cut, resume=True))
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    rows = read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows if row["accuracy"] is not None] == [6, 12]
    assert all(row["accuracy"] == row["accuracy_add"] for row in rows)
    assert all(row["accuracy_divide"] is None for row in rows)


def test_ranks_train_as_one_process_does(adding: Callable[..., TrainConfig], tmp_path: Path) -> None:
    model = dataclasses.replace(adding().model, dropout=0.0)
    one, two = (adding(out_dir=tmp_path / name, model=model, max_steps=4) for name in ("one", "two"))
    train(one)
    each_rank(2, lambda: train(two).steps_done)
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert a == {key: None if v is None else pytest.approx(v, rel=1e-4) for key, v in b.items()}


@pytest.mark.parametrize("name", ["addition", "calculator"])
def test_a_preset_from_training_to_a_sample(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", name, "--out-dir", str(run), *SMALL, "--max-steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "problems to train on and" in out
    assert out.count("accuracy 0.0") == 2  # at the last step, and at the end
    assert out.count("wrong, it is") == (SHOWN if name == "addition" else 1)  # of 240 tokens, one of 160
    assert f"--prompt '{problem_set(name).prompt}'" in out
    saved = json.loads((run / "config.json").read_text())
    assert saved["corpus"] == name
    assert main(["train", "--resume", "--out-dir", str(run), "--max-steps", "3"]) == 0
    capsys.readouterr()
    prompt = problem_set(name).prompt
    assert main(["sample", str(run), "--prompt", prompt, "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(prompt)
    assert ("begins with its units" in captured.err) == (name == "addition")
    assert main(["sample", str(run), "--prompt", "2 and 2"]) == 2
    assert "not in the char vocabulary: ' '" in capsys.readouterr().err


def test_eval_asks_all_held_out_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "addition", "--out-dir", str(run), *SMALL, "--max-steps", "1"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--batch-size", "256"]) == 0
    out = capsys.readouterr().out
    assert "accuracy 0.0" in out
    assert "perplexity" in out
    assert "over 10000 held-out problems of addition" in out


@pytest.mark.slow
def test_preset_addition_adds(tmp_path: Path) -> None:
    """The README's figure: at least 99% of the held-out sums."""
    trainer = train(dataclasses.replace(preset("addition"), out_dir=tmp_path / "run", device="cpu"))
    assert trainer.scores["accuracy"] >= 0.99
