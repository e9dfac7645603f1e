"""From a stream of documents to token shards: the validation shard first, resumable after every shard."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgpt.data.encode import Piece, cut, encode_all, processes
from fastgpt.data.prepare import description, occupied, separator
from fastgpt.data.shards import (
    RECORD_FILE,
    SHARD_TOKENS,
    ShardWriter,
    check_shard_tokens,
    read_record,
    read_shard,
    shard_path,
    write_record,
)
from fastgpt.data.sources import Position, Source
from fastgpt.data.tokenizers import TOKENIZER_FILE, Tokenizer, make_tokenizer, save_tokenizer
from fastgpt.errors import InputError

logger = logging.getLogger("fastgpt")


class Part(NamedTuple):
    """Tokens of one document: which document it is, where it is in its source, and what comes before.

    `document` counts from 0 and leaves out empty ones; `before` is how many of its tokens precede these.
    """

    document: int
    position: Position
    before: int
    tokens: np.ndarray


def prepare_stream(
    source: Source,
    tokenizer: str | Tokenizer,
    folder: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    val_tokens: int | None = None,
    max_tokens: int | None = None,
    workers: int | None = None,
) -> Path:
    """Write the tokens of `source` into `folder` as shards, with tokenizer and record; return `folder`.

    The first `val_tokens` (default: `shard_tokens`) are val_000000.bin; train_000001.bin and so on have
    `shard_tokens` each, the last one what is left. Documents are separated as `prepare` does it. With
    `max_tokens` the stream ends there. The result does not depend on `workers` (default: the CPUs).

    The record is written after each shard, and the same call goes on behind the last complete one with the
    same result as one run; if everything is there, nothing is done. Raises `InputError` when `folder` holds
    anything else, when another process writes to it, when the text ends within the validation shard, and
    as reading the source does.
    """
    folder = Path(folder)
    val_tokens = shard_tokens if val_tokens is None else val_tokens
    _check(tokenizer, shard_tokens, val_tokens, max_tokens)
    settings = {
        "source": source.identity,
        "tokenizer": description(tokenizer),
        "shard_tokens": shard_tokens,
        "val_tokens": val_tokens,
        "max_tokens": max_tokens,
    }
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            record: dict[str, Any] = {**settings, "progress": _progress(folder, settings)}
            if not record["progress"]["complete"]:
                with _cleaned(folder, record):
                    save_tokenizer(tokenizer, folder)
                    write_record(folder, record)
                    _write_shards(source, tokenizer, folder, record, workers)
    except OSError as error:
        raise InputError(f"cannot write tokens to {folder}: {error.strerror or error}") from error
    return folder


def _check(tokenizer: str | Tokenizer, shard_tokens: int, val_tokens: int, max_tokens: int | None) -> None:
    check_shard_tokens("shard_tokens", shard_tokens)
    check_shard_tokens("val_tokens", val_tokens)
    if max_tokens is not None and max_tokens <= val_tokens:
        raise InputError(f"max_tokens is {max_tokens}: expected more than the {val_tokens} for validation")
    if tokenizer == "char":
        raise InputError(
            "the char tokenizer needs all of the text before the first token, and this is a stream: use gpt2 "
            "or byte"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder meanwhile, where the file system can lock."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing tokens to {folder}: wait until it ends") from None
        except OSError:
            pass  # NFS does not lock folders
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _cleaned(folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """Remove what a killed run left, and on an exception before the first shard everything."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    try:
        yield
    except BaseException:
        if record["progress"]["shards"] == 0:
            for name in (RECORD_FILE, TOKENIZER_FILE):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()
        raise


def _progress(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """How far an earlier call with these settings got; `InputError` if the folder is of another."""
    start: dict[str, Any] = dict.fromkeys(("shards", "tokens", "documents", "document_tokens"), 0)
    start.update(complete=False, position=None)
    record = read_record(folder)
    progress = record.pop("progress", start)
    if record.keys() == settings.keys() and progress["shards"] == 0:
        return start  # killed before the first shard was complete
    others = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if others and record.keys() != settings.keys():
        raise occupied(folder)
    for name, value in record.items():
        if value != settings[name]:
            raise InputError(
                f"{folder} was begun with {name} = {value}, not {settings[name]}: go on with the same "
                "settings and the same text, or remove it, or name another folder"
            )
    for number in range(progress["shards"]):
        read_shard(_path(folder, number))
    if progress["shards"] and not progress["complete"]:
        logger.info("%s: going on after %d shards, %d tokens", folder, progress["shards"], progress["tokens"])
    return progress


def _path(folder: Path, number: int) -> Path:
    return shard_path(folder, _split(number), number)


def _split(number: int) -> str:
    """Which split a shard is of."""
    return "train" if number else "val"


def _write_shards(
    source: Source, tokenizer: Tokenizer, folder: Path, record: dict[str, Any], workers: int | None
) -> None:
    """Write the shards that `record` lacks, and bring it up to date after each."""
    from tqdm import tqdm

    tokenizer.encode("")  # what the tokenizer lacks is said here once, and not by every process
    workers = processes(tokenizer, source.size, workers)
    progress = record["progress"]
    bar = tqdm(
        total=record["max_tokens"] or source.tokens,
        initial=progress["tokens"],
        unit="tok",
        unit_scale=True,
        desc=f"tokenizing {source.name}",
        delay=1,
        disable=None,
    )
    with bar, closing(_parts(source, tokenizer, progress, workers)) as parts:
        stream = _Stream(parts)
        while room := _room(record):
            number = progress["shards"]
            with ShardWriter(folder, _split(number), room, number) as writer:
                while writer.tokens < room and (tokens := stream.take(room - writer.tokens)).size:
                    writer.write(tokens)
                    bar.update(tokens.size)
                if number == 0 and writer.tokens < room:
                    raise _too_short(source, writer.tokens, record)
            if writer.tokens == 0:
                break
            progress.update(shards=number + 1, tokens=progress["tokens"] + writer.tokens, **stream.place())
            write_record(folder, record)
    if progress["shards"] == 1:
        raise _too_short(source, progress["tokens"], record)
    progress.update(complete=True, position=None, document_tokens=0)
    write_record(folder, record)


def _room(record: dict[str, Any]) -> int:
    """The tokens that the next shard is to hold; 0 when there are enough."""
    if record["progress"]["shards"] == 0:
        return int(record["val_tokens"])
    if record["max_tokens"] is None:
        return int(record["shard_tokens"])
    return int(min(record["shard_tokens"], record["max_tokens"] - record["progress"]["tokens"]))


def _too_short(source: Source, tokens: int, record: dict[str, Any]) -> InputError:
    return InputError(
        f"{source.name} has {tokens} tokens, and the first {record['val_tokens']} (val_tokens) are for "
        "validation: nothing is left for training. Use more text, or fewer val_tokens"
    )


class _Stream:
    """Tokens to be taken in any number, and the place that this has come to."""

    def __init__(self, parts: Iterator[Part]) -> None:
        self._parts = parts
        self._part = Part(0, None, 0, np.empty(0, dtype=np.uint16))

    def take(self, count: int) -> np.ndarray:
        """The next tokens, of one document, at most `count`: uint16, empty only at the end."""
        while not self._part.tokens.size:
            part = next(self._parts, None)
            if part is None:
                break
            self._part = part
        document, position, before, tokens = self._part
        taken = tokens[:count]
        self._part = Part(document, position, before + taken.size, tokens[taken.size :])
        return taken

    def place(self) -> dict[str, Any]:
        """Where to go on: at which document, and how many of its tokens were taken."""
        document, position, before, _ = self._part
        return {"documents": document + 1, "position": position, "document_tokens": before}


def _parts(
    source: Source, tokenizer: Tokenizer, progress: dict[str, Any], workers: int
) -> Generator[Part, None, None]:
    """The tokens from where `progress` ends."""
    # The last document that was begun is the first of these.
    document, before, done = max(progress["documents"] - 1, 0) - 1, 0, progress["document_tokens"]
    for piece, tokens in encode_all(tokenizer, _pieces(source, progress["position"]), workers):
        if piece.begins:
            document, before = document + 1, 0
            tokens = np.concatenate([separator(tokenizer, first=document == 0), tokens])
        known = min(done, tokens.size)  # in the shards already
        yield Part(document, piece.place, before + known, tokens[known:])
        done, before = done - known, before + tokens.size


def _pieces(source: Source, position: Position) -> Iterator[Piece]:
    for place, text in source.read(position):
        for number, piece in enumerate(cut(text)):
            yield Piece(place, piece, begins=number == 0)
