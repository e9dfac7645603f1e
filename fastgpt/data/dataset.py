"""What is trained on, whatever it is made of: the tokens of a text, or problems."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fastgpt.data.corpora import PROBLEM_CORPORA
from fastgpt.data.loader import Loader, ValidationSet
from fastgpt.data.prepare import prepared
from fastgpt.data.problems import problem_set
from fastgpt.data.shards import TokenDataset
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import InputError


class Dataset(Protocol):
    """Batches to train on, and held-out samples to judge by; `TokenDataset` and `ProblemSet` are such.

    Equal `fingerprint`s mean equal data; `prompt` is what a prompt looks like.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    def describe(self) -> str:
        """How much there is of it."""

    def loader(self, block_size: int, batch_size: int, *, seed: int) -> Loader:
        """Training batches of block_size tokens a row."""

    def validation(self, block_size: int, *, max_samples: int | None = None) -> ValidationSet:
        """All held-out samples, or so many, spread evenly: always the same ones."""


def open_dataset(corpus: str | Path, tokenizer: str | Tokenizer, *, val_fraction: float = 0.1) -> Dataset:
    """The data set of that name: one of PROBLEM_CORPORA, or the tokens of a corpus (see `prepared`).

    Problems, and a folder of tokens, bring a tokenizer of their own, whatever name `tokenizer` is. Raises
    `InputError` where it is a tokenizer, that of some weights, and the data has another.
    """
    data: Dataset
    if str(corpus) in PROBLEM_CORPORA:
        data = problem_set(str(corpus))
    else:
        data = TokenDataset.open(prepared(corpus, tokenizer, val_fraction=val_fraction))
    own = data.tokenizer
    if isinstance(tokenizer, Tokenizer) and own != tokenizer:
        raise InputError(
            f"the tokens of {corpus} are of another vocabulary ({own.name}, {own.vocab_size} tokens) than "
            f"the weights' ({tokenizer.name}, {tokenizer.vocab_size} tokens): give text instead, and it is "
            "tokenised to fit"
        )
    return data
