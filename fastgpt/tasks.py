"""HellaSwag, LAMBADA and the perplexity of any text, all as queries to `fastgpt.scoring`.

Ranks share a task: each evaluates every `world_size`-th query (`share`), and what is counted is added up over
them (`total`, as fastgpt.distributed.World.sum) before it is divided. Every rank then has the scores of all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import InputError
from fastgpt.evaluate import Total, alone
from fastgpt.files import read_text
from fastgpt.model import GPT
from fastgpt.scoring import Query, score

BATCH_SIZE = 32  # continuations in a forward pass


def _totals(total: Total, *own: float) -> list[float]:
    """Numbers of this rank, added up over the ranks in float64, in which counts are exact."""
    return total(torch.tensor(own, dtype=torch.float64)).tolist()


@dataclass(frozen=True)
class HellaSwag:
    """Which of four endings a text has (Zellers et al., arXiv 1905.07830).

    `acc` takes the ending of the highest log-probability, `acc_norm` that of the highest log-probability per
    token. An ending is tokenised on its own, with a space before it. Both are as in build-nanogpt's
    hellaswag.py, whose figures for GPT-2 docs/evaluation.md quotes.
    """

    queries: list[Query]
    labels: list[int]

    NAME: ClassVar = "HellaSwag"
    UNIT: ClassVar = "examples"
    HUB: ClassVar = ("Rowan/hellaswag", None, "validation")  # name, configuration, split

    @classmethod
    def open(cls, path: Path | None, tokenizer: Tokenizer, limit: int | None = None) -> HellaSwag:
        """The examples of a jsonl file with `ctx`, `endings` and `label`, or of the hub; at most `limit`.

        Raises:
            InputError: no such file, a line that is not an example, or the hub cannot be reached.
        """
        queries, labels = [], []
        for where, row in _rows(path, cls.HUB, limit):
            try:
                context, endings, label = str(row["ctx"]), list(map(str, row["endings"])), int(row["label"])
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{where} is not a HellaSwag example: {error!r}") from error
            if not context or len(endings) < 2 or not 0 <= label < len(endings):
                raise InputError(f"{where}: it needs a context, endings and the number of the right one")
            parts = (tokenizer.encode(f" {ending}") for ending in endings)
            queries.append(Query(tokenizer.encode(context), tuple(parts)))
            labels.append(label)
        return cls(queries, labels)

    def share(self, rank: int, world_size: int) -> HellaSwag:
        return HellaSwag(self.queries[rank::world_size], self.labels[rank::world_size])

    def evaluate(
        self, model: GPT, *, batch_size: int = BATCH_SIZE, progress: str | None = None, total: Total = alone
    ) -> dict[str, float]:
        """`acc` and `acc_norm`, between 0 and 1; of equally good endings the first is taken."""
        scores = score(model, self.queries, batch_size=batch_size, progress=progress)
        rows = list(zip(scores, self.labels, strict=True))
        right = sum(np.argmax([s.logprob for s in row]) == label for row, label in rows)
        right_norm = sum(np.argmax([s.logprob / s.tokens for s in row]) == label for row, label in rows)
        acc, acc_norm, count = _totals(total, right, right_norm, len(rows))
        return {"acc": acc / count, "acc_norm": acc_norm / count}


@dataclass(frozen=True)
class Lambada:
    """The last word of a passage (Paperno et al., arXiv 1606.06031), in the variant of OpenAI's that
    lm-evaluation-harness calls lambada_openai: text as it was written, cut at the last space.

    `acc` is the share of passages whose last word greedy decoding writes, all of its tokens; `perplexity` is
    exp of the mean over passages of -log p(last word).
    """

    queries: list[Query]

    NAME: ClassVar = "LAMBADA"
    UNIT: ClassVar = "passages"
    HUB: ClassVar = ("EleutherAI/lambada_openai", "default", "test")

    @classmethod
    def open(cls, path: Path | None, tokenizer: Tokenizer, limit: int | None = None) -> Lambada:
        """The passages of a jsonl file with `text`, or of the hub; at most `limit`.

        Raises:
            InputError: no such file, a line that is not a passage, or the hub cannot be reached.
        """
        queries = []
        for where, row in _rows(path, cls.HUB, limit):
            text = row.get("text")
            context, _, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
            if not context or not word:
                raise InputError(f"{where} is not a LAMBADA passage: it needs `text` of two words or more")
            queries.append(Query(tokenizer.encode(context), (tokenizer.encode(f" {word}"),)))
        return cls(queries)

    def share(self, rank: int, world_size: int) -> Lambada:
        return Lambada(self.queries[rank::world_size])

    def evaluate(
        self, model: GPT, *, batch_size: int = BATCH_SIZE, progress: str | None = None, total: Total = alone
    ) -> dict[str, float]:
        scores = [row[0] for row in score(model, self.queries, batch_size=batch_size, progress=progress)]
        greedy, logprob, count = _totals(
            total, sum(s.greedy for s in scores), sum(s.logprob for s in scores), len(scores)
        )
        return {"acc": greedy / count, "perplexity": math.exp(-logprob / count)}


@dataclass(frozen=True)
class Text:
    """Perplexity of one text, by a window of block_size + 1 tokens that moves on by `stride`.

    Each step predicts the `stride` tokens at the window's end from all that is before them in it; the first
    step predicts the whole window. So every token is predicted once, from block_size + 1 - stride tokens
    before it or more (fewer only where the text begins): a small stride is exact and slow, a stride of
    block_size fast and pessimistic. Where the tokenizer has an end-of-text token it goes first, as in
    training; without one the first token has nothing to be predicted from and is left out.
    """

    queries: list[Query]
    n_bytes: int

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer, block_size: int, stride: int | None = None) -> Text:
        """The text of a UTF-8 file. `stride` is half of block_size by default.

        Raises:
            InputError: no such file, not UTF-8, nothing to predict, or a stride outside 1..block_size.
        """
        stride = max(1, block_size // 2) if stride is None else stride
        if not 1 <= stride <= block_size:
            raise InputError(
                f"stride = {stride}: it must be at least 1 and at most block_size = {block_size}"
            )
        text = read_text(path)
        start = [] if tokenizer.eot is None else [tokenizer.eot]
        ids = np.concatenate([np.array(start, dtype=np.uint16), tokenizer.encode(text)])
        if len(ids) < 2:
            raise InputError(f"{path} has {len(ids)} tokens: there is nothing to predict")
        return cls(list(_windows(ids, block_size, stride)), len(text.encode()))

    def share(self, rank: int, world_size: int) -> Text:
        return replace(self, queries=self.queries[rank::world_size])

    def evaluate(
        self, model: GPT, *, batch_size: int = BATCH_SIZE, progress: str | None = None, total: Total = alone
    ) -> dict[str, float]:
        """`loss` in nats a token, its `perplexity`, `bits_per_byte` of UTF-8, and `tokens` predicted."""
        scores = [row[0] for row in score(model, self.queries, batch_size=batch_size, progress=progress)]
        nats, tokens = _totals(total, -sum(s.logprob for s in scores), sum(s.tokens for s in scores))
        return {
            "loss": nats / tokens,
            "perplexity": math.exp(nats / tokens),
            "bits_per_byte": nats / math.log(2) / self.n_bytes,
            "tokens": int(tokens),
        }


def _windows(ids: np.ndarray, block_size: int, stride: int) -> Iterator[Query]:
    end = 1
    while end < len(ids):
        start, end = end, min(len(ids), end + (block_size if end == 1 else stride))
        yield Query(ids[max(0, end - block_size - 1) : start], (ids[start:end],))


def _rows(
    path: Path | None, hub: tuple[str, str | None, str], limit: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first `limit` examples, each with what to call it in errors."""
    found: Iterable[tuple[str, Any]]
    if path is None:
        found = ((f"{hub[0]}, example {n}", row) for n, row in enumerate(_hub_rows(*hub), 1))
    else:
        lines = enumerate(read_text(path).split("\n"), 1)
        found = ((f"{path}, line {n}", line) for n, line in lines if line.strip())
    empty = True
    for where, row in islice(found, limit):
        empty = False
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except ValueError as error:
                raise InputError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object, got {type(row).__name__}")
        yield where, row
    if empty:
        raise InputError(f"{path or hub[0]} holds no examples")


def _hub_rows(name: str, configuration: str | None, split: str) -> Iterable[Any]:
    advice = "or pass a local file with --data FILE.jsonl"
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{name} comes through datasets: pip install 'fastgpt[data]', {advice}") from None
    try:
        return load_dataset(name, configuration, split=split)
    except Exception as error:  # the hub's client raises many unrelated types
        raise InputError(f"could not download {name} from the Hugging Face hub: {error}; {advice}") from error
