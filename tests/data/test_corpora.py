"""Every text is found and read as it is; what is no text is said clearly."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt.data import CORPORA, PROBLEM_CORPORA, DownloadError, corpora, open_corpus
from fastgpt.errors import InputError


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.anything"
    path.write_bytes("one\r\ntwo\n\réè\n".encode())
    corpus = open_corpus(path)
    assert corpus.name == "text.anything"
    (document,) = corpus.documents
    assert document.read() == "one\r\ntwo\n\réè\n"  # newlines are not translated
    assert corpus.size == document.size == path.stat().st_size
    assert open_corpus(str(path)).fingerprint == corpus.fingerprint


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfabc\xef\xbb\xbf")
    assert open_corpus(path).documents[0].read() == "abc\ufeff"


def test_a_folder(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a/z.md",
        "a/b/c.PY",
        "a.rst",
        "a/data.json",
        ".hidden.txt",
        ".git/x.txt",
        "a/none",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    corpus = open_corpus(tmp_path)
    assert corpus.name == tmp_path.name
    assert [document.name for document in corpus.documents] == ["a.rst", "a/b/c.PY", "a/z.md", "b.txt"]
    assert [document.read() for document in corpus.documents] == ["a.rst", "a/b/c.PY", "a/z.md", "b.txt"]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.txt").write_text("longer text"),
        lambda folder: (folder / "a.txt").rename(folder / "b.txt"),
        lambda folder: (folder / "b.txt").write_text("more"),
        lambda folder: os.utime(folder / "a.txt", ns=(0, 12345)),
    ],
    ids=["size", "name", "file", "time"],
)
def test_the_fingerprint_notices(tmp_path: Path, change: Callable[[Path], object]) -> None:
    (tmp_path / "a.txt").write_text("text")
    before = open_corpus(tmp_path).fingerprint
    assert open_corpus(tmp_path).fingerprint == before
    change(tmp_path)
    assert open_corpus(tmp_path).fingerprint != before


def test_documents_are_read_when_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert len(open_corpus(tmp_path).documents) == 1


def test_pydocs() -> None:
    corpus = open_corpus("pydocs")
    names = [document.name for document in corpus.documents]
    assert names == sorted(names)
    assert "assert" in names
    assert 200_000 < corpus.size == sum(len(document.read().encode()) for document in corpus.documents)
    assert open_corpus("pydocs").fingerprint == corpus.fingerprint


def test_pydocs_of_a_python_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="comes without pydoc_data"):
        open_corpus("pydocs")


def test_shakespeare(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    own_cache.mkdir()
    (own_cache / "shakespeare.txt").write_bytes(text)
    corpus = open_corpus("shakespeare")
    assert corpus.documents[0].read() == text.decode()
    assert corpus.name == "shakespeare"


def test_shakespeare_without_a_network() -> None:
    with pytest.raises(DownloadError, match="cannot download https"):
        open_corpus("shakespeare")


def test_no_such_corpus(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_corpus("shakespear")
    assert "did you mean 'shakespeare'" in str(caught.value)
    assert all(name in str(caught.value) for name in CORPORA)
    with pytest.raises(InputError, match="nothing at this path"):
        open_corpus(tmp_path / "missing.txt")


def test_problems_are_no_text() -> None:
    for name in PROBLEM_CORPORA:
        with pytest.raises(InputError, match=f"{name} is no text: its problems are made in training"):
            open_corpus(name)


def test_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no text in the folder .*only \.txt .*\.md"):
        open_corpus(tmp_path)
    (tmp_path / "a.txt").touch()
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(InputError, match="empty"):
            open_corpus(path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode() + "café".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text: byte 0xe9 at offset 5"):
        open_corpus(path).documents[0].read()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        open_corpus(tmp_path / "pipe")


def test_a_file_that_disappears(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    corpus = open_corpus(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match="cannot read"):
        corpus.documents[0].read()
