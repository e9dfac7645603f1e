"""`fastgpt export`: a trained model in the formats of other projects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

LLMC_FILE = "model.bin"


@dataclass
class ExportArgs:
    """Write a model for transformers (a Hugging Face folder) or for llm.c (a .bin file)."""

    run: Positional[str]
    """A run (its best checkpoint), a checkpoint, or anything else that `fastgpt sample` reads."""
    to: Literal["hf", "llmc"]
    """`hf`: what GPT2LMHeadModel and AutoTokenizer load; `llmc`: what llm.c's train_gpt2 loads with -e."""
    out: Path
    """The folder to write; it must not exist yet."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the weights in the file; bf16 halves it and rounds them."""


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse

    given = parse(ExportArgs, args, "export")
    import torch

    from fastgpt.errors import InputError
    from fastgpt.formats import hugging_face, llmc
    from fastgpt.pretrained import read_pretrained, tokenizer_of

    if given.out.exists():
        raise InputError(f"{given.out} exists: choose another --out, or delete it")
    source = read_pretrained(given.run)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.dtype]
    if given.to == "hf":
        hugging_face.write(given.out, source.config, source.model, tokenizer_of(source), dtype)
        written = given.out
    else:
        written = given.out / LLMC_FILE
        llmc.write(written, source.config, source.model, dtype)
    print(f"{source.path} -> {written} ({given.dtype})")
