"""Sampling: the cache changes nothing, the options do what they say, and no padded id ever comes out."""

from __future__ import annotations

from collections.abc import Iterator

import fake_cuda
import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.data import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import InputError
from fastgpt.generate import choose, encode_prompt, generate, generate_texts, sample_text, stream_text
from fastgpt.graphs import WARM_UP

MUTANTS = {
    "fastgpt/model.py": [
        ("start = 0 if cache is None else cache.length", "start = 0"),
        ("index_select(0, cache.position)", "index_select(0, cache.length)"),
        ("        cache.advance()\n", ""),
        ("self._places.add_(1)", "self._places += int(self._places[0] < 9)"),
        ("keys.index_copy_(1, self.position, k", "keys.index_copy_(1, self.length, k"),
        ("values.index_copy_(1, self.position, v", "values.index_copy_(1, 0 * self.position, v"),
        ("(q, keys, values, self.length)", "(q, keys, values, self.position)"),
    ],
    "fastgpt/cli.py": [("graph=None if given.graph else False", "graph=None", "tests/test_cli.py")],
    "fastgpt/generate.py": [
        ("above >= top_p", "above > 1.5 * top_p"),
        ("for row, own in rows", "for row, _ in rows for own in [generator[0]]"),
        ("if ended.all():", "if ended.any():"),
        ("logits = logits[:, :vocab_size]", "pass"),
        ("step = step or captured_decode", "step = captured_decode"),
        ("logits = step(idx[:, -1])", "logits = step(idx[:, 0])"),
        ("idx.size(1) > block_size:\n", "idx.size(1) >= block_size:\n"),
        ("and graph is not False", ""),
        ("graph=graph,\n        )\n        if", ")\n        if"),
    ],
}

CONFIG = GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():  # sharp, context-dependent predictions: greedy text of initial weights is constant
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def run(model: GPT, prompt: torch.Tensor, count: int, **options: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack(list(generate(model, prompt, count, generator=generator, **options)), dim=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt_length", [1, 5, 16, 23])
def test_cache_gives_the_same_tokens_past_the_block_size(
    model: GPT, temperature: float, prompt_length: int
) -> None:
    prompt = torch.randint(65, (3, prompt_length), generator=torch.Generator().manual_seed(2))
    cached = run(model, prompt, 40, temperature=temperature)
    plain = run(model, prompt, 40, temperature=temperature, use_cache=False)
    assert torch.equal(cached, plain)
    assert cached.unique().numel() > 5  # not some fixed point that any bug would reach too


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.FakeCuda:
    return fake_cuda.install(monkeypatch, "fastgpt.generate")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("batch", "prompt_length"), [(1, 1), (3, 1), (3, 5), (1, 13), (3, 16), (3, 23)])
def test_a_graph_writes_the_same_tokens_past_the_block_size(
    model: GPT, cuda: fake_cuda.FakeCuda, temperature: float, batch: int, prompt_length: int
) -> None:
    """The prompt as ever; three steps and a capture, which writes nothing; replays up to the full context."""
    prompt = torch.randint(65, (batch, prompt_length), generator=torch.Generator().manual_seed(2))
    graph = run(model, prompt, 40, temperature=temperature)
    plain = run(model, prompt, 40, temperature=temperature, graph=False)
    assert torch.equal(graph, plain)
    assert graph.unique().numel() > 3
    steps = max(16 - prompt_length, 0)  # after the prompt, until the context is full
    waits, replays = 2 * min(steps, WARM_UP), max(steps - WARM_UP, 0)
    assert cuda.log == ["wait"] * waits + ["capture"] * (replays > 0) + ["replay"] * replays


def test_a_short_text_needs_no_more_than_it_has(model: GPT, cuda: fake_cuda.FakeCuda) -> None:
    """The cache has a place for all that is read again and no more; one token needs no step at all."""
    prompt = torch.tensor([[3, 1, 4]])
    assert torch.equal(run(model, prompt, 8), run(model, prompt, 8, use_cache=False))
    assert cuda.log.count("replay") == 7 - WARM_UP
    cuda.log.clear()
    run(model, prompt, 1)
    assert cuda.log == []


def test_nothing_is_captured_where_it_is_not_wanted(model: GPT, cuda: fake_cuda.FakeCuda) -> None:
    for options in ({"graph": False}, {"use_cache": False}):
        run(model, torch.tensor([[3, 1, 4]]), 12, **options)
    texts(model, seeds=[1], graph=False)
    assert cuda.log == []
    texts(model, seeds=[1])
    assert "replay" in cuda.log


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_graph_that_cannot_be_is_refused(model: GPT, use_cache: bool) -> None:
    with pytest.raises(InputError, match="graph = True on cpu .* CUDA graphs need an NVIDIA GPU"):
        run(model, torch.tensor([[3]]), 2, graph=True, use_cache=use_cache)


def test_greedy_matches_a_plain_loop_over_forward(model: GPT) -> None:
    prompt = torch.tensor([[3, 1, 4]])
    idx = prompt
    model.eval()
    for _ in range(30):
        logits = model(idx[:, -16:])[0][:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(run(model, prompt, 30, temperature=0.0), idx[:, 3:])


def test_generation_leaves_the_model_and_global_generators_alone(model: GPT) -> None:
    model.train()
    before = torch.get_rng_state()
    stream = generate(model, torch.tensor([[1]]), 3, generator=torch.Generator().manual_seed(1))
    next(stream)
    assert torch.is_grad_enabled()
    assert model.training
    list(stream)
    assert torch.equal(torch.get_rng_state(), before)


def test_padded_ids_never_come_out(model: GPT) -> None:
    with torch.no_grad():
        saved = model.token_embedding[65:].clone()
        model.token_embedding[65:] = 1e3  # they would win every draw
    ids = run(model, torch.zeros(4, 1, dtype=torch.long), 50, temperature=5.0)
    with torch.no_grad():
        model.token_embedding[65:] = saved
    assert ids.max() < 65


def draws(logits: torch.Tensor, count: int = 4000, **options: object) -> torch.Tensor:
    """How often each token is chosen."""
    generator = torch.Generator().manual_seed(0)
    chosen = choose(logits.expand(count, -1), generator=generator, **options)
    return torch.bincount(chosen, minlength=logits.size(-1)) / count


def test_temperature_top_k_and_top_p() -> None:
    probs = torch.tensor([[0.4, 0.05, 0.3, 0.25]])
    logits = probs.log()
    torch.testing.assert_close(draws(logits), probs[0], atol=0.03, rtol=0)
    sharper = probs[0].pow(2) / probs.pow(2).sum()
    torch.testing.assert_close(draws(logits, temperature=0.5), sharper, atol=0.03, rtol=0)
    top_two = torch.tensor([4 / 7, 0, 3 / 7, 0])
    torch.testing.assert_close(draws(logits, top_k=2), top_two, atol=0.03, rtol=0)
    torch.testing.assert_close(draws(logits, top_p=0.7), top_two, atol=0.03, rtol=0)
    three = torch.tensor([0.4, 0, 0.3, 0.25]) / 0.95
    torch.testing.assert_close(draws(logits, top_p=0.71), three, atol=0.03, rtol=0)
    assert draws(logits, top_p=1e-9)[0] == 1  # the most likely token always stays
    assert draws(logits, temperature=0.0)[0] == 1
    assert draws(logits, top_k=1)[0] == 1
    torch.testing.assert_close(draws(logits, top_k=100, top_p=1.0), probs[0], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0: it must be at least 0"),
        ({"top_k": 0}, "top_k = 0: it must be at least 1"),
        ({"top_p": 0.0}, "top_p = 0.0: it must be greater than 0"),
        ({"top_p": 1.5}, "top_p = 1.5: it must be greater than 0 and at most 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose(torch.zeros(1, 4), **options)


def test_an_empty_prompt_tensor_is_refused(model: GPT) -> None:
    with pytest.raises(InputError, match="at least one token"):
        next(generate(model, torch.empty(1, 0, dtype=torch.long), 1))


def as_tokens(ids: list[int]) -> Iterator[torch.Tensor]:
    return (torch.tensor([i]) for i in ids)


def test_streaming_holds_back_half_characters() -> None:
    pieces = list(stream_text(ByteTokenizer(), as_tokens(list("aé€😀b".encode()))))
    assert "".join(pieces) == "aé€😀b"
    assert "\ufffd" not in "".join(pieces)
    assert pieces[1] == ""  # the first byte of é waits for the second
    assert "".join(stream_text(ByteTokenizer(), as_tokens([0x61, 0xC3]))) == "a\ufffd"


def test_streaming_stops_at_end_of_text() -> None:
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode("Hello world").tolist()
    assert "".join(stream_text(tokenizer, as_tokens([*ids, tokenizer.eot, *ids]))) == "Hello world"


def test_an_empty_prompt_starts_a_document() -> None:
    assert encode_prompt(GPT2Tokenizer(), "").tolist() == [50256]
    assert encode_prompt(CharTokenizer("\nab"), "").tolist() == [0]
    assert encode_prompt(CharTokenizer("ab"), "").tolist() == [0]
    assert encode_prompt(ByteTokenizer(), "").tolist() == [10]


def test_sample_text_is_reproducible(model: GPT) -> None:
    tokenizer = CharTokenizer("".join(chr(33 + i) for i in range(65)))
    first = sample_text(model, tokenizer, "AB", 20, seed=3)
    assert first == sample_text(model, tokenizer, "AB", 20, seed=3)
    assert first != sample_text(model, tokenizer, "AB", 20, seed=4)
    assert first.startswith("AB")
    assert len(first) == 22


ASCII = CharTokenizer("".join(chr(33 + i) for i in range(65)))


def texts(model: GPT, tokenizer: Tokenizer = ASCII, count: int = 40, **options: object) -> list[str]:
    prompt = torch.tensor([3, 1, 4])
    return ["".join(pieces) for pieces in generate_texts(model, tokenizer, prompt, count, **options)]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_batch_writes_what_each_seed_writes_alone(
    model: GPT, batch_size: int, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the block size too; 5 seeds in batches of 2 leave one over, which is streamed."""
    if graph:
        fake_cuda.install(monkeypatch, "fastgpt.generate")
    seeds = range(10, 15)
    alone = [texts(model, seeds=[seed], top_k=20, top_p=0.95)[0] for seed in seeds]
    assert len(set(alone)) == 5
    assert texts(model, seeds=seeds, batch_size=batch_size, top_k=20, top_p=0.95) == alone
    plain = texts(model, seeds=seeds, batch_size=batch_size, top_k=20, top_p=0.95, use_cache=False)
    assert plain == alone


def test_a_batch_stops_when_every_text_has_ended(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = texts(model, seeds=range(3))
    ends = {c: [text.find(c) for text in whole] for c in ASCII.vocab}
    last = next(c for c, places in ends.items() if min(places) >= 0 and len(set(places)) == 3)
    tokenizer = CharTokenizer(ASCII.vocab)
    tokenizer.eot = ASCII.vocab.index(last)  # as if that character ended a text
    steps = []
    monkeypatch.setattr(
        "fastgpt.generate.choose", lambda *args, **options: steps.append(1) or choose(*args, **options)
    )
    assert texts(model, tokenizer, seeds=range(3)) == [text[: text.index(last)] for text in whole]
    assert len(steps) == max(ends[last]) + 1 < 40


def test_only_ids_that_the_tokenizer_has_are_drawn(model: GPT) -> None:
    few = CharTokenizer(ASCII.vocab[:8])
    written = "".join(texts(model, few, seeds=range(3)))
    assert set(written) <= set(few.vocab)
    assert len(set(written)) > 3
