"""Sampling text from a model."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import InputError
from fastgpt.evaluate import evaluating
from fastgpt.graphs import CapturedStep, can_capture
from fastgpt.model import GPT, KVCache, StaticCache


def choose(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """One token id per row of logits.

    Args:
        logits: (B, vocab_size).
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens.
        top_p: only the most likely tokens that together reach this probability (Holtzman et al., arXiv
            1904.09751); applied after top_k.
        generator: of random numbers, on the device of the logits; or one for each row.

    Returns:
        (B,) int64.

    Raises:
        InputError: temperature < 0, top_k < 1, or top_p outside (0, 1].
    """
    if temperature < 0:
        raise InputError(f"temperature = {temperature}: it must be at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k = {top_k}: it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p = {top_p}: it must be greater than 0 and at most 1")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None:
        ordered, index = probs.sort(descending=True, stable=True)  # (B, V)
        above = ordered.cumsum(-1) - ordered  # the probability of all tokens more likely than this one
        probs = torch.zeros_like(probs).scatter(-1, index, ordered.masked_fill(above >= top_p, 0))
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    rows = zip(probs, generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    graph: bool | None = None,
) -> Iterator[Tensor]:
    """Yield one new token per sequence at a time.

    The model sees the last block_size tokens. Until the context is full a KV cache makes each step one row
    of work; past that every position shifts with each token, so the whole window is computed again, exactly
    as without a cache. On CUDA the steps with a cache are replayed as a CUDA graph, once three have run.

    Args:
        model: used as it is, in evaluation mode.
        idx: (B, T) prompt, T >= 1.
        max_new_tokens: how many to yield.
        temperature, top_k, top_p, generator: as in `choose`.
        vocab_size: only ids below it, where the tokenizer has fewer than the model.
        use_cache: False computes the whole window for every token.
        graph: False launches every step anew, on CUDA too; None is True where there are CUDA graphs.

    Yields:
        (B,) int64.

    Raises:
        InputError: the prompt is empty, an option is out of range, or graph is True without CUDA or a cache.
    """
    if idx.size(1) == 0:
        raise InputError("the prompt is empty: it must have at least one token")
    if graph and not (use_cache and can_capture(idx.device)):
        raise InputError(
            f"graph = True on {idx.device} with use_cache = {use_cache}: CUDA graphs need an NVIDIA GPU, and "
            "replay steps with a cache; leave graph out"
        )
    graph = use_cache and can_capture(idx.device) and graph is not False
    block_size = model.config.block_size
    idx = idx[:, -block_size:]
    cache = KVCache(
        model.config,
        idx.size(0),
        device=idx.device,
        dtype=model.token_embedding.dtype,
        capacity=min(block_size, idx.size(1) + max_new_tokens),
    )
    step: CapturedStep | None = None
    for _ in range(max_new_tokens):
        # entered anew for each token: a generator must not leave gradients off in its caller between yields
        with evaluating(model):
            if not use_cache or idx.size(1) > block_size:
                logits = model.logits(model.hidden(idx[:, -block_size:])[:, -1])
            elif graph and cache.length:  # the prompt is in the cache
                step = step or captured_decode(model, StaticCache(cache))
                logits = step(idx[:, -1])
            else:
                logits = model.logits(model.hidden(idx[:, cache.length :], cache)[:, -1])
            logits = logits[:, :vocab_size]
            token = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        idx = torch.cat([idx[:, -block_size:], token[:, None]], dim=1)
        yield token


def captured_decode(model: GPT, cache: StaticCache) -> CapturedStep:
    """`model.decode` with that cache as a CUDA graph: a function of the token ids (B,)."""
    return CapturedStep(lambda token: model.decode(token, cache), cache.k.device)


def stream_text(tokenizer: Tokenizer, tokens: Iterator[Tensor]) -> Iterator[str]:
    """The text of one sequence as its tokens come, up to end-of-text.

    A character whose bytes are spread over several tokens is held back until it is whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token.item() == tokenizer.eot:
            break
        yield decoder.decode(tokenizer.decode_bytes([int(token)]))
    yield decoder.decode(b"", final=True)


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    seeds: Sequence[int],
    batch_size: int = 16,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
    graph: bool | None = None,
) -> Iterator[Iterator[str]]:
    """Yield one continuation for each seed, computed in batches; each is the text in pieces.

    Every row draws from a generator of its own, so that a seed's text does not depend on the others (but for
    rounding: another batch size may add up in another order). A batch of one comes as it is written, a larger
    one when all of it is: after max_new_tokens, or when each row has reached end-of-text.

    Args:
        model: used as it is, in evaluation mode, on the device of the prompt.
        tokenizer: of the prompt.
        prompt: (T,) ids.
        max_new_tokens: the longest continuation.
        seeds: one for each continuation.
        batch_size: continuations at once.
        temperature, top_k, top_p, use_cache, graph: as in `generate`.
    """
    for first in range(0, len(seeds), batch_size):
        generators = [
            torch.Generator(prompt.device).manual_seed(s) for s in seeds[first : first + batch_size]
        ]
        tokens = generate(
            model,
            prompt.expand(len(generators), -1),
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generators,
            vocab_size=tokenizer.vocab_size,
            use_cache=use_cache,
            graph=graph,
        )
        if len(generators) == 1:
            yield stream_text(tokenizer, tokens)
        else:
            for row in until_all_ended(tokens, tokenizer.eot).unbind():
                yield stream_text(tokenizer, iter(row))


def until_all_ended(tokens: Iterator[Tensor], eot: int | None) -> Tensor:
    """(B, n) ids from n times (B,): all of them, or up to where each row has had an end-of-text."""
    columns: list[Tensor] = []
    ended: Tensor | None = None
    for token in tokens:
        columns.append(token)
        if eot is not None:
            ended = token == eot if ended is None else ended | (token == eot)
            if ended.all():
                break
    return torch.stack(columns, dim=1).cpu()


def sample_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    seed: int,
    graph: bool | None = None,
) -> str:
    """The prompt and one continuation, on the model's device, without touching the global generators."""
    idx = encode_prompt(tokenizer, prompt).to(model.token_embedding.device)
    (pieces,) = generate_texts(
        model, tokenizer, idx, max_new_tokens, seeds=[seed], temperature=temperature, graph=graph
    )
    return prompt + "".join(pieces)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """(T,) ids. An empty prompt is what starts a document: end-of-text, else a newline, else token 0."""
    if prompt:
        return torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    if tokenizer.eot is not None:
        return torch.tensor([tokenizer.eot])
    try:
        return torch.from_numpy(tokenizer.encode("\n").astype("int64"))
    except InputError:  # a character vocabulary without a newline
        return torch.tensor([0])
