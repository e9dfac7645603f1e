"""nanoGPT's `ckpt.pt`, written by its train.py: a dictionary with `model`, `model_args` and more.

It is read without running code from the file (torch.load with weights_only). The file does not say which
activation the network has: it is taken to be erf GELU, nanoGPT's own. A vocabulary of 50304 is GPT-2's,
rounded up.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import GPTConfig
from fastgpt.data.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer
from fastgpt.errors import InputError
from fastgpt.formats.weights import HEAD, TOKEN_EMBEDDING, Pretrained, guess_tokenizer, pad_vocabulary

CHECKPOINT = "ckpt.pt"
_ROUNDED_UP = 50304  # the default vocab_size of nanoGPT's model.py
_COMPILED = "_orig_mod."  # before each name, where the model had been through torch.compile


def read(path: Path) -> Pretrained:
    """The network of a `ckpt.pt`; for characters, their `meta.pkl` may be put beside it.

    Raises:
        InputError: not such a file, or one that holds more than tensors, numbers and strings.
    """
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        args, state = saved["model_args"], saved["model"]
        config = _config(args)
        weights = {name.removeprefix(_COMPILED): tensor for name, tensor in state.items()}
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path} is not a checkpoint of nanoGPT: {type(error).__name__}: {reason}"
        ) from error
    for name in [name for name in weights if name.endswith(".attn.bias")]:
        del weights[name]  # the causal mask, a buffer where there was no flash attention
    head, embedding = weights.pop(HEAD, None), weights.get(TOKEN_EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise InputError(f"{path}: lm_head is not tied to the token embedding, as it is in nanoGPT")
    pad_vocabulary(weights, config)
    meta = path.with_name("meta.pkl")
    return Pretrained(
        path, config, weights, _characters(meta) if meta.exists() else guess_tokenizer(config.vocab_size)
    )


def _config(args: dict[str, Any]) -> GPTConfig:
    vocab_size = args["vocab_size"]
    return GPTConfig(
        vocab_size=GPT2Tokenizer.vocab_size if vocab_size == _ROUNDED_UP else vocab_size,
        block_size=args["block_size"],
        n_layer=args["n_layer"],
        n_head=args["n_head"],
        n_embd=args["n_embd"],
        dropout=args.get("dropout", 0.0),
        bias=args.get("bias", True),
        activation="gelu_erf",
    )


class _PlainUnpickler(pickle.Unpickler):
    """Dictionaries, numbers and strings only: looking up functions is what lets a pickle run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, and only plain data is read")


def _characters(path: Path) -> Tokenizer:
    """The tokenizer of nanoGPT's data/shakespeare_char/meta.pkl: `stoi` maps characters to ids."""
    try:
        with path.open("rb") as file:
            stoi = _PlainUnpickler(file).load()["stoi"]
        tokenizer = CharTokenizer("".join(stoi))
        as_ours = tokenizer.encode("".join(stoi)).tolist() == list(stoi.values())
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not nanoGPT's meta.pkl: {error}") from error
    if not as_ours:
        raise InputError(f"{path}: its characters are not numbered in sorted order, as nanoGPT's are")
    return tokenizer
