"""llm.c's model checkpoints: `write_model` and `write_tensors` in its train_gpt2.py, read in train_gpt2.cu.

A header of 256 little-endian int32 (20240326; version 3 for fp32 or 5 for bf16; block_size, vocab_size,
n_layer, n_head, n_embd, rows of the padded token embedding; zeros), then the tensors without gaps: wte, wpe,
each kind of a block's tensors for all layers, and ln_f. Linear weights are (out, in). Padding rows are zeros.
The network is GPT-2: tanh GELU, biases, tied head.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.errors import InputError
from fastgpt.files import atomic_write
from fastgpt.formats.weights import (
    TOKEN_EMBEDDING,
    Pretrained,
    guess_tokenizer,
    pad_vocabulary,
    require_gpt2,
    with_biases,
)

MAGIC = 20240326
HEADER_INTS = 256
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version


def read(path: Path) -> Pretrained:
    """A `.bin` checkpoint, in its own dtype.

    Raises:
        InputError: another kind of file or version, or a size that does not match the header.
    """
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size < HEADER_INTS or header[0] != MAGIC:
        raise InputError(f"{path} is not a model checkpoint of llm.c: it must start with {MAGIC}")
    version, block_size, vocab_size, n_layer, n_head, n_embd, padded = map(int, header[1:8])
    if version not in DTYPES:
        raise InputError(
            f"{path} has version {version}: fastgpt reads 3 (fp32) and 5 (bf16), with a padded vocabulary"
        )
    if padded < vocab_size:
        raise InputError(f"{path} is damaged: {padded} rows cannot hold a vocabulary of {vocab_size}")
    try:
        config = GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    shapes, dtype = _layout(config, padded), DTYPES[version]
    expected = 4 * HEADER_INTS + dtype.itemsize * sum(math.prod(shape) for _, shape in shapes)
    if path.stat().st_size != expected:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes, but its header describes {expected}: it is cut short"
            " or damaged"
        )
    storage = np.dtype(f"<i{dtype.itemsize}")
    weights = {}
    with path.open("rb") as file:
        file.seek(4 * HEADER_INTS)
        for name, shape in shapes:
            bits = np.fromfile(file, dtype=storage, count=math.prod(shape))
            weights[name] = torch.from_numpy(bits).view(dtype).view(shape)
    pad_vocabulary(weights, config)
    return Pretrained(path, config, weights, guess_tokenizer(vocab_size))


def write(path: Path, config: GPTConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write a `.bin` checkpoint that llm.c trains on and samples from.

    Args:
        path: the file.
        config: of the network.
        weights: by fastgpt's names.
        dtype: float32 or bfloat16, rounded to nearest.

    Raises:
        InputError: the network is not one that llm.c has.
    """
    require_gpt2(config, "llm.c", ["gelu_tanh"], tied=True, hint="--to hf holds more activations and heads")
    weights = with_biases(weights, config)
    pad_vocabulary(weights, config)
    rows = weights[TOKEN_EMBEDDING].size(0)
    header = np.zeros(HEADER_INTS, dtype="<i4")
    version = {of: number for number, of in DTYPES.items()}[dtype]
    shape = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    header[:8] = [MAGIC, version, *shape, rows]
    storage = torch.int32 if dtype == torch.float32 else torch.int16
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        header.tofile(file)
        for name, _ in _layout(config, rows):
            bits = weights[name].detach().to(dtype).contiguous().view(storage).numpy()
            bits.astype(bits.dtype.newbyteorder("<"), copy=False).tofile(file)


def _layout(config: GPTConfig, rows: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors in the order of the file; `rows` are the token embedding's."""
    width = config.n_embd
    block: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (3 * width, width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    return [
        (TOKEN_EMBEDDING, (rows, width)),
        ("transformer.wpe.weight", (config.block_size, width)),
        *(
            (f"transformer.h.{i}.{name}", shape)
            for name, shape in block.items()
            for i in range(config.n_layer)
        ),
        ("transformer.ln_f.weight", (width,)),
        ("transformer.ln_f.bias", (width,)),
    ]
