"""What every format is read into and written from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.data.tokenizers import GPT2Tokenizer, Tokenizer
from fastgpt.errors import InputError

_GPT2 = {"position": "learned", "norm": "layer_norm", "qk_norm": False}  # which no format can say otherwise
TOKEN_EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Pretrained:
    """A network's shape, its weights by fastgpt's names, and the tokenizer it was trained with.

    Matrices of one row per token have padded_vocab_size rows. The tokenizer is None where the file does not
    say, or where fastgpt does not have it.
    """

    path: Path
    config: GPTConfig
    model: dict[str, Tensor]
    tokenizer: Tokenizer | None


def require_gpt2(
    config: GPTConfig, owner: str, activations: Iterable[str], *, tied: bool = False, hint: str
) -> None:
    """That a format can hold the network.

    Args:
        config: of the network.
        owner: whose format it is, for the message.
        activations: those it has.
        tied: whether its head is always tied to the token embedding.
        hint: what else to do, for the message.

    Raises:
        InputError: it cannot; the message names all the fields at once.
    """
    allowed: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in _GPT2.items()}
    allowed["activation"] = tuple(dict.fromkeys(activations))
    if tied:
        allowed["tied_head"] = (True,)
    wrong = {name: values for name, values in allowed.items() if getattr(config, name) not in values}
    if wrong:
        ours = ", ".join(f"{name} = {getattr(config, name)}" for name in wrong)
        theirs = ", ".join(f"{name} = {' or '.join(map(str, values))}" for name, values in wrong.items())
        raise InputError(f"this network has {ours}, and {owner}'s only {theirs}: {hint}")


def guess_tokenizer(vocab_size: int) -> Tokenizer | None:
    """Of a file that names none: GPT-2's, if the vocabulary holds it (some have added tokens at its end)."""
    return GPT2Tokenizer() if vocab_size >= GPT2Tokenizer.vocab_size else None


def pad_vocabulary(weights: dict[str, Tensor], config: GPTConfig) -> None:
    """Cut or extend the matrices of one row per token, in place, to vocab_size rows and zeros below them."""
    for name in (TOKEN_EMBEDDING, HEAD):
        if name in weights:
            rows = weights[name][: config.vocab_size]
            padding = rows.new_zeros(config.padded_vocab_size - rows.size(0), rows.size(1))
            weights[name] = torch.cat([rows, padding])


def with_biases(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """For formats that always have biases: zeros where the network has none, which computes the same."""
    biases = {
        name.removesuffix("weight") + "bias": weight.new_zeros(weight.size(0))
        for name, weight in weights.items()
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and not config.bias
    }
    return weights | biases
