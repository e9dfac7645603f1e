"""Weights from elsewhere: other runs, and what other projects write (`fastgpt.formats`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from fastgpt import checkpoint
from fastgpt.config import GPTConfig
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import InputError
from fastgpt.formats import hugging_face, llmc, nanogpt
from fastgpt.formats.weights import Pretrained
from fastgpt.model import GPT

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
Source = Pretrained | checkpoint.Checkpoint


def read_pretrained(source: str) -> Source:
    """Weights of a run or checkpoint folder, of another project's file or folder, or gpt2, gpt2-medium, ...

    Raises:
        InputError: none of these, a damaged checkpoint, or a network that is not GPT-2's.
    """
    path = Path(source)
    if (path / checkpoint.SUMS).exists():
        return checkpoint.load(path)
    if hugging_face.is_folder(path):
        return hugging_face.read(path)
    if (path / nanogpt.CHECKPOINT).exists():
        return nanogpt.read(path / nanogpt.CHECKPOINT)
    if path.is_dir():
        return checkpoint.load(checkpoint.find(path))
    if path.is_file() and path.suffix == ".pt":
        return nanogpt.read(path)
    if path.is_file() and path.suffix == ".bin":
        return llmc.read(path)
    if source in HUB_NAMES:
        return hugging_face.read(_download(source))
    raise InputError(
        f"{source!r}: expected the folder of a run or of a checkpoint, a Hugging Face GPT-2 folder "
        f"({hugging_face.CONFIG} and {hugging_face.WEIGHTS}, in one file or several), a .pt file of nanoGPT, "
        f"a .bin file of llm.c, or one of {', '.join(HUB_NAMES)}"
    )


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"downloading {name} needs huggingface_hub: pip install 'fastgpt[data]'") from None
    try:
        folder = snapshot_download(
            f"openai-community/{name}",
            allow_patterns=[hugging_face.CONFIG, hugging_face.WEIGHTS],
            etag_timeout=10,
        )
    except Exception as error:  # the hub's client raises many unrelated types
        raise InputError(f"could not download {name} from the Hugging Face hub: {error}") from error
    return Path(folder)


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer to read and write text with.

    Raises:
        InputError: the file does not say which it is, or fastgpt does not have it.
    """
    if source.tokenizer is None:
        raise InputError(
            f"{source.path} has a vocabulary of {source.config.vocab_size} tokens, of a tokenizer that "
            "fastgpt does not have: it can be loaded from Python, but not read or write text"
        )
    return source.tokenizer


def load_weights(model: GPT, source: Source) -> None:
    """Copy the weights into `model`, whose context may be shorter and whose dropout may differ.

    Raises:
        InputError: the shapes differ otherwise; the message names the fields.
    """
    have, want = source.config, model.config
    differing = [
        f.name
        for f in dataclasses.fields(GPTConfig)
        if f.name not in ("dropout", "block_size") and getattr(have, f.name) != getattr(want, f.name)
    ]
    if want.block_size > have.block_size:
        differing.append("block_size")
    if differing:
        theirs = ", ".join(f"{name} = {getattr(have, name)}" for name in differing)
        ours = ", ".join(f"{name} = {getattr(want, name)}" for name in differing)
        raise InputError(
            f"the weights in {source.path} have {theirs}, but this run has {ours}: set it to match"
        )
    weights = dict(source.model)
    _check_names(model, weights, source.path)
    if want.position == "learned":
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: want.block_size]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{source.path}: {' '.join(str(error).split())}") from error


def _check_names(model: GPT, weights: dict[str, Tensor], path: Path) -> None:
    missing, unknown = model.state_dict().keys() - weights.keys(), weights.keys() - model.state_dict().keys()
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has what GPT-2 has not:", unknown)
        raise InputError(f"{path} {what} {sorted(names)[0]} ({len(names)} such tensors)")


def model_from(source: Source, *, block_size: int | None = None, dropout: float | None = None) -> GPT:
    """A GPT with these weights, on the CPU in fp32, ready to be evaluated; else as `GPT.from_pretrained`."""
    config = source.config
    if block_size is not None:
        config = dataclasses.replace(config, block_size=block_size)
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    model = GPT(config)
    load_weights(model, source)
    return model.eval()
