"""`fastgpt prepare`: text, data files or a data set of the Hugging Face hub, into token shards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from fastgpt.config import TokenizerName, TrainConfig
from fastgpt.data.shards import SHARD_TOKENS, read_record
from fastgpt.errors import InputError

if TYPE_CHECKING:
    from fastgpt.data import Corpus, Source


@dataclass
class PrepareArgs:
    """Turn text into token shards in llm.c's format, with the tokenizer beside them.

    Data sets and data files are streamed: the validation shard comes first, and after an interruption the
    same command goes on after the last complete shard.
    """

    corpus: Positional[str]
    """A data set of the Hugging Face hub: `fineweb-edu`, `fineweb`, `openwebtext` or any other as
    hf:OWNER/NAME; data files: .parquet, .jsonl, .jsonl.gz or .jsonl.zst, a folder of them or a quoted pattern
    such as 'data/*.parquet'; text: `shakespeare`, `pydocs`, a text file or a folder of text files."""
    out: Path | None = None
    """The folder to write, which `fastgpt train --corpus FOLDER` reads; by default data/CORPUS-TOKENIZER."""
    tokenizer: TokenizerName = "gpt2"
    """How text becomes tokens; `char` is for text alone."""
    sample: str | None = None
    """Of the hub's fineweb-edu and fineweb: 10BT (the default), 100BT or 350BT, billions of tokens."""
    name: str | None = None
    """Of the hub: the subset (`datasets` calls it name or configuration)."""
    split: str | None = None
    """Of the hub: by default train. Validation tokens are taken from it too."""
    revision: str | None = None
    """Of the hub: a branch, tag or commit; by default the newest, and in a run that goes on, its own."""
    column: str | None = None
    """Where data sets and data files have the text; by default text."""
    val_fraction: float | None = None
    """Of text: the share at the end that is kept for validation; by default 0.1."""
    val_tokens: int | None = None
    """Of data sets and data files: how many tokens at the beginning are for validation; by default a whole
    shard. With text, it is streamed in the same way, instead of val_fraction."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens per file."""
    max_tokens: int | None = None
    """Stop after so many tokens, validation included."""
    workers: int | None = None
    """Processes for large inputs; by default one per core."""


TEXT, FILES, HUB = "text", "data files", "data sets of the hub"
ONLY_FOR = {
    "sample": (HUB,),
    "name": (HUB,),
    "split": (HUB,),
    "revision": (HUB,),
    "column": (HUB, FILES),
    "val_fraction": (TEXT,),
}


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import parse, program
    from fastgpt.data import Source, TokenDataset, prepare, prepare_stream

    given = parse(PrepareArgs, args, "prepare")
    found, out = _open(given)
    if isinstance(found, Source):
        prepare_stream(
            found,
            given.tokenizer,
            out,
            shard_tokens=given.shard_tokens,
            val_tokens=given.val_tokens,
            max_tokens=given.max_tokens,
            workers=given.workers,
        )
    else:
        prepare(
            found,
            given.tokenizer,
            out,
            val_fraction=TrainConfig.val_fraction if given.val_fraction is None else given.val_fraction,
            shard_tokens=given.shard_tokens,
            workers=given.workers,
        )
    data = TokenDataset.open(out)
    train, val = (sum(map(len, shards)) for shards in (data.train, data.val))
    vocab_size = data.tokenizer.vocab_size
    print(f"{out}: {train:,} training and {val:,} validation tokens, {vocab_size} in the vocabulary")
    print(f"try: {program()} train char-cpu --corpus {out}")


def _open(given: PrepareArgs) -> tuple[Corpus | Source, Path]:
    """What to prepare, and where."""
    from fastgpt.data import data_files, file_source, hub_source, is_hub_name, open_corpus, text_source
    from fastgpt.data.hub import short_name, subset_of

    if is_hub_name(given.corpus):
        _check(given, HUB)
        dataset, subset = subset_of(given.corpus, given.name, given.sample)
        out = _out(given, short_name(dataset, subset))
        begun_with = read_record(out).get("source", {}).get("revision")
        options = {"split": given.split or "train", "column": given.column or "text"}
        return hub_source(dataset, subset, revision=given.revision or begun_with, **options), out
    if paths := data_files(given.corpus):
        _check(given, FILES)
        source = file_source(paths, given.column or "text")
        return source, _out(given, source.name)
    _check(given, TEXT)
    corpus = open_corpus(given.corpus)
    streamed = given.val_tokens is not None
    return text_source(corpus) if streamed else corpus, _out(given, corpus.name)


def _check(given: PrepareArgs, kind: str) -> None:
    """Options that would be ignored."""
    for name, kinds in ONLY_FOR.items():
        if getattr(given, name) is not None and kind not in kinds:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is for {' and '.join(kinds)}, and {given.corpus} is {kind}")
    if kind == TEXT and given.val_tokens is None and given.max_tokens is not None:
        raise InputError("--max-tokens with text needs --val-tokens, which streams it")
    if kind == TEXT and given.val_tokens is not None and given.val_fraction is not None:
        raise InputError("--val-tokens and --val-fraction exclude each other: give one")


def _out(given: PrepareArgs, name: str) -> Path:
    return given.out or Path("data") / re.sub(r"[^\w.-]+", "_", f"{name}-{given.tokenizer}")
