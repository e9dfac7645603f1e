"""Which samples make up which batch: a function of the seed and the step number, and of nothing else.

Samples are numbered. In each epoch all of them come once each, in an order given by a keyed permutation, so
nothing has to be stored to shuffle, to resume, or to share the work between processes.

The samples of text are windows: every shard is tiled with windows of `block_size + 1` tokens at stride
`block_size` (neighbours share a token: the last target of one is the first input of the next).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from fastgpt.errors import InputError

ROUNDS = 6  # even: the two coordinates end where they began
UINT64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
IGNORE_INDEX = -100  # a target that no loss counts

_FILLING = -1  # in place of a sample's number

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
    keys = [key_from(key, round_) for round_ in range(ROUNDS)]
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
        left, right, a, b = right, (left + mix(right ^ np.uint64(key)) % a) % a, b, a
    return left * b + right


def mix(z: Bits) -> Bits:
    """splitmix64's finaliser: every bit of the result depends on every bit of `z` in [0, 2^64)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & UINT64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & UINT64
    return z ^ (z >> 31)


def key_from(*numbers: int) -> int:
    """One well-mixed number in [0, 2^64) from several of any size and sign."""
    key = 0
    for number in numbers:
        key = mix((key ^ number) + GOLDEN & UINT64)
    return key


class Samples(Protocol):
    """What batches are made of: numbered pairs of inputs and targets."""

    total: int

    def read(self, numbers: np.ndarray, key: int | None = None) -> Batch:
        """Inputs and targets of the samples of these numbers, int64 (len(numbers), block_size) each.

        Training passes a `key`, another one in each epoch, by which they may vary; without it, as in
        validation, they are always the same.
        """


class Windows:
    """Samples of text: windows of `block_size + 1` tokens over shards, numbered shard after shard.

    `shards` are uint16 arrays, `names` what to call them in errors. With a key the tiling of a shard of n
    tokens starts at an offset in [0, (n - 1) % block_size] that it chooses, so that alignments vary and the
    tokens left over are others each time. Raises `InputError` when no shard holds a window, and when reading
    a token outside the vocabulary.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        block_size: int,
        *,
        vocab_size: int,
        names: Sequence[str] = (),
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

    def read(self, numbers: np.ndarray, key: int | None = None) -> Batch:
        """The windows, each target being the next token; a `key` shifts them."""
        shards = np.searchsorted(self.first, numbers, side="right") - 1
        starts = (numbers - self.first[shards]) * self.block_size
        if key is not None:
            noise = mix(shards.astype(np.uint64) + np.uint64(key))
            starts += (noise % (self.slack[shards] + 1).astype(np.uint64)).astype(np.int64)
        tokens = np.empty((len(numbers), self.block_size + 1), dtype=np.int64)
        for row, (shard, start) in enumerate(zip(shards.tolist(), starts.tolist(), strict=True)):
            tokens[row] = self.shards[shard][start : start + self.block_size + 1]
        self._check(tokens, shards)
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()  # each in its own memory

    def _check(self, tokens: np.ndarray, shards: np.ndarray) -> None:
        if tokens.size and tokens.max() >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0]
            raise InputError(
                f"{self.names[shards[row]]} holds token {tokens[row, column]}, outside the vocabulary of "
                f"{self.vocab_size}: the file is corrupt or was made with another tokenizer"
            )


class Loader:
    """Training batches: `batch(step)` depends on the arguments and the step, on nothing else."""

    def __init__(self, samples: Samples, batch_size: int, *, seed: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: expected at least 1")
        self.batch_size = batch_size
        self.seed = seed
        self._samples = samples
        self.samples_per_epoch = samples.total

    def epoch_of(self, step: int) -> float:
        """How many epochs lie before this step."""
        return step * self.batch_size / self.samples_per_epoch

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
            epoch, index = divmod(start, self.samples_per_epoch)
            count = min(rows, self.samples_per_epoch - index)
            order_key, sample_key = key_from(self.seed, epoch, 0), key_from(self.seed, epoch, 1)
            numbers = permute(np.arange(index, index + count), self.samples_per_epoch, order_key)
            parts.append(self._samples.read(numbers, sample_key))
            start, rows = start + count, rows - count
        if len(parts) == 1:
            return parts[0]
        inputs, targets = zip(*parts, strict=True)
        return np.concatenate(inputs), np.concatenate(targets)


class ValidationSet:
    """Fixed samples of the validation split, in order: all, or `max_samples` evenly spread."""

    def __init__(self, samples: Samples, *, max_samples: int | None = None) -> None:
        if max_samples is not None and max_samples < 1:
            raise InputError(f"max_samples is {max_samples}: expected at least 1, or none for all")
        self._samples = samples
        count = min(samples.total, max_samples or samples.total)
        self.chosen = np.arange(count) * samples.total // count
        """Their numbers, int64 (len(self),)."""

    def __len__(self) -> int:
        """The number of samples, those that only fill up a share counted too."""
        return len(self.chosen)

    def share(self, rank: int, world_size: int) -> ValidationSet:
        """Every `world_size`-th sample, from number `rank` on.

        All shares have the same length, so that ranks which work together in each forward pass make equally
        many; the targets of the samples that fill up the shorter ones are IGNORE_INDEX.
        """
        count = -(-len(self) // world_size)
        chosen = self.chosen[rank::world_size]
        share = copy.copy(self)
        share.chosen = np.concatenate([chosen, np.full(count - len(chosen), _FILLING)])
        return share

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Inputs and targets, int64 (batch_size, block_size); the last batch may be smaller."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: expected at least 1")
        for first in range(0, len(self), batch_size):
            chosen = self.chosen[first : first + batch_size]
            x, y = self._samples.read(np.maximum(chosen, 0))
            y[chosen == _FILLING] = IGNORE_INDEX
            yield x, y
