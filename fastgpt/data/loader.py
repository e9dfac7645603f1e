"""Which tokens make up which batch: a function of the seed and the step number, and of nothing else.

Every shard is tiled with windows of `block_size + 1` tokens at stride `block_size` (neighbours share a
token: the last target of one is the first input of the next). In each epoch the windows of all shards
come once each, in an order given by a keyed permutation, so nothing has to be stored to shuffle, to
resume, or to share the work between processes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from fastgpt.errors import InputError

ROUNDS = 6  # even: the two coordinates end where they began
UINT64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
IGNORE_INDEX = -100  # a target that no loss counts

_FILLING = -1  # in place of a window's number

Batch = tuple[np.ndarray, np.ndarray]
Bits = TypeVar("Bits", int, np.ndarray)  # an unsigned 64-bit number, or a uint64 array of them


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where the permutation of range(n) called `key` takes each of `index`: int64, the same shape.

    A Feistel network permutes the cells of an a x b table, a = ceil(sqrt(n)) and b = ceil(n / a); the few
    values beyond n are sent round again until they fall below it (cycle walking), which keeps it a
    bijection. No table is stored; the result is the same on every platform. Raises `ValueError` unless
    1 <= n <= 2^40 and 0 <= index < n.
    """
    if not 1 <= n <= 1 << 40:
        raise ValueError(f"n is {n}: expected 1 to 2^40")
    index = np.asarray(index, dtype=np.int64)
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"an index is outside range({n})")
    keys = [_key(key, round_) for round_ in range(ROUNDS)]
    values = _feistel(index.reshape(-1).astype(np.uint64), n, keys)
    while (outside := np.flatnonzero(values >= np.uint64(n))).size:
        values[outside] = _feistel(values[outside], n, keys)
    return values.astype(np.int64).reshape(index.shape)


def _feistel(values: np.ndarray, n: int, keys: list[int]) -> np.ndarray:
    """One pass: each round adds to one coordinate a keyed hash of the other, which can be undone."""
    side = math.isqrt(n - 1) + 1
    a, b = np.uint64(side), np.uint64(-(-n // side))
    left, right = values // b, values % b
    for key in keys:
        left, right, a, b = right, (left + _mix(right ^ np.uint64(key)) % a) % a, b, a
    return left * b + right


def _mix(z: Bits) -> Bits:
    """splitmix64's finaliser: every bit of the result depends on every bit of `z` in [0, 2^64)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & UINT64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & UINT64
    return z ^ (z >> 31)


def _key(*numbers: int) -> int:
    """One well-mixed number in [0, 2^64) from several of any size and sign."""
    key = 0
    for number in numbers:
        key = _mix((key ^ number) + GOLDEN & UINT64)
    return key


class _Windows:
    """Windows of `block_size + 1` tokens over shards, numbered shard after shard."""

    def __init__(
        self, shards: Sequence[np.ndarray], block_size: int, vocab_size: int, names: Sequence[str]
    ) -> None:
        if block_size < 1:
            raise InputError(f"block_size is {block_size}: expected at least 1")
        # A plain view: slicing np.memmap itself is several times slower.
        self.shards = [np.asarray(shard) for shard in shards]
        self.names = names or [f"shard {number}" for number in range(len(shards))]
        self.block_size = block_size
        self.vocab_size = vocab_size
        sizes = np.array([shard.size for shard in shards], dtype=np.int64)
        counts = np.maximum(sizes - 1, 0) // block_size
        self.slack = np.maximum(sizes - 1, 0) % block_size  # tokens that the tiling leaves over
        self.first = np.concatenate([[0], np.cumsum(counts)])  # number of each shard's first window
        self.total = int(self.first[-1])
        if self.total == 0:
            longest = int(sizes.max(initial=0))
            raise InputError(
                f"a text of {longest} tokens is shorter than a window of block_size + 1 = {block_size + 1}: "
                "use more text or a smaller block_size"
            )

    def read(self, windows: np.ndarray, offset_key: int | None = None) -> np.ndarray:
        """Tokens of the windows, int64 (len(windows), block_size + 1), shifted by `offset_key` if given."""
        shards = np.searchsorted(self.first, windows, side="right") - 1
        starts = (windows - self.first[shards]) * self.block_size
        if offset_key is not None:
            noise = _mix(shards.astype(np.uint64) + np.uint64(offset_key))
            starts += (noise % (self.slack[shards] + 1).astype(np.uint64)).astype(np.int64)
        tokens = np.empty((len(windows), self.block_size + 1), dtype=np.int64)
        for row, (shard, start) in enumerate(zip(shards.tolist(), starts.tolist(), strict=True)):
            tokens[row] = self.shards[shard][start : start + self.block_size + 1]
        self._check(tokens, shards)
        return tokens

    def _check(self, tokens: np.ndarray, shards: np.ndarray) -> None:
        if tokens.size and tokens.max() >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0]
            raise InputError(
                f"{self.names[shards[row]]} holds token {tokens[row, column]}, outside the vocabulary of "
                f"{self.vocab_size}: the file is corrupt or was made with another tokenizer"
            )


def _split(tokens: np.ndarray) -> Batch:
    """Inputs and targets (rows, block_size), each in its own memory: the target is the next token."""
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


class Loader:
    """Training batches: `batch(step)` depends on the arguments and the step, on nothing else.

    `shards` are uint16 arrays, `names` what to call them in errors. In epoch e the tiling of a shard of n
    tokens starts at a keyed offset in [0, (n - 1) % block_size], so that alignments vary and the tokens
    left over are others each time. Raises `InputError` when no shard holds a window, and when reading a
    token outside the vocabulary.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        block_size: int,
        batch_size: int,
        *,
        seed: int,
        vocab_size: int,
        names: Sequence[str] = (),
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: expected at least 1")
        self.batch_size = batch_size
        self.seed = seed
        self._windows = _Windows(shards, block_size, vocab_size, names)
        self.windows_per_epoch = self._windows.total

    def epoch_of(self, step: int) -> float:
        """How many epochs lie before this step."""
        return step * self.batch_size / self.windows_per_epoch

    def batch(self, step: int) -> Batch:
        """The global batch of a step (from 0): inputs and targets, int64 (batch_size, block_size)."""
        return self._rows(step, 0, self.batch_size)

    def micro_batches(
        self, step: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[Batch]:
        """This rank's part of `batch(step)`, in pieces of `micro_batch_size` rows (the last may be smaller).

        In micro-step m the ranks together hold rows [m * world_size * micro_batch_size, ...) of the batch,
        rank after rank; all ranks have the same number of pieces of the same sizes. Raises `InputError`
        when `batch_size` is not a multiple of `world_size`.
        """
        if self.batch_size % world_size:
            raise InputError(
                f"batch_size {self.batch_size} is not a multiple of the {world_size} processes: "
                f"use {-(-self.batch_size // world_size) * world_size}"
            )
        if micro_batch_size < 1:
            raise InputError(f"micro_batch_size is {micro_batch_size}: expected at least 1")
        batches = []
        for first in range(0, self.batch_size, world_size * micro_batch_size):
            rows = min(micro_batch_size, (self.batch_size - first) // world_size)
            batches.append(self._rows(step, first + rank * rows, rows))
        return batches

    def _rows(self, step: int, first: int, rows: int) -> Batch:
        """Rows [first, first + rows) of the batch of `step`, which may lie in several epochs."""
        start = step * self.batch_size + first
        parts = []
        while rows:
            epoch, index = divmod(start, self.windows_per_epoch)
            count = min(rows, self.windows_per_epoch - index)
            order_key, offset_key = _key(self.seed, epoch, 0), _key(self.seed, epoch, 1)
            windows = permute(np.arange(index, index + count), self.windows_per_epoch, order_key)
            parts.append(self._windows.read(windows, offset_key))
            start, rows = start + count, rows - count
        return _split(parts[0] if len(parts) == 1 else np.concatenate(parts))


class ValidationSet:
    """Fixed windows of the validation shards, unshifted and in order: all, or `max_windows` evenly spread."""

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        block_size: int,
        *,
        max_windows: int | None = None,
        vocab_size: int,
        names: Sequence[str] = (),
    ) -> None:
        if max_windows is not None and max_windows < 1:
            raise InputError(f"max_windows is {max_windows}: expected at least 1, or none for all")
        self._windows = _Windows(shards, block_size, vocab_size, names)
        total = self._windows.total
        count = min(total, max_windows or total)
        self._chosen = np.arange(count) * total // count
        self.weight = 1.0
        """Of the mean loss over this set, in the mean over all ranks' shares."""

    def __len__(self) -> int:
        """The number of windows, those that only fill up a share counted too."""
        return len(self._chosen)

    def share(self, rank: int, world_size: int) -> ValidationSet:
        """Every `world_size`-th window, from number `rank` on.

        All shares have the same length, so that ranks which work together in each forward pass make equally
        many; the targets of the windows that fill up the shorter ones are IGNORE_INDEX.
        """
        count = -(-len(self) // world_size)
        chosen = self._chosen[rank::world_size]
        share = copy.copy(self)
        share._chosen = np.concatenate([chosen, np.full(count - len(chosen), _FILLING)])
        share.weight = count * world_size / len(self)
        return share

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Inputs and targets, int64 (batch_size, block_size); the last batch may be smaller."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: expected at least 1")
        for first in range(0, len(self), batch_size):
            chosen = self._chosen[first : first + batch_size]
            x, y = _split(self._windows.read(np.maximum(chosen, 0)))
            y[chosen == _FILLING] = IGNORE_INDEX
            yield x, y
