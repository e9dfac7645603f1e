"""Several processes evaluate one model: each a part, and the counts of one process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import each_rank
from texts import pseudo_text
from weights import gpt, save_run

from fastgpt import evaluate, scoring, sharding
from fastgpt.cli import main
from fastgpt.config import TrainConfig
from fastgpt.data import ByteTokenizer
from fastgpt.metrics import read_metrics
from fastgpt.scoring import Query
from fastgpt.tasks import HellaSwag
from fastgpt.train import train

MUTANTS = {
    "fastgpt/tasks.py": [
        ("self.labels[rank::world_size]", "self.labels[:len(self.queries[rank::world_size])]"),
        ("return total(torch.tensor(own, dtype=torch.float64)).tolist()", "return list(own)"),
    ],
    "fastgpt/train.py": [
        ("hellaswag.share(*self.share)", "hellaswag"),
        ("exam.share(*self.share)", "exam"),
        ("sharding.whole_model(self.model, self.world, everywhere=True)", "self.model"),
    ],
    "fastgpt/eval_command.py": [
        ("task.share(world.rank, world.size).evaluate", "task.evaluate"),
        (", total=world.sum\n", "\n"),
        ("samples.share(world.rank, world.size)", "samples"),
        ("world.say(", "print("),
    ],
}


def tasks(folder: Path) -> list[str]:
    """The options of `fastgpt eval` for each task, on small made-up files."""
    rng = random.Random(0)

    def words(least: int, most: int) -> str:
        return pseudo_text(rng.randint(least, most), seed=rng.randrange(10**6)).strip()

    hellaswag, lambada, text = (folder / name for name in ("hellaswag.jsonl", "lambada.jsonl", "text.txt"))
    with hellaswag.open("w") as file:
        for _ in range(31):
            row = {
                "ctx": words(3, 30),
                "endings": [words(2, 20) for _ in range(4)],
                "label": rng.randrange(4),
            }
            file.write(json.dumps(row) + "\n")
    lambada.write_text("".join(json.dumps({"text": f"a {words(5, 20)}"}) + "\n" for _ in range(11)))
    text.write_text(pseudo_text(700))
    return [
        f"--task hellaswag --data {hellaswag}",
        f"--task hellaswag --data {hellaswag} --limit 2",
        f"--task lambada --data {lambada}",
        f"--task text --data {text}",
        f"--corpus {text}",
    ]


def test_ranks_share_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 prints what one process prints; two examples leave the third of three ranks nothing to do."""
    run = str(save_run(tmp_path / "run", gpt(vocab_size=256, block_size=64), ByteTokenizer()))
    seen: list[int] = []  # queries or windows of each task
    score, batches = scoring.score, evaluate.ValidationSet.batches

    def counted_score(model: Any, queries: Any, **options: Any) -> Any:
        seen.append(len(queries))
        return score(model, queries, **options)

    def counted_batches(self: Any, batch_size: int) -> Any:
        seen.append(int((self.chosen >= 0).sum()))
        return batches(self, batch_size)

    monkeypatch.setattr("fastgpt.tasks.score", counted_score)
    monkeypatch.setattr(evaluate.ValidationSet, "batches", counted_batches)
    options = tasks(tmp_path)

    def printed() -> tuple[list[str], list[int]]:
        lines = []
        for task in options:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main(["eval", run, "--device", "cpu", *task.split()]) == 0
            lines.append(out.getvalue())
        return lines, seen

    ranks = each_rank(3, printed)
    alone, all_seen = printed()
    assert [lines for lines, _ in ranks[1:]] == [[""] * 5] * 2
    for ours, expected in zip(
        ranks[0][0], alone, strict=True
    ):  # counts exactly, sums of nats but for rounding
        if "perplexity" not in expected:
            assert ours == expected
        numbers = [[float(n) for n in re.findall(r"\b\d+(?:\.\d+)?\b", line)] for line in (ours, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
    assert all_seen[:3] == [31, 2, 11]
    assert [sum(of_task) for of_task in zip(*(own for _, own in ranks), strict=True)] == all_seen
    assert [own[:2] for _, own in ranks] == [[11, 1], [10, 1], [10, 0]]


def test_split_ranks_share_hellaswag_and_an_exam(
    tiny: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the whole network, put together once for both; the counts are those of one process."""
    rng = np.random.default_rng(1)
    endings = [tuple(rng.integers(13, size=n) for n in rng.integers(1, 5, size=3)) for _ in range(21)]
    queries = [Query(rng.integers(13, size=4), own) for own in endings]
    monkeypatch.setattr(HellaSwag, "open", lambda *_: HellaSwag(queries, [0, 1, 2] * 7))
    model = dataclasses.replace(tiny().model, block_size=12, dropout=0.0)
    common = {"corpus": "addition", "model": model, "eval_tokens": 240, "hellaswag": tmp_path}
    common |= {"batch_size": 8, "max_steps": 4, "hellaswag_every": 2, "sample_tokens": 0}
    gathered, asked = [], []
    whole, score = sharding.whole_model, scoring.score

    def counted(*args: Any, **options: Any) -> Any:
        gathered.append(1)
        return whole(*args, **options)

    def counted_score(model: Any, part: Any, **options: Any) -> Any:
        asked.append(len(part))
        return score(model, part, **options)

    def solve(model: Any, tokenizer: Any, problems: Any, **options: Any) -> list[str]:
        """Right where a problem begins with an even digit: this network would have none right."""
        asked.append(len(problems))
        return [p.text if int(p.text[0]) % 2 == 0 else p.prompt for p in problems]

    monkeypatch.setattr(sharding, "whole_model", counted)
    monkeypatch.setattr("fastgpt.tasks.score", counted_score)
    monkeypatch.setattr("fastgpt.exam.solve", solve)

    def split() -> tuple[int, list[int]]:
        train(tiny(out_dir=tmp_path / "two", parallel="fsdp", **common))
        return len(gathered), asked

    # HellaSwag after steps 2 and 4, and the exam after 4
    assert each_rank(2, split) == [(2, [11, 10, 11]), (2, [10, 10, 10])]
    train(tiny(out_dir=tmp_path / "one", **common))
    rows = [read_metrics(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for key in ("hellaswag_acc", "hellaswag_acc_norm", "accuracy", "accuracy_add"):
            assert a[key] == b[key], key
    assert 0 < rows[0][-1]["accuracy"] < 1
    assert 0 < rows[0][-1]["hellaswag_acc"] != rows[0][-1]["hellaswag_acc_norm"]
