"""Shards of a stream: the validation shard first, and the same bytes wherever it was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt import files
from fastgpt.data import (
    CharTokenizer,
    GPT2Tokenizer,
    Source,
    TokenDataset,
    encode,
    prepare,
    prepare_stream,
    prepared,
    read_shard,
    text_source,
)
from fastgpt.errors import InputError

MUTANTS = {
    "fastgpt/data/stream.py": [
        ("first=document == 0", "first=before == 0"),
        ('max(progress["documents"] - 1, 0) - 1', "-1"),
        ("tokens[known:]", "tokens"),
        ("before + known, ", "before, "),
        ("done, before = done - known, before + tokens.size", "before = before + tokens.size"),
        ("before + taken.size, tokens[taken", "before, tokens[taken"),
        ('progress["position"]), workers', "None), workers"),
        ("            write_record(folder, record)\n    if progress", "    if progress"),
        ("if number == 0 and writer.tokens < room:", "if False:"),
        ('    if progress["shards"] == 1:\n', "    if False:\n"),
        ('return int(min(record["shard_tokens"], record', 'return int(max(record["shard_tokens"], record'),
        ("        return start  # killed", "        pass  # killed"),
        ("        if value != settings[name]:", "        if False:"),
        ("        read_shard(_path(folder, number))", "        pass"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        ("        leftover.unlink()", "        pass"),
        (
            '        if record["progress"]["shards"] == 0:\n            for',
            "        if True:\n            for",
        ),
        ("                (folder / name).unlink(missing_ok=True)", "                pass"),
        (
            "progress.update(complete=True, position=None, document_tokens=0)",
            "progress.update(complete=True)",
        ),
        ("begins=number == 0", "begins=True"),
    ],
    "fastgpt/data/shards.py": [('        if not progress["complete"]:', "        if False:")],
    "fastgpt/data/encode.py": [
        ("        if size >= BATCH_CHARS:", "        if size >= 1 << 60:"),
        ("    if batch:\n        yield batch\n", "", "tests/data/test_prepare.py"),
        ("if len(pending) > 2 * workers:", "if len(pending) > 200 * workers:"),
    ],
}

TEXTS = [f"document {number}: " + "some words, " * (number * 7 % 11) for number in range(30)]
TEXTS[5] = ""
SIZES: dict[str, Any] = {"val_tokens": 70, "shard_tokens": 100}


class Stopped(Exception):
    pass


def source_of(
    texts: list[str], stop_at: int | None = None, name: str = "texts", size: int | None = 0, **identity: Any
) -> Source:
    """These documents; with `stop_at`, the network fails when that one is asked for."""

    def read(position: Any) -> Iterator[tuple[Any, str]]:
        for number in range(position["at"] if position else 0, len(texts)):
            if number == stop_at:
                raise Stopped
            yield {"at": number}, texts[number]

    return Source(name, {"texts": name, **identity}, read, size)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of shards are written here, and the machine keeps its power."""
    monkeypatch.setattr(files, "fsync", lambda path: None)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_tokens_of_llmc(tmp_path: Path, gpt2: GPT2Tokenizer) -> None:
    """End-of-text before each document, and one stream cut into shards, the first for validation."""
    out = prepare_stream(source_of(TEXTS), "gpt2", tmp_path / "out", **SIZES)
    everything = np.concatenate([[50256, *gpt2.encode(text)] for text in TEXTS if text])
    data = TokenDataset.open(out)
    assert data.tokenizer == gpt2
    assert [Path(name).name for name in data.names["val"]] == ["val_000000.bin"]
    names = [f"train_{number:06}.bin" for number in range(1, len(data.train) + 1)]
    assert [Path(name).name for name in data.names["train"]] == names
    sizes = [len(shard) for shard in data.val + data.train]
    assert sizes == [70, *[100] * (len(sizes) - 2), (len(everything) - 70) % 100]
    assert np.array_equal(np.concatenate(data.val + data.train), everything)
    record = json.loads((out / "prepared.json").read_text())
    assert record == {
        "source": {"texts": "texts"},
        "tokenizer": "gpt2",
        "shard_tokens": 100,
        "val_tokens": 70,
        "max_tokens": None,
        "progress": {
            "complete": True,
            "shards": len(sizes),
            "tokens": len(everything),
            "documents": 29,
            "position": None,
            "document_tokens": 0,
        },
    }
    assert sorted(content(out)) == sorted([*names, "val_000000.bin", "prepared.json", "tokenizer.json"])


def test_bytes_have_a_newline_between_documents(tmp_path: Path) -> None:
    out = prepare_stream(
        source_of(["aaa", "", "bb", "c"]), "byte", tmp_path / "out", val_tokens=1, shard_tokens=2
    )
    data = TokenDataset.open(out)
    assert [bytes(shard.astype(np.uint8)) for shard in data.val + data.train] == [
        b"a",
        b"aa",
        b"\nb",
        b"b\n",
        b"c",
    ]


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte"])
@pytest.mark.parametrize("stop_at", [1, 7, 20, 29])
def test_what_goes_on_ends_the_same(
    tmp_path: Path, gpt2: GPT2Tokenizer, tokenizer: str, stop_at: int
) -> None:
    sizes = {"val_tokens": 13, "shard_tokens": 17}  # several shards begin in most documents
    expected = prepare_stream(source_of(TEXTS), tokenizer, tmp_path / "whole", **sizes)
    out = tmp_path / "out"
    stops = 0
    for number in range(stop_at, 31, stop_at):  # interrupted again and again
        with pytest.raises(Stopped):
            prepare_stream(source_of(TEXTS, stop_at=min(number, 29)), tokenizer, out, **sizes)
        stops += 1
        if out.exists():
            with pytest.raises(InputError, match="unfinished"):
                TokenDataset.open(out)
    prepare_stream(source_of(TEXTS), tokenizer, out, **sizes)
    assert stops
    assert content(out) == content(expected)


def test_a_boundary_at_the_end_of_a_document(tmp_path: Path) -> None:
    for texts in (["aaa", "bbb", "cc"], ["aaa", "bbbb"]):
        folder = tmp_path / str(len(texts))
        for stop_at in range(len(texts)):
            with pytest.raises(Stopped):
                prepare_stream(source_of(texts, stop_at), "byte", folder, val_tokens=3, shard_tokens=4)
        prepare_stream(source_of(texts), "byte", folder, val_tokens=3, shard_tokens=4)
        expected = "\n".join(texts).encode()
        data = TokenDataset.open(folder)
        assert b"".join(bytes(shard.astype(np.uint8)) for shard in data.val + data.train) == expected
        assert [len(shard) for shard in data.train] == ([4, 3] if len(texts) == 3 else [4, 1])


def test_a_document_begun_in_the_first_shard_has_no_newline_before(tmp_path: Path) -> None:
    sizes = {"val_tokens": 5, "shard_tokens": 5}
    texts = ["a" * 12, "b"]
    with pytest.raises(Stopped):
        prepare_stream(source_of(texts, 1), "byte", tmp_path / "out", **sizes)
    prepare_stream(source_of(texts), "byte", tmp_path / "out", **sizes)
    assert content(tmp_path / "out") == content(
        prepare_stream(source_of(texts), "byte", tmp_path / "x", **sizes)
    )


KILLED = """
import json, os, sys, time
from fastgpt.data import prepare_stream, shards, file_source
from pathlib import Path

def write(self, tokens):  # announces itself in the middle of the fourth shard, and waits
    real(self, tokens)
    if self._shards == 4 and self._file:
        self._file.flush()
        print("writing", flush=True)
        time.sleep(60)

real, shards.ShardWriter.write = shards.ShardWriter.write, write
prepare_stream(file_source([Path(sys.argv[1])], "text"), "byte", sys.argv[2], val_tokens=90, shard_tokens=120)
"""


def test_a_kill_leaves_whole_shards_and_the_same_command_goes_on(tmp_path: Path) -> None:
    from fastgpt.data import file_source

    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", KILLED, str(path), str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(InputError, match="another process is writing tokens to"):
            prepare_stream(file_source([path], "text"), "byte", out, val_tokens=90, shard_tokens=120)
        process.send_signal(signal.SIGKILL)
    assert [name for name in content(out) if name.endswith(".tmp")]
    assert [len(read_shard(shard)) for shard in sorted(out.glob("[tv]*.bin"))] == [120, 120, 90]
    prepare_stream(file_source([path], "text"), "byte", out, val_tokens=90, shard_tokens=120)
    expected = prepare_stream(
        file_source([path], "text"), "byte", tmp_path / "whole", val_tokens=90, shard_tokens=120
    )
    assert content(out) == content(expected)


def test_a_kill_between_a_shard_and_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = sys.modules["fastgpt.data.stream"]
    expected = content(prepare_stream(source_of(TEXTS), "byte", tmp_path / "whole", **SIZES))
    real, calls = stream.write_record, []

    def killed(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt  # as good as SIGKILL: the shard is there, and is not removed
        real(*arguments)

    monkeypatch.setattr(stream, "write_record", killed)
    for stop in (1, 2, 3, len(expected) - 1):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            prepare_stream(source_of(TEXTS), "byte", tmp_path / str(stop), **SIZES)
        calls.extend([()] * 1000)
        prepare_stream(source_of(TEXTS), "byte", tmp_path / str(stop), **SIZES)
        assert content(tmp_path / str(stop)) == expected


def test_killed_again_and_again_in_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = sys.modules["fastgpt.data.stream"]
    texts, sizes = ["ab" * 20, "c" * 7], {"val_tokens": 5, "shard_tokens": 6}
    expected = content(prepare_stream(source_of(texts), "byte", tmp_path / "whole", **sizes))
    real, out = stream.write_record, tmp_path / "out"

    def killed_at(shards: int) -> Callable[[Path, dict[str, Any]], None]:
        def killed(folder: Path, record: dict[str, Any]) -> None:
            if record["progress"]["shards"] == shards:
                raise KeyboardInterrupt
            real(folder, record)

        return killed

    for shards in range(2, len(expected) - 2):  # each run records one shard more than the one before
        monkeypatch.setattr(stream, "write_record", killed_at(shards))
        with pytest.raises(KeyboardInterrupt):
            prepare_stream(source_of(texts), "byte", out, **sizes)
    monkeypatch.setattr(stream, "write_record", real)
    prepare_stream(source_of(texts), "byte", out, **sizes)
    assert content(out) == expected


def test_a_record_without_shards_binds_nobody(tmp_path: Path) -> None:
    """A kill before the first shard leaves it."""
    record = json.loads(
        content(prepare_stream(source_of(TEXTS), "byte", tmp_path / "x", **SIZES))["prepared.json"]
    )
    record["progress"].update(complete=False, shards=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(record))
    sizes = {**SIZES, "val_tokens": 99}
    expected = prepare_stream(source_of(TEXTS), "byte", tmp_path / "whole", **sizes)
    assert content(prepare_stream(source_of(TEXTS), "byte", tmp_path / "out", **sizes)) == content(expected)


def test_processes_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: GPT2Tokenizer) -> None:
    expected = prepare_stream(source_of(TEXTS, size=None), "gpt2", tmp_path / "one", workers=1, **SIZES)
    monkeypatch.setattr(encode, "BATCH_CHARS", 100)
    monkeypatch.setattr(encode.cut, "__defaults__", (30,))
    asked: list[int] = []

    def read(position: Any) -> Iterator[tuple[Any, str]]:
        for number, document in enumerate(source_of(TEXTS * 100).read(position)):
            asked.append(number)
            yield document

    many = Source("texts", {}, read)
    prepare_stream(many, "gpt2", tmp_path / "two", workers=2, max_tokens=700, **SIZES)
    assert len(asked) < 100  # of 3000: the stream is read only a little ahead of what is written
    for path in sorted(expected.glob("*.bin"))[:5]:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_enough_is_enough(tmp_path: Path) -> None:
    out = prepare_stream(source_of(TEXTS, stop_at=20), "byte", tmp_path / "out", max_tokens=333, **SIZES)
    assert [len(read_shard(path)) for path in sorted(out.glob("*.bin"))] == [100, 100, 63, 70]


def test_the_same_again_is_kept_and_anything_else_refused(tmp_path: Path) -> None:
    out = prepare_stream(source_of(TEXTS), "byte", tmp_path / "out", **SIZES)
    before = content(out)
    assert prepare_stream(source_of(TEXTS, stop_at=0), "byte", out, **SIZES) == out  # not even read
    for options, message in (
        ({"val_tokens": 71}, "was begun with val_tokens = 70, not 71: go on with the same settings"),
        ({"shard_tokens": 101}, "was begun with shard_tokens = 100, not 101"),
        ({"max_tokens": 1000}, "was begun with max_tokens = None, not 1000"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_stream(source_of(TEXTS), "byte", out, **{**SIZES, **options})
    with pytest.raises(InputError, match="was begun with tokenizer = byte, not gpt2"):
        prepare_stream(source_of(TEXTS), "gpt2", out, **SIZES)
    with pytest.raises(InputError, match="was begun with source = .*'texts'.*, not .*'other'"):
        prepare_stream(source_of(TEXTS, name="other"), "byte", out, **SIZES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="holds something else"):
        prepare_stream(source_of(TEXTS), "byte", tmp_path / "mine", **SIZES)
    (tmp_path / "text.txt").write_text("some text " * 100)
    with pytest.raises(InputError, match="holds something else"):
        prepare_stream(source_of(TEXTS), "byte", prepared(tmp_path / "text.txt", "byte"), **SIZES)
    assert content(out) == before
    assert content(tmp_path / "mine") == {"notes.txt": b"keep"}


def test_a_shard_that_is_gone_or_cut_is_noticed(tmp_path: Path) -> None:
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])):
        out = tmp_path / f"out{damage}"
        with pytest.raises(Stopped):
            prepare_stream(source_of(TEXTS, stop_at=20), "byte", out, **SIZES)
        damage(out / "train_000001.bin")
        with pytest.raises(InputError, match=r"train_000001\.bin"):
            prepare_stream(source_of(TEXTS), "byte", out, **SIZES)


def test_an_error_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    for stop_at, options in ((0, {}), (2, {"val_tokens": 1000})):
        with pytest.raises(Stopped):
            prepare_stream(source_of(TEXTS, stop_at), "byte", tmp_path / "out", **{**SIZES, **options})
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("val_tokens", [5, 6, 100])
def test_text_that_ends_within_the_validation_shard(tmp_path: Path, val_tokens: int) -> None:
    with pytest.raises(InputError, match=rf"texts has 5 tokens, and the first {val_tokens} \(val_tokens\)"):
        prepare_stream(source_of(["ab", "cd"]), "byte", tmp_path / "out", val_tokens=val_tokens)
    assert not (tmp_path / "out").exists() or val_tokens == 5


def test_bad_arguments(tmp_path: Path) -> None:
    for options, message in (
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"val_tokens": 1 << 31}, "val_tokens is 2147483648: a shard holds 1 to"),
        ({"max_tokens": 70}, "max_tokens is 70: expected more than the 70 for validation"),
        ({"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_stream(source_of(TEXTS), "byte", tmp_path / "out", **{**SIZES, **options})
    with pytest.raises(InputError, match="the char tokenizer needs all of the text before"):
        prepare_stream(source_of(TEXTS), "char", tmp_path / "out", **SIZES)
    with pytest.raises(InputError, match="unknown tokenizer 'bite': did you mean 'byte'"):
        prepare_stream(source_of(TEXTS), "bite", tmp_path / "out", **SIZES)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write tokens to"):
        prepare_stream(source_of(TEXTS), "byte", tmp_path / "file" / "out", **SIZES)
    assert not (tmp_path / "out").exists()


def test_a_char_vocabulary_that_is_there_already(tmp_path: Path) -> None:
    out = prepare_stream(source_of(TEXTS), CharTokenizer("\n".join(TEXTS)), tmp_path / "out", **SIZES)
    assert TokenDataset.open(out).tokenizer == CharTokenizer("\n".join(TEXTS))


def test_training_reads_all_shards_mapped_and_each_window_on_one_rank(tmp_path: Path) -> None:
    out = prepare_stream(
        source_of([os.urandom(999).hex() for _ in range(9)]), "byte", tmp_path / "out", **SIZES
    )
    assert prepared(out, "gpt2") == out
    data = TokenDataset.open(out)
    assert len(data.train) == 180
    assert all(isinstance(shard, np.memmap) for shard in data.train)
    loader = data.loader(16, 12, seed=1)
    seen = []
    for step in range(loader.samples_per_epoch // 12):
        batch, _ = loader.batch(step)
        ranks = [loader.micro_batches(step, 3, rank, 2) for rank in range(2)]
        rows = [row for micro in zip(*ranks, strict=True) for x, _ in micro for row in x]
        assert np.array_equal(np.array(rows), batch)
        seen += [row.tobytes() for row in batch]
    assert len(set(seen)) == len(seen) == loader.samples_per_epoch // 12 * 12


def test_text_with_the_validation_shard_first(tmp_path: Path) -> None:
    """The other way to split text: `prepare` takes the end, and is not resumable."""
    from fastgpt.data import open_corpus

    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_text(text)
    out = prepare_stream(text_source(open_corpus(tmp_path)), "byte", tmp_path / "out", **SIZES)
    same = prepare(open_corpus(tmp_path), "byte", tmp_path / "same", val_fraction=0.001)
    a, b = TokenDataset.open(out), TokenDataset.open(same)
    assert np.array_equal(np.concatenate(a.val + a.train)[:2000], np.concatenate(b.train)[:2000])
