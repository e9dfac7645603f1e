"""What every format is read into and written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.data.tokenizers import GPT2Tokenizer, Tokenizer

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
