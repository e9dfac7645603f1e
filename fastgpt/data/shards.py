"""Token shards: llm.c's file format, written atomically and read memory-mapped.

    256 x int32   header: magic 20240520, version 1, number of tokens, zeros   (little-endian)
    n   x uint16  tokens

Files of llm.c and modded-nanogpt read as they are, and so do nanoGPT's headerless `train.bin`/`val.bin`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from fastgpt.data.loader import Loader, ValidationSet, Windows
from fastgpt.data.tokenizers import TOKENIZER_FILE, GPT2Tokenizer, Tokenizer, load_tokenizer
from fastgpt.errors import InputError
from fastgpt.files import atomic_write

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000  # 200 MB, as in llm.c
RECORD_FILE = "prepared.json"  # beside the shards: what they were made of, and how far that got

logger = logging.getLogger("fastgpt")


class ShardWriter:
    """Writes `folder/{split}_000000.bin`, `_000001.bin`, ... of at most `shard_tokens` tokens each.

    The numbers begin with `first_shard`.
    A file has its name only when it is complete. As a context manager it closes at the end, or drops the
    unfinished file on an exception.
    """

    def __init__(self, folder: str | Path, split: str, shard_tokens: int, first_shard: int = 0) -> None:
        check_shard_tokens("shard_tokens", shard_tokens)
        self.folder = Path(folder)
        self.split = split
        self.shard_tokens = shard_tokens
        self.tokens = 0  # written so far, in all files
        self._shards = first_shard
        self._in_shard = 0
        self._file: BinaryIO | None = None
        self._stack = ExitStack()

    def write(self, tokens: np.ndarray) -> None:
        """Append `tokens`: uint16, 1-D."""
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise TypeError(f"tokens are 1-D uint16, not {tokens.ndim}-D {tokens.dtype}")
        while tokens.size:
            file = self._file or self._open()
            part = tokens[: self.shard_tokens - self._in_shard]
            file.write(part.astype("<u2", copy=False).tobytes())
            self._in_shard += part.size
            self.tokens += part.size
            tokens = tokens[part.size :]
            if self._in_shard == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Finish the file being written, if any."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(_header(self._in_shard))
        self._file = None
        self._stack.close()

    def _open(self) -> BinaryIO:
        target = shard_path(self.folder, self.split, self._shards)
        path = self._stack.enter_context(atomic_write(target))
        self._file = self._stack.enter_context(path.open("wb"))
        self._file.write(_header(0))  # the count is known at the end
        self._shards += 1
        self._in_shard = 0
        return self._file

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.__exit__(kind, error, trace)


def check_shard_tokens(name: str, value: int) -> None:
    """Raises `InputError` for what no shard can hold; `name` is of the option that says how many tokens."""
    if not 0 < value < 1 << 31:
        raise InputError(f"{name} is {value}: a shard holds 1 to 2^31 - 1 tokens")


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where `ShardWriter` puts a shard."""
    return folder / f"{split}_{number:06d}.bin"


def _header(tokens: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def read_shard(path: str | Path) -> np.ndarray:
    """The tokens of a shard: uint16 (n,), memory-mapped, read-only, n >= 1.

    Raises `InputError` for a file that is not a shard, is of another version, or is longer or shorter
    than its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    magic, version, count = map(int, header[:3])
    if magic != MAGIC and path.name in ("train.bin", "val.bin"):  # nanoGPT: tokens and nothing else
        if size == 0 or size % TOKEN_BYTES:
            raise InputError(
                f"{path} has {size} bytes: nanoGPT's uint16 tokens are a positive multiple of 2. "
                "It is truncated or not tokens: prepare it again"
            )
        return np.memmap(path, dtype="<u2", mode="r")
    if magic != MAGIC or size < HEADER_BYTES:
        raise InputError(
            f"{path} is not a token shard: {size} bytes that begin with {magic}, expected a header of "
            f"{HEADER_BYTES} bytes that begins with {MAGIC}, and then tokens. Prepare or download it again"
        )
    if version != VERSION:
        raise InputError(f"{path} is a token shard of version {version}; fastgpt reads version {VERSION}")
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if count <= 0 or size != expected:
        problem = "empty or corrupt" if count <= 0 else "truncated" if size < expected else "too long"
        raise InputError(
            f"{path} is {problem}: its header says {count} tokens, which is {expected} bytes, "
            f"and it has {size}. Prepare or download it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of a split, "train" or "val", in order of their names: `*train*.bin` or `*val*.bin`."""
    return sorted(path for path in Path(folder).glob(f"*{split}*.bin") if not path.name.startswith("."))


def is_token_folder(path: str | Path) -> bool:
    """Whether `path` is a folder that holds token shards."""
    return Path(path).is_dir() and any(find_shards(path, split) for split in SPLITS)


def read_record(folder: Path) -> dict[str, Any]:
    """What `prepare` or `prepare_stream` wrote into `folder` beside the shards; {} for nothing."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write what `read_record` reads."""
    with atomic_write(folder / RECORD_FILE) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class TokenDataset:
    """A folder of tokens: the shards of each split (uint16, memory-mapped) and what they mean.

    `names` are the shards' paths by split, for error messages. `fingerprint` is equal for equal tokens
    (it looks at the counts, and the ends of every shard) and independent of paths and times.
    """

    tokenizer: Tokenizer
    train: list[np.ndarray]
    val: list[np.ndarray]
    names: dict[str, list[str]]
    fingerprint: str

    @classmethod
    def open(cls, folder: str | Path) -> TokenDataset:
        """Open a folder made by `fastgpt prepare`, llm.c, modded-nanogpt or nanoGPT's GPT-2 scripts.

        Raises `InputError` for a missing split, a broken shard, an unfinished preparation, or a vocabulary
        that only a pickle has.
        """
        folder = Path(folder)
        progress = read_record(folder).get("progress", {"complete": True})
        if not progress["complete"]:
            raise InputError(
                f"the tokens in {folder} are unfinished, with {progress['shards']} shards complete: run the "
                "`fastgpt prepare` command that began them again, and it goes on"
            )
        paths = {split: find_shards(folder, split) for split in SPLITS}
        for split, found in paths.items():
            if not found:
                raise InputError(
                    f"no {split} tokens in {folder}: expected files called *{split}*.bin. "
                    "Make them with `fastgpt prepare`"
                )
        tokenizer = _tokenizer_of(folder)
        shards = {split: [read_shard(path) for path in found] for split, found in paths.items()}
        names = {split: [str(path) for path in found] for split, found in paths.items()}
        return cls(tokenizer, shards["train"], shards["val"], names, _fingerprint(tokenizer, shards))

    prompt = "The "
    """What a prompt looks like."""

    def describe(self) -> str:
        train, val = (sum(map(len, shards)) for shards in (self.train, self.val))
        return (
            f"{train:,} training and {val:,} validation tokens "
            f"({self.tokenizer.name}, {self.tokenizer.vocab_size} in the vocabulary)"
        )

    def loader(self, block_size: int, batch_size: int, *, seed: int) -> Loader:
        """Windows of the training shards. Raises InputError where no shard holds one."""
        return Loader(self._windows("train", block_size), batch_size, seed=seed)

    def validation(self, block_size: int, *, max_samples: int | None = None) -> ValidationSet:
        """Windows of the validation shards: all, or so many, spread evenly."""
        return ValidationSet(self._windows("val", block_size), max_samples=max_samples)

    def _windows(self, split: str, block_size: int) -> Windows:
        shards = self.train if split == "train" else self.val
        vocab_size = self.tokenizer.vocab_size
        return Windows(shards, block_size, vocab_size=vocab_size, names=self.names[split])


def _tokenizer_of(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        return tokenizer
    if (folder / "meta.pkl").exists():
        raise InputError(
            f"the vocabulary of {folder} is in meta.pkl, a pickle, which can run any code and which fastgpt "
            "does not load: make the tokens again from the text with `fastgpt prepare`"
        )
    logger.info("%s has no %s: taking its tokens as GPT-2's", folder, TOKENIZER_FILE)
    return GPT2Tokenizer()


def _fingerprint(tokenizer: Tokenizer, shards: dict[str, list[np.ndarray]]) -> str:
    digest = hashlib.sha256(json.dumps(tokenizer.to_json()).encode())
    for split, arrays in shards.items():
        digest.update(f"{split} {[array.size for array in arrays]}".encode())
        for array in arrays:
            digest.update(array[:1024].tobytes() + array[-1024:].tobytes())
    return digest.hexdigest()
