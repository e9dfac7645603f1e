"""Weights from elsewhere: other runs, and GPT-2 as Hugging Face stores it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgpt import checkpoint
from fastgpt.config import GPTConfig
from fastgpt.data.tokenizers import GPT2Tokenizer, Tokenizer
from fastgpt.errors import InputError
from fastgpt.model import GPT

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_erf", "relu": "relu"}
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class Pretrained:
    """A network's shape, its weights by fastgpt's names, and the tokenizer it was trained with."""

    path: Path
    config: GPTConfig
    model: dict[str, Tensor]
    tokenizer: Tokenizer


def read_pretrained(source: str) -> Pretrained | checkpoint.Checkpoint:
    """Weights of a run or checkpoint folder, a Hugging Face GPT-2 folder, or gpt2, gpt2-medium, ...

    Raises:
        InputError: none of these, a damaged checkpoint, or a network that is not GPT-2's.
    """
    path = Path(source)
    if (path / "config.json").exists() and (path / "model.safetensors").exists():
        if (path / checkpoint.SUMS).exists():
            return checkpoint.load(path)
        return _read_hugging_face(path)
    if path.is_dir():
        return checkpoint.load(checkpoint.find(path))
    if source in HUB_NAMES:
        return _read_hugging_face(_download(source))
    raise InputError(
        f"init_from = {source!r}: expected the folder of a run, of a checkpoint, or of a Hugging Face GPT-2 "
        f"(config.json and model.safetensors), or one of {', '.join(HUB_NAMES)}"
    )


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"downloading {name} needs huggingface_hub: pip install 'fastgpt[data]'") from None
    try:
        folder = snapshot_download(
            f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"], etag_timeout=10
        )
    except Exception as error:  # the hub's client raises many unrelated types
        raise InputError(f"could not download {name} from the Hugging Face hub: {error}") from error
    return Path(folder)


def _read_hugging_face(path: Path) -> Pretrained:
    config = _config_from_hugging_face(json.loads((path / "config.json").read_text()), path)
    weights = {}
    for hf_name, tensor in load_file(path / "model.safetensors").items():
        name = hf_name if hf_name.startswith(("transformer.", "lm_head.")) else f"transformer.{hf_name}"
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, stored as a buffer by older versions
        weights[name] = tensor.t().contiguous() if name.endswith(_CONV1D) else tensor
    wte = weights["transformer.wte.weight"]
    head = weights.pop("lm_head.weight", wte)
    if head.shape != wte.shape or not torch.equal(head, wte):
        raise InputError(f"{path}: its lm_head is not tied to the token embedding, as it is in GPT-2")
    weights["transformer.wte.weight"] = _pad_rows(wte, config.padded_vocab_size)
    return Pretrained(path, config, weights, GPT2Tokenizer())


def _config_from_hugging_face(hf: dict[str, Any], path: Path) -> GPTConfig:
    expected = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "n_inner": None, "scale_attn_weights": True}
    for key, value in expected.items():
        if hf.get(key, value) not in (value, 4 * hf["n_embd"] if key == "n_inner" else value):
            raise InputError(f"{path}/config.json: {key} = {hf[key]!r}, but GPT-2 has {value!r}")
    activation = hf.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"{path}/config.json: activation_function = {activation!r}: fastgpt has {known}")
    return GPTConfig(
        vocab_size=hf["vocab_size"],
        block_size=hf["n_positions"],
        n_layer=hf["n_layer"],
        n_head=hf["n_head"],
        n_embd=hf["n_embd"],
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
    )


def _pad_rows(weight: Tensor, rows: int) -> Tensor:
    """(V, C) -> (rows, C), zeros below."""
    return torch.cat([weight, weight.new_zeros(rows - weight.size(0), weight.size(1))])


def load_weights(model: GPT, source: Pretrained | checkpoint.Checkpoint) -> None:
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
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: want.block_size]
    model.load_state_dict(weights)


def model_from(source: Pretrained | checkpoint.Checkpoint) -> GPT:
    """A GPT with these weights, on the CPU in fp32, ready to be evaluated."""
    model = GPT(source.config)
    load_weights(model, source)
    return model.eval()
