"""Text to token ids and back: characters, bytes, or GPT-2's byte pair encoding."""

from __future__ import annotations

import difflib
import functools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastgpt.data.gpt2_files import ensure_gpt2_files
from fastgpt.errors import InputError
from fastgpt.files import atomic_write

if TYPE_CHECKING:
    import tiktoken

TOKENIZERS = ("char", "byte", "gpt2")
TOKENIZER_FILE = "tokenizer.json"
MAX_VOCAB = 1 << 16  # token ids are uint16


class Tokenizer(ABC):
    """Text to token ids and back.

    `name` is one of `TOKENIZERS`; ids are in [0, vocab_size); `eot` is the id that stands between documents
    and ends what is generated, or None when there is no such id. Two tokenizers are equal when they give the
    same ids.
    """

    name: str
    vocab_size: int
    eot: int | None = None

    @abstractmethod
    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Token ids of `text`: uint16, 1-D. With `allow_special`, "<|endoftext|>" is the id `eot`, where
        there is one; without, it is text like any other. Raises `InputError` on text it cannot express."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`; a piece of a stream may end inside a character.

        Raises `InputError` on an id outside [0, vocab_size)."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises as `decode_bytes` does."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> dict[str, Any]:
        """What `tokenizer_from_json` needs to make this tokenizer again."""
        return {"name": self.name}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        """`ids` as int64, all within the vocabulary."""
        array = np.asarray(ids if hasattr(ids, "__len__") else list(ids), dtype=np.int64).reshape(-1)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise InputError(
                f"token id {outside[0]} is not in the {self.name} vocabulary of {self.vocab_size} ids: "
                "was this text made with another tokenizer?"
            )
        return array


class CharTokenizer(Tokenizer):
    """One id per character: its place in the sorted `vocab`, which is what the text at hand uses."""

    name = "char"

    def __init__(self, vocab: str, end: str | None = None) -> None:
        """`vocab`: the characters, in any order. Raises `InputError` for none, or more than 65536.

        `end`: the one of them that is `eot`; none for text, where every character is like any other.
        """
        self.vocab = "".join(sorted(set(vocab)))
        self.vocab_size = len(self.vocab)
        if not 0 < self.vocab_size <= MAX_VOCAB:
            raise InputError(
                f"a char vocabulary has 1 to {MAX_VOCAB} characters, this one {self.vocab_size}: "
                "use the byte or gpt2 tokenizer"
            )
        _require_unicode(self.vocab)
        self._codes = _code_points(self.vocab)
        # Code point -> id, and -1 for none; all beyond the last code point share the last entry.
        self._ids = np.full(int(self._codes[-1]) + 2, -1, dtype=np.int32)
        self._ids[self._codes] = np.arange(self.vocab_size)
        self.end = end
        self.eot = None if end is None else int(self.encode(end)[0])

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> CharTokenizer:
        """The tokenizer of all characters in `texts`."""
        vocab: set[str] = set()
        for text in texts:
            vocab.update(text)
        return cls("".join(vocab))

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        """Ids of the characters: uint16 (len(text),). `InputError` for one not in the vocabulary."""
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            raise InputError(self._unknown(text))
        return ids.astype(np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._codes[self._checked(ids)].tobytes().decode("utf-32-le").encode()

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "vocab": self.vocab} | ({"end": self.end} if self.end else {})

    def _unknown(self, text: str) -> str:
        unknown = sorted(set(text) - set(self.vocab))
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        sample = repr(self.vocab if self.vocab_size <= 100 else self.vocab[:100] + "...")
        return (
            f"{len(unknown)} distinct character(s) not in the char vocabulary: {shown}. "
            f"It has the {self.vocab_size} characters of the text it was made from: {sample}"
        )


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte."""

    name = "byte"
    vocab_size = 256

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        return np.frombuffer(_require_unicode(text), dtype=np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._checked(ids).astype(np.uint8).tobytes()


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pair encoding, by tiktoken. Its vocabulary is looked for when it is first needed."""

    name = "gpt2"
    vocab_size = 50257
    eot = 50256

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        _require_unicode(text)  # tiktoken would replace lone surrogates in silence
        allowed: Literal["all"] | set[str] = "all" if allow_special else set()
        ids = _gpt2_encoding().encode(text, allowed_special=allowed, disallowed_special=())
        return np.array(ids, dtype=np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return _gpt2_encoding().decode_bytes(self._checked(ids).tolist())


@functools.cache
def _gpt2_encoding() -> tiktoken.Encoding:
    import tiktoken

    with _environment("TIKTOKEN_CACHE_DIR", str(ensure_gpt2_files())):
        return tiktoken.get_encoding("gpt2")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable set for a moment: the only way to tell tiktoken its folder."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def make_tokenizer(name: str, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer called `name`; `texts` is read only for "char", whose vocabulary it gives."""
    if name == "char":
        return CharTokenizer.from_texts(texts)
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer()
    close = difflib.get_close_matches(name, TOKENIZERS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"unknown tokenizer {name!r}: {hint}There are {', '.join(TOKENIZERS)}")


def tokenizer_from_json(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `to_json` gave `data`. Raises `InputError` on anything else."""
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise InputError(f'a tokenizer is {{"name": one of {", ".join(TOKENIZERS)}}}, not {str(data)[:80]}')
    if name != "char":
        return make_tokenizer(name)
    vocab = data.get("vocab")
    if not isinstance(vocab, str) or sorted(set(vocab)) != list(vocab):
        raise InputError('a char tokenizer needs "vocab": a string of distinct characters in order')
    end = data.get("end")
    if end is not None and (not isinstance(end, str) or len(end) != 1 or end not in vocab):
        raise InputError(f'"end" of a char tokenizer is one character of its "vocab", not {end!r}')
    return CharTokenizer(vocab, end)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write `folder/tokenizer.json`."""
    with atomic_write(Path(folder) / TOKENIZER_FILE) as path:
        path.write_text(json.dumps(tokenizer.to_json(), indent=1) + "\n", encoding="utf-8")


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of `folder/tokenizer.json`, None without that file, `InputError` if it is malformed."""
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        return tokenizer_from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # not UTF-8, not JSON, or not a tokenizer
        raise InputError(f"{path} does not describe a tokenizer: {error}. Prepare the data again") from error


def _code_points(text: str) -> np.ndarray:
    """The characters of `text` as uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _require_unicode(text: str) -> bytes:
    """`text` in UTF-8; lone surrogates, which have none, are an `InputError`."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: lone surrogate {text[error.start]!r} at character "
            f"{error.start}. Pass text that was decoded as UTF-8"
        ) from error
