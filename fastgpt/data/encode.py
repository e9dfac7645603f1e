"""Tokenize a stream of texts in order, cut where tokens cannot straddle, by one process or several."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from fastgpt.data.tokenizers import GPT2Tokenizer, Tokenizer
from fastgpt.errors import InputError

PIECE_CHARS = 1 << 20
BATCH_CHARS = 1 << 18  # what a process gets at a time: to hand over one short document costs as much as it
# Fewer bytes are tokenized sooner than processes start (each imports torch along with this package).
POOL_BYTES = 32 << 20

# GPT-2's pre-tokenizer, '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s+(?!\S)|\s, always
# has a boundary before the last of a run of white space, and what precedes it is matched the same at the
# end of a text. The characters here are white space to Rust too, and \S of Python is \S of Rust.
CUT = re.compile(r"[ \n](?=\S)")


class Piece(NamedTuple):
    """A part of a document, to be tokenized on its own; `begins` marks the first of a document.

    `place` is the caller's: the split that the part belongs to, or where its document is in a source.
    """

    place: Any
    text: str
    begins: bool


def cut(text: str, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """`text` in pieces that tokenize on their own exactly as in the whole, of `piece_chars` or more each.

    Text without spaces and newlines stays one piece.
    """
    start = 0
    while match := CUT.search(text, start + piece_chars):
        yield text[start : match.start()]
        start = match.start()
    if start < len(text):
        yield text[start:]


def cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(tokenizer: Tokenizer, size: int | None, workers: int | None) -> int:
    """How many processes tokenize `size` bytes (None: too many to know): 1, or `workers`, or all CPUs.

    Raises `InputError` when `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}: expected at least 1, or none for as many as there are CPUs")
    # Characters and bytes are encoded about as fast as they could be handed to other processes.
    alone = not isinstance(tokenizer, GPT2Tokenizer) or (size is not None and size < POOL_BYTES)
    return 1 if alone else workers or cpus()


def encode_all(
    tokenizer: Tokenizer, pieces: Iterator[Piece], workers: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its tokens, in order; never more than two batches a process are on their way."""
    if workers == 1:
        for piece in pieces:
            yield piece, tokenizer.encode(piece.text)
        return
    # Spawned, because a process that has used torch or a GPU cannot be forked safely.
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) as pool:
            for batch in _batches(pieces):
                pending.append((batch, pool.submit(_encode, [piece.text for piece in batch])))
                if len(pending) > 2 * workers:
                    done, tokens = pending.popleft()
                    yield from zip(done, tokens.result(), strict=True)
            while pending:
                done, tokens = pending.popleft()
                yield from zip(done, tokens.result(), strict=True)
    except BrokenProcessPool as error:
        raise InputError(
            "a tokenizing process died: out of memory, or the calling script lacks "
            "`if __name__ == '__main__':`. Try again with workers=1"
        ) from error


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [_worker_tokenizer.encode(text) for text in texts]
