"""From a corpus to token shards: split, tokenize (by several processes when there is much), write."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.data.corpora import Corpus, open_corpus
from fastgpt.data.encode import Piece, cut, encode_all, processes
from fastgpt.data.shards import SHARD_TOKENS, SPLITS, ShardWriter, is_token_folder, read_record, write_record
from fastgpt.data.tokenizers import CharTokenizer, Tokenizer, make_tokenizer, save_tokenizer
from fastgpt.errors import InputError
from fastgpt.files import cache_dir

LEFTOVER_SECONDS = 24 * 3600


def prepared(name_or_path: str | Path, tokenizer: str | Tokenizer, *, val_fraction: float = 0.1) -> Path:
    """The folder with the tokens of a corpus (see `open_corpus`), prepared in the cache at the first call.

    A path that is a folder of tokens already is returned as it is, whatever `tokenizer` says.
    """
    if is_token_folder(name_or_path):
        return Path(name_or_path)
    corpus = open_corpus(name_or_path)
    kind = tokenizer if isinstance(tokenizer, str) else tokenizer.name
    request = json.dumps([corpus.name, corpus.fingerprint, description(tokenizer), val_fraction])
    name = re.sub(r"[^\w.-]+", "_", corpus.name)[:40]
    folder = f"{name}-{kind}-{hashlib.sha256(request.encode()).hexdigest()[:12]}"
    return prepare(corpus, tokenizer, cache_dir() / "tokens" / folder, val_fraction=val_fraction)


def prepare(
    corpus: Corpus,
    tokenizer: str | Tokenizer,
    folder: str | Path,
    *,
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
) -> Path:
    """Write the tokens of `corpus` as shards, with their tokenizer, into `folder`; return `folder`.

    The first (1 - val_fraction) of the text's bytes, to the character, are for training, the rest for
    validation. GPT-2's end-of-text stands before every document, as in llm.c; characters and bytes have
    a newline between documents. `tokenizer` is a name or a tokenizer; the vocabulary of "char" is the
    characters of the whole corpus. The result does not depend on `workers` (default: the CPUs).

    `folder` appears complete or not at all. If it holds the result of the same call already, nothing is
    done; if it holds anything else, or the text is too short to split, that is an `InputError`.
    """
    folder = Path(folder)
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}: expected more than 0 and less than 1")
    record = {
        "corpus": corpus.name,
        "fingerprint": corpus.fingerprint,
        "tokenizer": description(tokenizer),
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    if _holds(folder, record):
        return folder
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, _texts(corpus))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        building = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            building.mkdir()
            _write_shards(corpus, tokenizer, building, val_fraction, shard_tokens, workers)
            save_tokenizer(tokenizer, building)
            write_record(building, record)
            _move(building, folder, record)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write tokens to {folder}: {error.strerror or error}") from error
    return folder


def description(tokenizer: str | Tokenizer) -> str | dict[str, Any]:
    """What the tokens depend on: the name, and the vocabulary where it is not always the same."""
    if isinstance(tokenizer, str):
        return tokenizer
    return tokenizer.to_json() if isinstance(tokenizer, CharTokenizer) else tokenizer.name


def occupied(folder: Path) -> InputError:
    """For a folder that holds anything else than what is to be written."""
    return InputError(
        f"{folder} exists and holds something else than these tokens: remove it, or name another folder"
    )


def _holds(folder: Path, record: dict[str, Any]) -> bool:
    """Whether `folder` is the result for `record`; `InputError` if it holds anything else."""
    if read_record(folder) == record:
        return True
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise occupied(folder)
    return False


def _move(building: Path, folder: Path, record: dict[str, Any]) -> None:
    """Give the finished folder its name, unless another process was faster with the same."""
    with suppress(OSError):
        folder.rmdir()  # an empty folder may be in the way
    try:
        building.rename(folder)
    except OSError:
        if not _holds(folder, record):
            raise


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left beside `folder`; what is a day old belongs to no run."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover)


def _texts(corpus: Corpus) -> Iterator[str]:
    """Everything that will be tokenized as characters: the documents, and what joins them."""
    if len(corpus.documents) > 1:
        yield "\n"
    for document in corpus.documents:
        yield document.read()


def _write_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float,
    shard_tokens: int,
    workers: int | None,
) -> None:
    from tqdm import tqdm

    tokenizer.encode("")  # what the tokenizer lacks is said here once, and not by every process
    workers = processes(tokenizer, corpus.size, workers)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=corpus.size,
                unit="B",
                unit_scale=True,
                desc=f"tokenizing {corpus.name}",
                delay=1,
                disable=None,
            )
        )
        writers = {split: stack.enter_context(ShardWriter(folder, split, shard_tokens)) for split in SPLITS}
        for piece, tokens in encode_all(tokenizer, _pieces(corpus, val_fraction), workers):
            writer = writers[piece.place]
            if piece.begins:
                writer.write(separator(tokenizer, first=writer.tokens == 0))
            writer.write(tokens)
            bar.update(len(piece.text.encode()))
        for split, writer in writers.items():
            if writer.tokens == 0:
                raise InputError(
                    f"no text for {split}: {corpus.size} bytes with val_fraction {val_fraction} are too "
                    "few to split. Use more text"
                )


def separator(tokenizer: Tokenizer, *, first: bool) -> np.ndarray:
    """What stands before a document; `first`: of its split or stream."""
    if tokenizer.eot is not None:
        return np.array([tokenizer.eot], dtype=np.uint16)
    return tokenizer.encode("" if first else "\n")


def _pieces(corpus: Corpus, val_fraction: float) -> Iterator[Piece]:
    """The corpus in order, cut into the splits and these into pieces; one document in memory at a time."""
    left = int(corpus.size * (1 - val_fraction))  # bytes for training
    for document in corpus.documents:
        text = document.read()
        end = _characters(text, left)
        left -= document.size
        for split, part in zip(SPLITS, (text[:end], text[end:]), strict=True):
            for number, piece in enumerate(cut(part)):
                yield Piece(split, piece, begins=number == 0)


def _characters(text: str, size: int) -> int:
    """How many characters of `text` fit into `size` bytes of UTF-8."""
    if size <= 0 or text.isascii():
        return max(0, size)
    return len(text.encode()[:size].decode(errors="ignore"))
