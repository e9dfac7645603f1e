"""Problems made as they are needed: data sets without a file, of which any sample is known by its number.

A family is an operation on all numbers of some lengths. A keyed permutation puts its problems in an order
that never changes; the first of them are held out, and training sees the rest. The samples of a data set are
its families one after the other, each as often as the largest, so that short problems come as often as long
ones.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastgpt.data.arithmetic import END, Problem, addition, backwards, calculation
from fastgpt.data.loader import IGNORE_INDEX, Batch, Loader, ValidationSet, key_from, mix, permute
from fastgpt.data.tokenizers import CharTokenizer
from fastgpt.errors import InputError

DIGITS = 3  # of the longest operands
Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

_SPLIT_KEY = 1337  # which problems are held out, in every run
_HELD_OUT = 10  # one in so many, as long as that is not more than a family's limit


@dataclass(frozen=True)
class Family:
    """Every a of one range with every b of another; at most `limit` problems are held out."""

    operation: str
    a: range
    b: range
    limit: int

    @property
    def size(self) -> int:
        return len(self.a) * len(self.b)

    def count(self, split: Split) -> int:
        """How many of the problems the split has."""
        held_out = min(self.size // _HELD_OUT, self.limit)
        return held_out if split == "val" else self.size - held_out

    def operands(self, numbers: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """a and b of the split's problems of these numbers, int64, the same shape."""
        order = numbers if split == "val" else numbers + self.count("val")
        key = key_from(_SPLIT_KEY, ord(self.operation), len(self.a), len(self.b))
        a, b = np.divmod(permute(order, self.size, key), len(self.b))
        return a + self.a.start, b + self.b.start

    def corners(self) -> list[tuple[int, int]]:
        """Its extreme operands, among which are those of the longest text and of the shortest."""
        return [(a, b) for a in (self.a[0], self.a[-1]) for b in (self.b[0], self.b[-1])]


@dataclass(frozen=True)
class ProblemSet:
    """A data set of problems, with what `TokenDataset` has for training: tokenizer, fingerprint, batches.

    `write` makes the problem of an operation and its operands; `alphabet` has all the characters it uses;
    `read` gives an answer in the way that people write it.
    """

    name: str
    families: tuple[Family, ...]
    write: Callable[[str, int, int], Problem]
    alphabet: str
    read: Callable[[str], str] = str

    @functools.cached_property
    def tokenizer(self) -> CharTokenizer:
        """One token for each character; END ends what is generated."""
        return CharTokenizer(self.alphabet + END, end=END)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for equal problems, written and split in the same way; it looks at some of each split."""
        digest = hashlib.sha256(self.name.encode())
        for split in SPLITS:
            for problem in Rows(self, split, self.lengths[1]).spread(500):
                digest.update(problem.text.encode())
        return digest.hexdigest()

    @functools.cached_property
    def lengths(self) -> tuple[int, int]:
        """Of the shortest and the longest text, in tokens."""
        texts = [self.write(f.operation, a, b).text for f in self.families for a, b in f.corners()]
        return min(map(len, texts)), max(map(len, texts))

    @property
    def prompt(self) -> str:
        """What a prompt looks like."""
        return self.held_out(2)[1].prompt

    def describe(self) -> str:
        train, val = (sum(family.count(split) for family in self.families) for split in SPLITS)
        return (
            f"{train:,} problems to train on and {val:,} held out "
            f"(char, {self.tokenizer.vocab_size} in the vocabulary)"
        )

    def loader(self, block_size: int, batch_size: int, *, seed: int) -> Loader:
        """Rows full of problems. Raises InputError where block_size is too short for one."""
        return Loader(Rows(self, "train", block_size), batch_size, seed=seed)

    def validation(self, block_size: int, *, max_samples: int | None = None) -> ValidationSet:
        """Held-out problems, one a row: all, or so many, spread evenly over the families."""
        return ValidationSet(Rows(self, "val", block_size), max_samples=max_samples)

    def held_out(self, count: int | None = None) -> list[Problem]:
        """The problems of `validation(..., max_samples=count)`."""
        return Rows(self, "val", self.lengths[1]).spread(count)


class Rows:
    """Samples (see `loader.Samples`) of block_size tokens: a problem, and in training more until it is full.

    The loss of a row is that of the solutions: the targets within a prompt are IGNORE_INDEX. The last problem
    of a full row may be cut off.
    """

    def __init__(self, problems: ProblemSet, split: Split, block_size: int) -> None:
        shortest, longest = problems.lengths
        if block_size < longest - 1:
            raise InputError(
                f"block_size is {block_size}: a problem of {problems.name!r} needs {longest - 1} tokens"
            )
        self._set, self._split, self._block_size = problems, split, block_size
        self._span = max(family.count(split) for family in problems.families)
        self.total = self._span * len(problems.families)
        self._most = -(-(block_size + 1) // shortest)  # problems in a row

    def spread(self, count: int | None) -> list[Problem]:
        """All problems, or `count` spread evenly."""
        return self.problems(ValidationSet(self, max_samples=count).chosen)

    def problems(self, numbers: np.ndarray) -> list[Problem]:
        """The problems of these numbers, int64 (n,)."""
        found: list[Problem | None] = [None] * len(numbers)
        which, place = np.divmod(numbers, self._span)
        for number in np.unique(which).tolist():
            family, rows = self._set.families[number], np.flatnonzero(which == number)
            nth = place[rows] * family.count(self._split) // self._span
            a, b = family.operands(nth, self._split)
            for row, x, y in zip(rows.tolist(), a.tolist(), b.tolist(), strict=True):
                found[row] = self._set.write(family.operation, x, y)
        return [problem for problem in found if problem is not None]

    def read(self, numbers: np.ndarray, key: int | None = None) -> Batch:
        """Inputs and targets; with a `key` rows are filled up with problems that it chooses."""
        shape = len(numbers), self._block_size
        x = np.full(shape, self._set.tokenizer.eot, dtype=np.int64)
        y = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        drawn = self._drawn(numbers, key)  # (rows, problems)
        problems = iter(self.problems(drawn.reshape(-1)))
        for row in range(len(numbers)):
            tokens, counted = self._tokens([next(problems) for _ in range(drawn.shape[1])])
            x[row, : len(tokens) - 1] = tokens[:-1]
            y[row, : len(tokens) - 1] = np.where(counted[1:], tokens[1:], IGNORE_INDEX)
        return x, y

    def _drawn(self, numbers: np.ndarray, key: int | None) -> np.ndarray:
        """The numbers of the problems in each row, int64 (rows, problems)."""
        if key is None:
            return numbers[:, None]
        start = mix(numbers.astype(np.uint64) + np.uint64(key))
        more = [mix(start + np.uint64(n)) % np.uint64(self.total) for n in range(1, self._most)]
        return np.stack([numbers, *(each.astype(np.int64) for each in more)], axis=1)

    def _tokens(self, problems: list[Problem]) -> tuple[np.ndarray, np.ndarray]:
        """At most block_size + 1 tokens, and whether each is of a solution."""
        width = self._block_size + 1
        counted = [flag for p in problems for flag in (len(p.prompt), len(p.text) - len(p.prompt))]
        tokens = self._set.tokenizer.encode("".join(p.text for p in problems)).astype(np.int64)
        return tokens[:width], np.repeat(np.arange(len(counted)) % 2 == 1, counted)[:width]


def _calculator() -> ProblemSet:
    lengths = [range(10 ** (n - 1) if n > 1 else 0, 10**n) for n in range(1, DIGITS + 1)]
    families = [Family(operation, a, b, limit=500) for operation in "+-*" for a in lengths for b in lengths]
    divisors = [range(max(1, length.start), length.stop) for length in lengths]
    families += [Family("/", a, b, limit=500) for n, a in enumerate(lengths) for b in divisors[: n + 1]]
    return ProblemSet(
        "calculator", tuple(families), functools.partial(calculation, digits=DIGITS), "0123456789+-*/=:,;<>r"
    )


def _addition() -> ProblemSet:
    numbers = range(10**DIGITS)
    family = Family("+", numbers, numbers, limit=10_000)
    return ProblemSet(
        "addition", (family,), lambda _, a, b: addition(a, b, DIGITS), "0123456789+=", read=backwards
    )


_MADE = {"addition": _addition, "calculator": _calculator}


@functools.cache
def problem_set(name: str) -> ProblemSet:
    """The data set of that name, one of PROBLEM_CORPORA."""
    return _MADE[name]()
