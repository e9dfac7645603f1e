"""The scoring core against a plain forward pass for each continuation, whatever the batch and the prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from weights import gpt

from fastgpt import GPT
from fastgpt.errors import InputError
from fastgpt.model import KVCache
from fastgpt.scoring import Query, Score, score

MUTANTS = {
    "fastgpt/scoring.py": [
        ("np.concatenate([x[prefix:], y[:-1]])", "np.concatenate([x[prefix:], y])"),
        ("min(map(len, contexts)) - 1", "max(map(len, contexts)) - 1"),
        ("query.context[-room:]", "query.context[:room]"),
        ("(logits.argmax(-1) == wanted)", "(logits.argmax(-1) >= wanted)"),
        ("bool(best.all())", "bool(best.any())"),
    ],
    "fastgpt/model.py": [
        (
            "self.k.index_select(1, rows), self.v.index_select(1, rows)",
            "self.k.index_select(1, rows), self.v",
        ),
    ],
}

VOCAB = 65


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> GPT:
    """In float64, where equality means equality and not luck."""
    return gpt(vocab_size=VOCAB, tied_head=request.param).double()


def plain(model: GPT, query: Query) -> list[Score]:
    """Each continuation by its own forward pass over everything that fits."""
    scores = []
    longest = max(map(len, query.continuations))
    context = query.context[-(model.config.block_size + 1 - longest) :]
    for y in query.continuations:
        ids = torch.from_numpy(np.concatenate([context, y]).astype(np.int64))
        with torch.no_grad():
            logprobs = model(ids[None, :-1])[0][0, -len(y) :].log_softmax(-1)
        targets = ids[-len(y) :]
        own = logprobs.gather(1, targets[:, None]).sum().item()
        scores.append(Score(own, len(y), bool((logprobs.argmax(-1) == targets).all())))
    return scores


def queries(model: GPT) -> list[Query]:
    """Contexts from one token to more than fit, one to four continuations, some of them greedy."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(VOCAB, size=length).astype(np.uint16)

    made = [
        Query(ids(int(rng.integers(1, 45))), tuple(ids(n) for n in rng.integers(1, 9, size=k)))
        for k in [4, 1, 2] * 7
    ]
    made += [Query(ids(1), (ids(1),)), Query(ids(40), (ids(32), ids(1)))]
    for length in (1, 20):
        context = torch.from_numpy(ids(length).astype(np.int64))
        with torch.no_grad():
            first = model(context[None])[0][0, -1].argmax()
            second = model(torch.cat([context, first[None]])[None])[0][0, -1].argmax()
        best = np.array([first, second])
        made.append(Query(context.numpy(), (best, np.array([first, (second + 1) % VOCAB]), best[:1])))
    return made


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
def test_scores_are_those_of_one_by_one_whatever_the_batch(model: GPT, batch_size: int) -> None:
    asked = queries(model)
    got = score(model, asked, batch_size=batch_size)
    greedy = 0
    for query, scores in zip(asked, got, strict=True):
        for a, b in zip(scores, plain(model, query), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-11, rel=1e-11)
            assert (a.tokens, a.greedy) == (b.tokens, b.greedy)
            greedy += a.greedy
    assert greedy >= 4


def test_in_fp32_a_score_moves_by_rounding_only() -> None:
    model = gpt(vocab_size=VOCAB)
    asked = queries(model)
    one, many = (score(model, asked, batch_size=size) for size in (1, 64))
    exact = score(model.double(), asked, batch_size=1)
    for rows in zip(one, many, exact, strict=True):
        for a, b, oracle in zip(*rows, strict=True):
            assert abs(a.logprob - oracle.logprob) < 1e-5 * max(1, abs(oracle.logprob))
            assert abs(b.logprob - oracle.logprob) < 1e-5 * max(1, abs(oracle.logprob))


def test_a_context_is_computed_once_for_all_its_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt(vocab_size=VOCAB)
    seen = []
    hidden = model.hidden

    def counting(idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        seen.append(idx.numel())
        return hidden(idx, cache)

    monkeypatch.setattr(model, "hidden", counting)
    context, ending = np.arange(24), np.arange(5)
    score(model, [Query(context, (ending,) * 4)] * 3, batch_size=12)
    assert seen == [3 * 23, 12 * 5]  # the prefix, then the last token of the context with each ending
    seen.clear()
    score(model, [Query(context, (ending,))] * 3, batch_size=12)
    assert seen == [3 * 28]  # nothing to share, so one pass


def test_training_mode_and_gradients_are_as_they_were() -> None:
    model = gpt(vocab_size=VOCAB, dropout=0.5).train()
    asked = [Query(np.arange(5), (np.arange(3), np.arange(4)))]
    assert score(model, asked, batch_size=1) == score(model, asked, batch_size=1)  # no dropout
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query(np.arange(0), (np.arange(1),)), "no tokens"),
        (Query(np.arange(1), (np.arange(1), np.arange(0))), "no tokens"),
        (Query(np.arange(1), (np.arange(33),)), "33 tokens does not fit in block_size = 32"),
    ],
)
def test_impossible_queries_are_refused(query: Query, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(gpt(vocab_size=VOCAB), [query], batch_size=1)


def test_a_batch_of_none_is_refused() -> None:
    queries: list[Any] = [Query(np.arange(1), (np.arange(1),))]
    with pytest.raises(InputError, match="batch_size is 0"):
        score(gpt(vocab_size=VOCAB), queries, batch_size=0)
