"""Documents as a stream that can go on at any of them: data files, and text corpora."""

from __future__ import annotations

import glob
import gzip
import importlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt.data.corpora import DATA_SUFFIXES, TEXT_SUFFIXES, Corpus, files_below, in_order
from fastgpt.errors import InputError

CHUNK_BYTES = 1 << 16  # of compressed text: each may become many times as much
BATCH_ROWS = 1024
_READ_BY = {".parquet": ("pyarrow", "ArrowException"), ".zst": ("zstandard", "ZstdError")}

Position = Any
"""What a source needs to go on at a document, made of what JSON has; None is its beginning."""

logger = logging.getLogger("fastgpt")


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order.

    `read(position)` gives the documents from there on, each with its own position. Equal `identity`s
    (JSON) mean equal documents. `size` is their bytes and `tokens` about their tokens, where known.
    """

    name: str
    identity: dict[str, Any]
    read: Callable[[Position], Iterator[tuple[Position, str]]]
    size: int | None = None
    tokens: int | None = None


def text_source(corpus: Corpus) -> Source:
    """The documents of a text corpus; a position is a document's number."""

    def read(position: Position) -> Iterator[tuple[Position, str]]:
        for number in range(position or 0, len(corpus.documents)):
            yield number, corpus.documents[number].read()

    return Source(corpus.name, {"corpus": corpus.name, "fingerprint": corpus.fingerprint}, read, corpus.size)


def data_files(name_or_path: str) -> list[Path]:
    """The data files at a path: a file, a pattern such as "data/*.parquet", or a folder; [] for none.

    A folder that holds text files too is text, and a line in the log says so. Raises `InputError` for a
    pattern that matches nothing, or other files.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        found = files_below(path, DATA_SUFFIXES)
        if found and files_below(path, TEXT_SUFFIXES):
            logger.info(
                "%s holds text files, and only these are read: for the data files give a pattern like '%s'",
                path,
                path / "**" / f"*{found[0].suffix}",
            )
            return []
        return found
    if path.exists() or not glob.has_magic(str(path)):
        return [path] if path.is_file() and path.name.lower().endswith(DATA_SUFFIXES) else []
    matches = glob.iglob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    found = [match for match in map(Path, matches) if match.is_file()]
    if not found:
        raise InputError(f"no file matches {name_or_path}")
    for other in found:
        if not other.name.lower().endswith(DATA_SUFFIXES):
            raise InputError(
                f"{name_or_path} matches {other}, which is not a data file: they end in "
                f"{', '.join(DATA_SUFFIXES)}"
            )
    return found


def file_source(paths: list[Path], column: str) -> Source:
    """The text in `column` of parquet files and the field of that name of JSON lines, file after file.

    A position is a file's number and a row's (in JSON lines: a line's). Null is an empty document. When
    it is read, raises `InputError` for a file that is damaged, has no such column, or holds no text there.
    """
    paths = [path.absolute() for path in paths]  # links stay: what they lead to may have no suffix
    root = Path(os.path.commonpath([path.parent for path in paths]))
    paths, fingerprint = in_order(root, paths)
    name = root.name if len(paths) > 1 else paths[0].name.split(".")[0]
    for path in paths:
        _damage(path)  # a missing package is said before any work

    def read(position: Position) -> Iterator[tuple[Position, str]]:
        first_file, first_row = position or (0, 0)
        for number in range(first_file, len(paths)):
            rows = _parquet if paths[number].suffix.lower() == ".parquet" else _json_lines
            with _damage_named(paths[number]):
                for row, text in rows(paths[number], column, first_row):
                    yield [number, row], text
            first_row = 0

    identity = {"files": len(paths), "fingerprint": fingerprint, "column": column}
    return Source(name, identity, read, sum(path.stat().st_size for path in paths))


def text_of(row: Any, column: str, where: str) -> str:
    """The text in a row; null is empty. Raises `InputError`, with `where`, when there is none."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    if column not in row:
        raise InputError(f"{where} has no column {column!r}: choose with --column from {', '.join(row)}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: column {column!r} is not valid Unicode: {error}") from None
    return text


def _parquet(path: Path, column: str, first: int) -> Iterator[tuple[int, str]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise InputError(f"{path} has no column {column!r}: choose with --column from {names}")
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= first:  # not even read
                row += rows
                continue
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                for value in batch.column(0).to_pylist():
                    if row >= first:
                        yield row, text_of({column: value}, column, f"{path}, row {row + 1}")
                    row += 1


def _json_lines(path: Path, column: str, first: int) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_lines(path)):
        if number < first or not line.strip():
            continue
        where = f"{path}, line {number + 1}"
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError too
            raise InputError(f"{where} is not JSON: {error}") from None
        yield number, text_of(row, column, where)


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix.lower() != ".zst":
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield from file
        return
    rest = b""
    with path.open("rb") as file:
        for chunk in _decompressed(file):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
    yield rest


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    """The content of a zstd file: all of its frames (pzstd and concatenation make several)."""
    import zstandard

    frame = None
    while chunk := file.read(CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the file ends inside a zstd frame")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What the libraries raise for a damaged file becomes an `InputError` that names it."""
    try:
        yield
    except _damage(path) as error:
        raise InputError(f"cannot read {path}, is it damaged or cut off? {error}") from error


def _damage(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file may raise. Raises `InputError` when the package to read it is missing."""
    damage = (OSError, EOFError, zlib.error, UnicodeDecodeError)
    package, name = _READ_BY.get(path.suffix.lower(), (None, ""))
    if package is None:
        return damage
    try:
        return (*damage, getattr(importlib.import_module(package), name))
    except ImportError:
        raise InputError(f"{path} is read by {package}: pip install 'fastgpt[data]'") from None
