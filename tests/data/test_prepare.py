"""From a corpus to tokens: split where nanoGPT splits, separated as llm.c does, complete or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import (
    TOKENIZERS,
    ByteTokenizer,
    CharTokenizer,
    Corpus,
    Document,
    GPT2Tokenizer,
    TokenDataset,
    encode,
    make_tokenizer,
    open_corpus,
    prepare,
    prepared,
)
from fastgpt.errors import InputError
from fastgpt.files import cache_dir

prepare_module = sys.modules["fastgpt.data.prepare"]  # the package has a function of that name

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler\n\nin the mind to suffer\n" * 40


def corpus_of(*texts: str, name: str = "texts") -> Corpus:
    documents = [
        Document(str(number), len(text.encode()), lambda text=text: text) for number, text in enumerate(texts)
    ]
    return Corpus(name, documents, fingerprint=repr(texts))


def splits(folder: Path) -> tuple[list[int], list[int]]:
    data = TokenDataset.open(folder)
    return np.concatenate(data.train).tolist(), np.concatenate(data.val).tolist()


def decoded(folder: Path) -> tuple[str, str]:
    tokenizer = TokenDataset.open(folder).tokenizer
    train, val = splits(folder)
    return tokenizer.decode(train), tokenizer.decode(val)


def test_nanogpts_split(tmp_path: Path) -> None:
    prepare(corpus_of(TEXT), "char", tmp_path / "out")
    n = len(TEXT)
    vocab = sorted(set(TEXT))
    ids = [vocab.index(character) for character in TEXT]
    assert splits(tmp_path / "out") == (ids[: int(n * 0.9)], ids[int(n * 0.9) :])


def test_gpt2_has_end_of_text_before_each_document(tmp_path: Path, gpt2: GPT2Tokenizer) -> None:
    first, second = "one two" * 10, "three four" * 10
    prepare(corpus_of(first, second), "gpt2", tmp_path / "out", val_fraction=0.3)
    cut = int((70 + 100) * 0.7) - 70
    assert splits(tmp_path / "out") == (
        [50256, *gpt2.encode(first), 50256, *gpt2.encode(second[:cut])],
        [50256, *gpt2.encode(second[cut:])],
    )


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_characters_and_bytes_have_a_newline_between_documents(tmp_path: Path, tokenizer: str) -> None:
    prepare(corpus_of("aaaa", "", "bbbb", "cc", "dd"), tokenizer, tmp_path / "out", val_fraction=0.25)
    assert decoded(tmp_path / "out") == ("aaaa\nbbbb\nc", "c\ndd")


def test_one_document_has_no_newline_added(tmp_path: Path) -> None:
    prepare(corpus_of("abcd"), "char", tmp_path / "out", val_fraction=0.5)
    tokenizer = TokenDataset.open(tmp_path / "out").tokenizer
    assert tokenizer == CharTokenizer("abcd")


@given(
    texts=st.lists(st.text(st.sampled_from("aé字\U0001f600\n ")), min_size=1, max_size=4),
    val_fraction=st.floats(0.01, 0.99),
)
def test_the_split_loses_nothing_and_is_where_it_should_be(texts: list[str], val_fraction: float) -> None:
    corpus = corpus_of(*texts)
    train, val = "", ""
    for piece in prepare_module._pieces(corpus, val_fraction):
        if piece.place == "train":
            assert not val
            train += piece.text
        else:
            val += piece.text
    assert train + val == "".join(texts)
    target = int(corpus.size * (1 - val_fraction))
    assert target - 3 <= len(train.encode()) <= target  # a character has at most four bytes


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_pieces_and_shards_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: GPT2Tokenizer, tokenizer: str
) -> None:
    corpus = corpus_of(TEXT, TEXT[:100])
    prepare(corpus, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(encode.cut, "__defaults__", (50,))
    prepare(corpus, tokenizer, tmp_path / "pieces", shard_tokens=777)
    assert len(list((tmp_path / "pieces").glob("train_*.bin"))) > 1
    assert splits(tmp_path / "pieces") == splits(tmp_path / "whole")


def test_processes_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: GPT2Tokenizer) -> None:
    corpus = corpus_of(TEXT, TEXT[:100])
    prepare(corpus, "gpt2", tmp_path / "one", workers=1)
    monkeypatch.setattr(encode, "POOL_BYTES", 1)
    monkeypatch.setattr(encode.cut, "__defaults__", (500,))
    prepare(corpus, "gpt2", tmp_path / "two", workers=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_same_again_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = prepare(corpus_of(TEXT), "char", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(prepare_module, "_write_shards", None)  # would fail if called
    assert prepare(corpus_of(TEXT), "char", tmp_path / "out") == out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_folder_is_not_overwritten(tmp_path: Path) -> None:
    prepare(corpus_of(TEXT), "char", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for call in (
        lambda: prepare(corpus_of(TEXT + "!"), "char", tmp_path / "out"),
        lambda: prepare(corpus_of(TEXT), "byte", tmp_path / "out"),
        lambda: prepare(corpus_of(TEXT), "char", tmp_path / "out", val_fraction=0.2),
        lambda: prepare(corpus_of(TEXT), "char", tmp_path / "mine"),
        lambda: prepare(corpus_of(TEXT), "char", tmp_path / "file"),
    ):
        with pytest.raises(InputError, match="holds something else"):
            call()
    assert "".join(decoded(tmp_path / "out")) == TEXT
    assert (tmp_path / "mine" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "keep"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(corpus_of(TEXT), "char", tmp_path / "out")
    assert "".join(decoded(tmp_path / "out")) == TEXT


def test_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes while this one works, as the ranks of a training run may."""
    real = prepare_module._write_shards

    def slower(*args: object) -> None:
        monkeypatch.setattr(prepare_module, "_write_shards", real)
        prepare(corpus_of(TEXT), "char", tmp_path / "out")
        real(*args)

    monkeypatch.setattr(prepare_module, "_write_shards", slower)
    prepare(corpus_of(TEXT), "char", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]
    assert "".join(decoded(tmp_path / "out")) == TEXT


def test_an_error_midway_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    (tmp_path / "texts" / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"b\.txt is not UTF-8"):
        prepare(open_corpus(tmp_path / "texts"), "byte", tmp_path / "made" / "out")
    assert list((tmp_path / "made").iterdir()) == []


KILLED = """
import sys, time
from fastgpt.data import open_corpus, prepare, shards

def write(self, tokens):  # announces itself in the middle of the work, and waits
    real(self, tokens)
    print("writing", flush=True)
    time.sleep(60)

real, shards.ShardWriter.write = shards.ShardWriter.write, write
prepare(open_corpus(sys.argv[1]), "byte", sys.argv[2], shard_tokens=1000)
"""


def test_a_kill_leaves_no_half_folder(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "made" / "out [1]"  # what a shell would take for a pattern
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "text.txt"), str(out)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    (leftover,) = out.parent.iterdir()
    # It does not disturb the next attempt, which removes it once nobody can be writing to it any more.
    prepare(open_corpus(tmp_path / "text.txt"), "byte", out)
    assert leftover.exists()
    os.utime(leftover, (0, time.time() - 2 * 24 * 3600))
    shutil.rmtree(out)
    prepare(open_corpus(tmp_path / "text.txt"), "byte", out)
    assert list(out.parent.iterdir()) == [out]
    assert "".join(decoded(out)) == TEXT


@pytest.mark.parametrize("val_fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_impossible_val_fraction(tmp_path: Path, val_fraction: float) -> None:
    with pytest.raises(InputError, match="val_fraction is"):
        prepare(corpus_of(TEXT), "char", tmp_path / "out", val_fraction=val_fraction)


def test_too_little_text_to_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text for train: 1 bytes"):
        prepare(corpus_of("a"), "char", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown tokenizer 'chars': did you mean 'char'"):
        prepare(corpus_of(TEXT), "chars", tmp_path / "out")
    with pytest.raises(InputError, match="workers is 0"):
        prepare(corpus_of(TEXT), "char", tmp_path / "out", workers=0)
    with pytest.raises(InputError, match="shard_tokens is 0"):
        prepare(corpus_of(TEXT), "char", tmp_path / "out", shard_tokens=0)
    with pytest.raises(InputError, match="not in the char vocabulary"):
        prepare(corpus_of(TEXT), CharTokenizer("abc"), tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write tokens to"):
        prepare(corpus_of(TEXT), "char", tmp_path / "file" / "out")


def test_prepared_once(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "my text.txt"
    path.write_text(TEXT)
    folder = prepared(path, "char")
    assert folder.parent == cache_dir() / "tokens" == own_cache / "tokens"
    assert folder.name.startswith("my_text.txt-char-")
    inode = (folder / "tokenizer.json").stat().st_ino
    assert prepared(str(path), "char") == folder
    assert (folder / "tokenizer.json").stat().st_ino == inode


def test_prepared_anew_when_anything_differs(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    folders = [
        prepared(path, "char"),
        prepared(path, "byte"),
        prepared(path, "char", val_fraction=0.2),
        prepared(path, CharTokenizer(TEXT + "#")),
    ]
    path.write_text(TEXT + "more")
    folders.append(prepared(path, "char"))
    assert len(set(folders)) == 5
    assert TokenDataset.open(folders[3]).tokenizer == CharTokenizer(TEXT + "#")
    assert "".join(decoded(folders[4])) == TEXT + "more"


def test_a_folder_of_tokens_is_used_as_it_is(tmp_path: Path, own_cache: Path) -> None:
    folder = prepare(corpus_of(TEXT), "byte", tmp_path / "tokens")
    assert prepared(folder, "char") == folder
    assert not own_cache.exists()


def test_prepared_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no corpus 'pydoc': did you mean 'pydocs'"):
        prepared("pydoc", "char")
    with pytest.raises(InputError, match="no text in the folder"):
        prepared(tmp_path, "char")


def test_pydocs_end_to_end() -> None:
    data = TokenDataset.open(prepared("pydocs", ByteTokenizer()))
    assert sum(shard.size for shard in data.train + data.val) > 200_000


def test_the_record_says_where_tokens_come_from(tmp_path: Path) -> None:
    prepare(corpus_of(TEXT, name="mine"), "byte", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert record["corpus"] == "mine"
    assert record["val_fraction"] == 0.1


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_a_resumed_run_finds_the_tokens_of_the_first(tmp_path: Path, name: str) -> None:
    """It comes with a tokenizer instead of a name; a large corpus must not be tokenized again for that."""
    path = tmp_path / "text.txt"
    path.write_text("some words, " * 100)
    assert prepared(path, make_tokenizer(name, [])) == prepared(path, name)
