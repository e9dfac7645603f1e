"""The one core of every task: how probable a continuation is, given its context.

    log p(y | x) = sum_i log p(y_i | x, y_1 .. y_{i-1})      in nats

Queries are sorted by length and computed in batches. The first `prefix` tokens of each context, as many as
the shortest of the batch allows, are computed once into a KV cache. The rows after it are the rest of a
context and one of its continuations, padded on the right. Causal attention sees neither padding nor other
rows, so the batch that a query falls into changes only the order in which sums are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.evaluate import evaluating
from fastgpt.model import GPT, KVCache

_CLASSIFIER_ROWS = 1024  # logits held at a time: 200 MB for GPT-2's vocabulary in fp32


@dataclass(frozen=True)
class Query:
    """A context, and what may follow it: token ids, one-dimensional, each at least one long."""

    context: np.ndarray
    continuations: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Score:
    """Of one continuation: its log-probability in nats, its length, and whether greedy decoding writes it."""

    logprob: float
    tokens: int
    greedy: bool


def score(
    model: GPT, queries: Sequence[Query], *, batch_size: int, progress: str | None = None
) -> list[list[Score]]:
    """Scores of every continuation of every query, in their order.

    Args:
        model: where it is; put into evaluation mode meanwhile.
        queries: a context that is too long with its longest continuation loses its beginning.
        batch_size: continuations in a forward pass; a query with more is computed alone.
        progress: what to call the progress bar, which only a terminal shows; None for none.

    Raises:
        InputError: an empty context or continuation, or a continuation longer than block_size.
    """
    cut = [_cut(query, model.config.block_size) for query in queries]
    order = sorted(range(len(cut)), key=lambda i: (len(cut[i].context), _longest(cut[i])), reverse=True)
    scores: list[list[Score]] = [[] for _ in cut]
    with evaluating(model):
        batches = list(_batches(cut, order, batch_size))
        for batch in tqdm(batches, desc=progress, disable=None if progress else True):
            flat = iter(_score_batch(model, [cut[i] for i in batch]))
            for i in batch:
                scores[i] = [next(flat) for _ in cut[i].continuations]
    return scores


def _longest(query: Query) -> int:
    return max(map(len, query.continuations))


def _cut(query: Query, block_size: int) -> Query:
    """The last token is only predicted, so a context and a continuation may have block_size + 1 together."""
    if not len(query.context) or not all(map(len, query.continuations)):
        raise InputError("a context or a continuation has no tokens: each needs at least one")
    room = block_size + 1 - _longest(query)
    if room < 1:
        raise InputError(
            f"a continuation of {_longest(query)} tokens does not fit in block_size = {block_size}"
        )
    return Query(query.context[-room:], query.continuations)


def _batches(queries: list[Query], order: list[int], batch_size: int) -> Iterator[list[int]]:
    """Runs of `order` that have at most batch_size continuations, or a single query."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: expected at least 1")
    batch: list[int] = []
    rows = 0
    for i in order:
        rows += len(queries[i].continuations)
        if batch and rows > batch_size:
            yield batch
            batch, rows = [], len(queries[i].continuations)
        batch.append(i)
    if batch:
        yield batch


def _score_batch(model: GPT, queries: list[Query]) -> list[Score]:
    device = model.token_embedding.device
    contexts = [query.context for query in queries for _ in query.continuations]  # one for each row
    continuations = [y for query in queries for y in query.continuations]
    prefix = 0
    if len(contexts) > len(queries):  # else there is nothing to share
        prefix = min(map(len, contexts)) - 1  # the last token of a context predicts: it stays in the row
    rows = [np.concatenate([x[prefix:], y[:-1]]) for x, y in zip(contexts, continuations, strict=True)]
    width = max(map(len, rows))
    idx = np.zeros((len(rows), width), dtype=np.int64)
    for row, ids in zip(idx, rows, strict=True):
        row[: len(ids)] = ids
    cache = _prefix_cache(model, queries, prefix, prefix + width) if prefix else None
    x = model.hidden(torch.from_numpy(idx).to(device), cache)  # (rows, width, C)
    lengths = [len(y) for y in continuations]
    # The logits at a row's last `length` positions are those of its continuation.
    row = np.repeat(np.arange(len(rows)), lengths)
    column = np.concatenate([np.arange(len(r) - n, len(r)) for r, n in zip(rows, lengths, strict=True)])
    targets = torch.from_numpy(np.concatenate(continuations).astype(np.int64)).to(device)
    logprobs, greedy = _classify(model, x[torch.from_numpy(row), torch.from_numpy(column)], targets)
    ends = np.cumsum(lengths)[:-1]
    return [
        Score(float(part.sum()), len(part), bool(best.all()))
        for part, best in zip(np.split(logprobs, ends), np.split(greedy, ends), strict=True)
    ]


def _prefix_cache(model: GPT, queries: list[Query], prefix: int, capacity: int) -> KVCache:
    """Keys and values of the contexts' first `prefix` tokens, one row for each continuation."""
    embedding = model.token_embedding
    cache = KVCache(
        model.config, len(queries), device=embedding.device, dtype=embedding.dtype, capacity=capacity
    )
    idx = np.stack([query.context[:prefix] for query in queries]).astype(np.int64)
    model.hidden(torch.from_numpy(idx).to(embedding.device), cache)
    counts = [len(query.continuations) for query in queries]
    cache.take(torch.from_numpy(np.repeat(np.arange(len(queries)), counts)).to(embedding.device))
    return cache


def _classify(model: GPT, x: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """log p of each target (N,) given x (N, C), float64, and whether it is the most likely token."""
    logprobs, greedy = [], []
    for part, wanted in zip(x.split(_CLASSIFIER_ROWS), targets.split(_CLASSIFIER_ROWS), strict=True):
        logits = model.logits(part)  # (n, vocab_size)
        logprobs.append(-ops.cross_entropy(logits, wanted, reduction="none").double().cpu())
        greedy.append((logits.argmax(-1) == wanted).cpu())
    return torch.cat(logprobs).numpy(), torch.cat(greedy).numpy()
