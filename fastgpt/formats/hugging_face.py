"""GPT-2 as Hugging Face's transformers stores it: a folder of config.json, safetensors and tokenizer files.

Names are fastgpt's own, but linear weights are (in, out) (its Conv1D), and OpenAI's own files leave out the
`transformer.` before each name and hold the causal mask as a buffer.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import InputError
from fastgpt.formats import hf_tokenizer
from fastgpt.formats.weights import (
    HEAD,
    TOKEN_EMBEDDING,
    Pretrained,
    pad_vocabulary,
    require_gpt2,
    with_biases,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files: which tensor is in which
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "relu": "relu",
    "relu2": "relu2",
}
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_FIXED = {  # what transformers makes a choice and fastgpt does not
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def is_folder(path: Path) -> bool:
    return (path / CONFIG).exists() and ((path / WEIGHTS).exists() or (path / INDEX).exists())


def read(path: Path) -> Pretrained:
    """A folder that transformers wrote, or `write`; weights in their own dtype.

    Raises:
        InputError: a file is missing or damaged, or the network is not GPT-2's.
    """
    settings = _read_json(path / CONFIG)
    config = _config(settings, path / CONFIG)
    weights = {}
    for file in _files(path):
        for name, tensor in _load(file).items():
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the causal mask
            name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            weights[name] = tensor.t().contiguous() if name.endswith(_CONV1D) else tensor
    for name in (TOKEN_EMBEDDING, HEAD):
        if name in weights and weights[name].size(0) != config.vocab_size:
            raise InputError(f"{path}: {name} has {weights[name].size(0)} rows, not {config.vocab_size}")
    if config.tied_head:
        head, embedding = weights.pop(HEAD, None), weights.get(TOKEN_EMBEDDING)
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise InputError(
                f"{path}: its lm_head is not tied to the token embedding, as config.json says it is: set "
                "tie_word_embeddings to false there to keep both"
            )
    pad_vocabulary(weights, config)
    return Pretrained(path, config, weights, hf_tokenizer.read(path, config.vocab_size))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def _files(path: Path) -> list[Path]:
    if not (path / INDEX).exists():
        return [path / WEIGHTS]
    files = [path / name for name in sorted(set(_read_json(path / INDEX).get("weight_map", {}).values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise InputError(f"{path / INDEX} names {missing or 'no files'}: the checkpoint is incomplete")
    return files


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged: {error}") from error


def _config(settings: dict[str, Any], path: Path) -> GPTConfig:
    try:
        shape = {name: settings[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        block_size = settings["n_positions"]
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]} is missing, so it is not GPT-2's") from None
    for key, value in _FIXED.items():
        if settings.get(key, value) not in (value, 4 * shape["n_embd"] if key == "n_inner" else value):
            raise InputError(f"{path}: {key} = {settings[key]!r}, but GPT-2 has {value!r}")
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"{path}: activation_function = {activation!r}: fastgpt has {known}")
    return GPTConfig(
        **shape,
        block_size=block_size,
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        tied_head=settings.get("tie_word_embeddings", True),
    )


def write(
    path: Path, config: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """Write a folder that GPT2LMHeadModel and AutoTokenizer load; padding rows are left out.

    Args:
        path: a folder that does not exist yet or is empty; it appears when all of it is written.
        config: of the network.
        weights: by fastgpt's names.
        tokenizer: that it was trained with.
        dtype: float32 or bfloat16, rounded to nearest.

    Raises:
        InputError: it cannot be written, or the network is not GPT-2's.
    """
    require_gpt2(config, "transformers", _ACTIVATIONS.values(), hint="fastgpt alone can run it")
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.mkdir(parents=True)
        hf_tokenizer.write_json(unfinished / CONFIG, _settings(config, tokenizer.eot, dtype))
        ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
        hf_tokenizer.write_json(unfinished / "generation_config.json", {"_from_model_config": True, **ends})
        hf_tokenizer.write(unfinished, tokenizer, config.block_size)
        tensors = {
            name: _as_stored(name, tensor, config).to(dtype).contiguous()
            for name, tensor in with_biases(weights, config).items()
        }
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})  # transformers asks for it
        unfinished.rename(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"could not write {path}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _as_stored(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    if name in (TOKEN_EMBEDDING, HEAD):
        return tensor[: config.vocab_size]
    return tensor.t() if name.endswith(_CONV1D) else tensor


def _settings(config: GPTConfig, eot: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """config.json, which for GPT-2's own shape is that of the hub."""
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **_FIXED,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": names[config.activation],
        "tie_word_embeddings": config.tied_head,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
