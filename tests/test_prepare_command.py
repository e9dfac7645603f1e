"""`fastgpt prepare` as a user types it: data files, data sets of the hub, and text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from fastgpt.cli import main
from fastgpt.data import TokenDataset, read_shard

MUTANTS = {
    "fastgpt/prepare_command.py": [
        ("revision=given.revision or begun_with", "revision=given.revision"),
        ('given.column or "text"}', '"text"}'),
        ('file_source(paths, given.column or "text")', 'file_source(paths, "text")'),
        ('given.split or "train"', '"train"'),
        ("            val_tokens=given.val_tokens,\n", ""),
        ("            max_tokens=given.max_tokens,\n", ""),
        ("            workers=given.workers,\n        )\n    else", "        )\n    else"),
        ("if getattr(given, name) is not None and kind", "if getattr(given, name) is None and kind"),
        ("streamed = given.val_tokens is not None", "streamed = False"),
    ],
}

TRAIN = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --device cpu --sample-tokens 0"
SIZES = "--tokenizer byte --val-tokens 100 --shard-tokens 300".split()


def prepare(capsys: pytest.CaptureFixture[str], *arguments: object, fails: bool = False) -> str:
    """What is printed; the one line on standard error of a call that must fail."""
    capsys.readouterr()
    assert main(["prepare", *map(str, arguments)]) == (2 if fails else 0)
    captured = capsys.readouterr()
    assert not fails or captured.err.count("\n") == 1, captured.err
    return captured.err if fails else captured.out


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A jsonl file in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pages.jsonl"
    rows = [{"body": f"page {number}: " + "words, " * number, "id": number} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_data_files_then_training(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = prepare(capsys, lines, *SIZES, fails=True)
    assert "has no column 'text': choose with --column from body, id" in message
    out = prepare(capsys, "pages*.jsonl", "--column", "body", *SIZES)
    assert out.startswith("data/pages-byte: 1,")
    assert "and 100 validation tokens, 256 in the vocabulary" in out
    folder = Path("data/pages-byte")
    sizes = [len(read_shard(path)) for path in sorted(folder.glob("*.bin"))]
    assert sizes[:-2] == [300] * (len(sizes) - 2)
    assert sizes[-1] == 100
    train = ["train", "char-cpu", "--corpus", str(folder), "--out-dir", "run", *TRAIN.split()]
    assert main([*train, "--max-steps", "2"]) == 0
    before = (folder / "prepared.json").stat()
    assert prepare(capsys, lines, "--column", "body", *SIZES) == out
    assert (folder / "prepared.json").stat() == before
    refused = prepare(capsys, lines, "--column", "body", *SIZES, "--max-tokens", 500, fails=True)
    assert "data/pages-byte was begun with max_tokens = None, not 500" in refused
    limited = prepare(capsys, lines, "--column", "body", *SIZES, "--max-tokens", 500, "--out", "less")
    assert limited.startswith("less: 400 training and 100 validation tokens")


class Hub:
    """Stands in for the hub, and says what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commit = "a" * 40
        self.asked: list[Any] = []
        self.fails_at = 40
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.dataset_info)

    def dataset_info(self, name: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(sha=self.commit)

    def load_dataset(self, *arguments: Any, **options: Any) -> datasets.IterableDataset:
        self.asked.append((arguments, options))
        return datasets.IterableDataset.from_generator(self.rows)

    def rows(self) -> Any:
        for number in range(40):
            if number == self.fails_at:
                raise ConnectionError("the line is dead")
            yield {"text": f"page {number}: " + "words, " * number, "title": f"Page {number}"}


def test_fineweb_edu_goes_on_after_a_failure(
    lines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(monkeypatch)
    hub.fails_at = 30
    command = "fineweb-edu --sample 10BT --val-tokens 100 --shard-tokens 200 --workers 1".split()
    assert "failed: the line is dead. " in prepare(capsys, *command, fails=True)
    folder = Path("data/fineweb-edu-sample-10BT-gpt2")
    assert len(list(folder.glob("*.bin"))) > 2
    assert main(["train", "char-cpu", "--corpus", str(folder)]) == 2
    assert "are unfinished" in capsys.readouterr().err
    hub.fails_at = 40
    hub.commit = "b" * 40  # the data set has changed since, and the run stays with what it began with
    prepare(capsys, *command)
    expected = {"split": "train", "revision": "a" * 40, "streaming": True}
    assert hub.asked == [(("HuggingFaceFW/fineweb-edu", "sample-10BT"), expected)] * 2
    hub.commit = "a" * 40
    prepare(capsys, *command, "--out", "whole")
    for path in folder.iterdir():
        assert path.read_bytes() == (Path("whole") / path.name).read_bytes()
    assert "revision" in prepare(capsys, *command, "--revision", "c" * 40, fails=True)


def test_any_data_set(
    lines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(monkeypatch)
    options = "--name en --split test --column title --revision v2 --workers 1".split()
    out = prepare(capsys, "hf:owner/pages", *options, *SIZES)
    assert out.startswith("data/pages-en-byte: ")
    asked = {"split": "test", "revision": "a" * 40, "streaming": True}
    assert hub.asked == [(("owner/pages", "en"), asked)]
    data = TokenDataset.open("data/pages-en-byte")
    assert data.tokenizer.decode(data.val[0][:13]) == "Page 0\nPage 1"


def test_text_can_be_streamed_too(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("some words, " * 100)
    assert prepare(capsys, "text.txt", *SIZES).startswith("data/text.txt-byte: 1,100 training and 100 val")
    assert prepare(capsys, "text.txt", "--tokenizer", "char").startswith("data/text.txt-char: 1,080 training")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pages.jsonl --sample 10BT", "--sample is for data sets of the hub, and pages.jsonl is data files"),
        ("pages.jsonl --val-fraction 0.5", "--val-fraction is for text, and pages.jsonl is data files"),
        (
            "text.txt --column body",
            "--column is for data sets of the hub and data files, and text.txt is text",
        ),
        ("text.txt --max-tokens 9", "--max-tokens with text needs --val-tokens"),
        ("text.txt --val-tokens 9 --val-fraction 0.1", "--val-tokens and --val-fraction exclude each other"),
        ("fineweb-edu --name a --sample 10BT", "both choose the subset"),
        ("pages.jsonl --workers 0", "workers is 0"),
        ("pages.jsonl --column body --tokenizer char", "the char tokenizer needs all of the text"),
        ("fineweb-eduu", "no corpus 'fineweb-eduu': did you mean 'fineweb-edu'"),
        ("owner/pages", "knows fineweb-edu, fineweb, openwebtext and hf:OWNER/NAME of the"),
    ],
)
def test_what_does_not_fit(
    lines: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    Path("text.txt").write_text("some words, " * 100)
    assert message in prepare(capsys, *arguments.split(), fails=True)
    assert not Path("data").exists() or not list(Path("data").iterdir())
