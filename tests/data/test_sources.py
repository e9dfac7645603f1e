"""Data files give every document once, in order, from any position; and say what is wrong with them."""

from __future__ import annotations

import gzip
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from fastgpt.data import Source, data_files, file_source, open_corpus, text_source
from fastgpt.errors import InputError

MUTANTS = {
    "fastgpt/data/sources.py": [
        ("if frame is not None:\n        raise EOFError", "if False:\n        raise EOFError"),
        ("            chunk = frame.unused_data\n", '            chunk = b""\n'),
        ("max_window_size=1 << 31", "max_window_size=1 << 20"),
        ("    yield rest\n", ""),
        ("if row + rows <= first:", "if row + rows < first + rows:"),
        ("if row >= first:", "if True:"),
        ("            first_row = 0\n", ""),
        ('        return ""\n', '        return "None"\n'),
        ("if found and files_below(path, TEXT_SUFFIXES):", "if False:"),
        ("if number < first or not line.strip():", "if number < first:"),
        ("paths, fingerprint = in_order(root, paths)", "fingerprint = in_order(root, paths)[1]"),
        ("path.absolute() for path", "path.resolve() for path"),
    ],
}

TEXTS = [f"document {number}, " + "é字\n" * (number % 4) for number in range(23)]


def write_lines(path: Path, texts: Iterable[Any], **others: Any) -> Path:
    """JSON lines, compressed as the name says."""
    data = "".join(json.dumps({"id": 1, "text": text, **others}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def write_parquet(path: Path, texts: list[Any], rows: int = 5) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=rows)
    return path


def read(source: Source, position: Any = None) -> list[str]:
    return [text for _, text in source.read(position)]


def write(path: Path, texts: list[Any]) -> Path:
    return (write_parquet if path.suffix == ".parquet" else write_lines)(path, texts)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_all_documents_from_any_position(tmp_path: Path, suffix: str) -> None:
    paths = [write(tmp_path / f"{name}{suffix}", TEXTS[first::2]) for first, name in ((1, "b"), (0, "a"))]
    source = file_source(paths, "text")
    found = list(source.read(None))
    assert [text for _, text in found] == TEXTS[::2] + TEXTS[1::2]  # a before b
    for number, (position, _) in enumerate(found):
        stored = json.loads(json.dumps(position))
        assert list(source.read(stored)) == found[number:]
    assert source.size == sum(path.stat().st_size for path in paths)


def test_blank_lines_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n  \n{"text": null}\n{"text": "two"}')  # no newline at the end
    assert read(file_source([path], "text")) == ["one", "", "two"]
    write_lines(tmp_path / "a.jsonl.zst", [])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(path.read_bytes()))
    assert read(file_source([tmp_path / "a.jsonl.zst"], "text")) == ["one", "", "two"]
    assert read(file_source([write_parquet(tmp_path / "a.parquet", ["one", None])], "text")) == ["one", ""]


def test_zstd_of_several_frames_and_long_windows(tmp_path: Path) -> None:
    """pzstd and concatenation make the first, `zstd --long=27` the second: both are how web text comes."""
    first, second = (write_lines(tmp_path / f"{n}.jsonl", TEXTS[n::2]).read_bytes() for n in (0, 1))
    path = tmp_path / "all.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # size unknown
    path.write_bytes(zstandard.compress(first) + compressor.compress(second) + compressor.flush())
    assert read(file_source([path], "text")) == TEXTS[::2] + TEXTS[1::2]


def test_lines_longer_than_a_chunk(tmp_path: Path) -> None:
    texts = [os.urandom(150_000).hex(), "short", os.urandom(150_000).hex()]
    assert read(file_source([write_lines(tmp_path / "a.jsonl.zst", texts)], "text")) == texts


def test_links_of_the_hubs_cache(tmp_path: Path) -> None:
    blob = write_parquet(tmp_path / "0123abc", TEXTS)
    (tmp_path / "a.parquet").symlink_to(blob)
    assert read(file_source([tmp_path / "a.parquet"], "text")) == TEXTS


def test_the_identity_notices(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["one"], title="two")
    identities = [file_source([path], column).identity for column in ("text", "title", "text")]
    assert identities[0] == identities[2] != identities[1]
    os.utime(path, ns=(0, 1))
    assert file_source([path], "text").identity != identities[0]
    assert file_source([path, write_lines(tmp_path / "b.jsonl", [])], "text").identity["files"] == 2


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-10], lambda data: data[:-4] + b"????", lambda data: b"PK"]
)
def test_damaged_files_are_named(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / f"a{suffix}", TEXTS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"cannot read .*a{suffix}, is it damaged or cut off"):
        read(file_source([path], "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl, line 2 is not JSON"),
        ("[1]", "line 2: expected an object, got list"),
        ('{"body": "x", "id": 1}', "line 2 has no column 'text': choose with --column from body, id"),
        ('{"text": 5}', "line 2: column 'text' holds int, not text"),
        (r'{"text": "a\ud800"}', "line 2: column 'text' is not valid Unicode"),
        ("caf\udce9", "line 2 is not JSON"),  # a byte that is not UTF-8
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        read(file_source([path], "text"))


def test_bad_columns_of_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["one"])
    with pytest.raises(
        InputError, match=r"a\.parquet has no column 'body': choose with --column from id, text"
    ):
        read(file_source([path], "body"))
    with pytest.raises(InputError, match="row 1: column 'id' holds int, not text"):
        read(file_source([path], "id"))


@pytest.mark.parametrize(("suffix", "package"), [(".parquet", "pyarrow"), (".jsonl.zst", "zstandard")])
def test_a_missing_package_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str
) -> None:
    path = write(tmp_path / f"a{suffix}", TEXTS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"is read by {package}: pip install 'fastgpt\[data\]'"):
        file_source([path], "text")


def test_which_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    paths = [write_lines(folder / name, []) for name in ("b.jsonl", "sub/a.JSONL.gz", "c.jsonl.zst")]
    (folder / "state.json").touch()
    assert sorted(data_files(str(folder))) == sorted(paths)
    assert data_files(str(folder / "b.jsonl")) == [folder / "b.jsonl"]
    assert sorted(data_files(f"{folder}/**/*.[jJ]*[lLzt]")) == sorted(paths)
    with pytest.raises(InputError, match=r"no file matches .*\*\.parquet"):
        data_files(f"{folder}/*.parquet")
    with pytest.raises(
        InputError, match=r"matches .*state\.json, which is not a data file: they end in \.parquet"
    ):
        data_files(f"{folder}/*.json")
    (folder / "README.md").touch()
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        assert data_files(str(folder)) == []
    assert "only these are read" in caplog.text
    for other in (folder / "README.md", "shakespeare", "none.parquet"):
        assert data_files(str(other)) == []


def test_text_as_a_source(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    corpus = open_corpus(tmp_path)
    source = text_source(corpus)
    assert list(source.read(None)) == [(0, "text a"), (1, "text b")]
    assert list(source.read(1)) == [(1, "text b")]
    assert (source.size, source.identity["fingerprint"]) == (12, corpus.fingerprint)


@pytest.mark.parametrize("name", ["fineweb-edu", "hf:allenai/c4", "a.jsonl"])
def test_what_is_prepared_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Training on the JSON itself, say, is never what was meant."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(InputError, match=f"fastgpt prepare {name} --out FOLDER"):
        open_corpus(name)
