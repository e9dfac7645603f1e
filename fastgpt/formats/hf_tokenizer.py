"""fastgpt's tokenizers as files that transformers' AutoTokenizer loads, and back.

GPT-2's byte pair encoding is OpenAI's two files under Hugging Face's names. `char` and `byte` are, to the
`tokenizers` library, byte pair encodings without merges: their ids are the same, but where `char` refuses a
character outside its vocabulary, `tokenizers` leaves it out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastgpt.data.gpt2_files import gpt2_file
from fastgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from fastgpt.errors import InputError
from fastgpt.formats.weights import guess_tokenizer

END_OF_TEXT = "<|endoftext|>"
_GPT2_NAMES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # OpenAI's: Hugging Face's


def write(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write the tokenizer's files; `block_size` is recorded as the longest text that the model takes."""
    settings: dict[str, Any] = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, GPT2Tokenizer):
        for theirs, name in _GPT2_NAMES.items():
            (folder / name).write_bytes(gpt2_file(theirs).read_bytes())
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special}
    else:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / "tokenizer.json", _tokenizer_json(tokenizer))
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: object) -> None:
    """In the layout of Hugging Face's own files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer.json` of a tokenizer whose tokens are single characters or bytes."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    splitter: dict[str, Any] | None
    joiner: dict[str, Any]
    if isinstance(tokenizer, CharTokenizer):
        symbols, splitter, joiner = tokenizer.vocab, None, {"type": "Fuse"}
    elif isinstance(tokenizer, ByteTokenizer):
        symbols, splitter, joiner = _byte_symbols(), byte_level, byte_level
    else:
        raise InputError(f"the {tokenizer.name} tokenizer has no form that transformers reads")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": joiner,
        "model": {"type": "BPE", "vocab": {symbol: i for i, symbol in enumerate(symbols)}, "merges": []},
    }


def _byte_symbols() -> str:
    """The characters that stand for bytes 0..255 in `tokenizers` and in OpenAI's encoder.json: printable ones
    of Latin-1 for themselves, the others in order from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


def read(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None if fastgpt does not have it.

    A folder without a tokenizer is taken to use GPT-2's, if its vocabulary of `vocab_size` holds it.
    """
    vocab, merges = _vocabulary(folder)
    if vocab is None:
        return guess_tokenizer(vocab_size)
    symbols = "".join(sorted(vocab, key=vocab.__getitem__))
    single = all(len(token) == 1 for token in vocab)
    if single and not merges and sorted(vocab.values()) == list(range(len(vocab))):
        if symbols == _byte_symbols():
            return ByteTokenizer()
        return CharTokenizer(symbols) if list(symbols) == sorted(symbols) else None
    if len(vocab) >= GPT2Tokenizer.vocab_size - 1:  # end-of-text may stand among the added tokens
        gpt2: dict[str, int] = json.loads(gpt2_file("encoder.json").read_text(encoding="utf-8"))
        if all(vocab.get(token, i if token == END_OF_TEXT else -1) == i for token, i in gpt2.items()):
            return GPT2Tokenizer()
    return None


def _vocabulary(folder: Path) -> tuple[dict[str, int] | None, bool]:
    """Tokens and ids of a folder's tokenizer, None without one, and whether tokens are merged from others."""
    for name in ("tokenizer.json", "vocab.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if name == "vocab.json":
                return dict(content), True
            model = content["model"]
            return dict(model["vocab"]), bool(model.get("merges", True))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a tokenizer of Hugging Face: {error}") from error
    return None, False
