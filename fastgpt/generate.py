"""Sampling text from a model."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import torch
from torch import Tensor

from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import InputError
from fastgpt.evaluate import evaluating
from fastgpt.model import GPT, KVCache


def choose(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id per row of logits.

    Args:
        logits: (B, vocab_size).
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens.
        top_p: only the most likely tokens that together reach this probability (Holtzman et al., arXiv
            1904.09751); applied after top_k.
        generator: of random numbers, on the device of the logits.

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
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield one new token per sequence at a time.

    The model sees the last block_size tokens. Until the context is full a KV cache makes each step one row
    of work; past that every position shifts with each token, so the whole window is computed again, exactly
    as without a cache.

    Args:
        model: used as it is, in evaluation mode.
        idx: (B, T) prompt, T >= 1.
        max_new_tokens: how many to yield.
        temperature, top_k, top_p, generator: as in `choose`.
        use_cache: False computes the whole window for every token.

    Yields:
        (B,) int64.
    """
    if idx.size(1) == 0:
        raise InputError("the prompt is empty: it must have at least one token")
    block_size = model.config.block_size
    idx = idx[:, -block_size:]
    cache = KVCache(model.config, idx.size(0), device=idx.device, dtype=model.token_embedding.dtype)
    for _ in range(max_new_tokens):
        # entered anew for each token: a generator must not leave gradients off in its caller between yields
        with evaluating(model):
            if use_cache and idx.size(1) <= block_size:
                x = model.hidden(idx[:, cache.length :], cache)
            else:
                x = model.hidden(idx[:, -block_size:])
            token = choose(
                model.logits(x[:, -1]), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
        idx = torch.cat([idx[:, -block_size:], token[:, None]], dim=1)
        yield token


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


def sample_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, *, temperature: float = 0.8, seed: int
) -> str:
    """The prompt and one continuation, on the model's device, without touching the global generators."""
    device = model.token_embedding.device
    generator = torch.Generator(device).manual_seed(seed)
    idx = encode_prompt(tokenizer, prompt)[None].to(device)
    tokens = generate(model, idx, max_new_tokens, temperature=temperature, generator=generator)
    return prompt + "".join(stream_text(tokenizer, tokens))


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
