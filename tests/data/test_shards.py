"""llm.c's format to the byte, nanoGPT's as it is, and one clear error for each way a file can be broken."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    ShardWriter,
    TokenDataset,
    find_shards,
    is_token_folder,
    read_shard,
    save_tokenizer,
)
from fastgpt.errors import InputError


def tokens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint16)


def write(folder: Path, split: str, *values: int, shard_tokens: int = 100) -> None:
    with ShardWriter(folder, split, shard_tokens) as writer:
        writer.write(tokens(*values))


def test_llmc_format_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path, "train", 1, 2, 65535)
    expected = struct.pack("<3i", 20240520, 1, 3) + bytes(253 * 4) + struct.pack("<3H", 1, 2, 65535)
    assert (tmp_path / "train_000000.bin").read_bytes() == expected


@settings(max_examples=25)  # every shard waits for the disk
@given(
    parts=st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=4), shard_tokens=st.integers(3, 9)
)
def test_any_writes_make_the_same_shards(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "val", shard_tokens) as writer:
        for part in parts:
            writer.write(tokens(*part))
    shards = [read_shard(path) for path in find_shards(folder, "val")]
    everything = [value for part in parts for value in part]
    assert [value for shard in shards for value in shard.tolist()] == everything
    assert all(shard.size == shard_tokens for shard in shards[:-1])
    assert writer.tokens == len(everything)
    assert len(list(folder.iterdir())) == len(shards) == -(-len(everything) // shard_tokens)


def test_an_exception_leaves_only_complete_shards(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", 2) as writer:
        writer.write(tokens(1, 2, 3))
        assert not (tmp_path / "train_000001.bin").exists()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]


def test_what_the_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shard_tokens is 0"):
        ShardWriter(tmp_path, "train", 0)
    with pytest.raises(TypeError, match="uint16"):
        ShardWriter(tmp_path, "train", 1).write(np.array([70000]))


def test_shards_are_mapped_read_only(tmp_path: Path) -> None:
    write(tmp_path, "train", 1, 2)
    shard = read_shard(tmp_path / "train_000000.bin")
    assert isinstance(shard, np.memmap)
    assert shard.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 1


def test_names_of_others(tmp_path: Path) -> None:
    for name in ("fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin",
                 "tiny_shakespeare_val.bin", ".train_000000.bin.tmp", "train.txt", "other.bin"):  # fmt: skip
        (tmp_path / name).touch()
    names = {split: [path.name for path in find_shards(tmp_path, split)] for split in ("train", "val")}
    assert names["train"] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert names["val"] == ["fineweb_val_000000.bin", "tiny_shakespeare_val.bin"]


def test_nanogpt_files(tmp_path: Path) -> None:
    tokens(7, 8, 9).tofile(tmp_path / "train.bin")
    assert read_shard(tmp_path / "train.bin").tolist() == [7, 8, 9]
    tokens(7, 8, 9).tofile(tmp_path / "my_train.bin")
    with pytest.raises(InputError, match="not a token shard"):
        read_shard(tmp_path / "my_train.bin")
    # llm.c's format under nanoGPT's name is still llm.c's.
    write(tmp_path, "val", 5)
    (tmp_path / "val_000000.bin").rename(tmp_path / "val.bin")
    assert read_shard(tmp_path / "val.bin").tolist() == [5]


def shard_bytes(magic: int = 20240520, version: int = 1, count: int = 3, body: int = 6) -> bytes:
    return struct.pack("<3i", magic, version, count) + bytes(253 * 4) + bytes(body)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a token shard: 0 bytes"),
        (shard_bytes()[:1000], "not a token shard: 1000 bytes"),
        (shard_bytes(magic=20240801), "begin with 20240801.*begins with 20240520"),
        (shard_bytes(version=2), "version 2; fastgpt reads version 1"),
        (shard_bytes(body=4), "truncated: its header says 3 tokens, which is 1030 bytes, and it has 1028"),
        (shard_bytes(body=5), "truncated"),
        (shard_bytes(body=8), "too long: its header says 3 tokens, which is 1030 bytes, and it has 1032"),
        (shard_bytes(count=0, body=0), "empty or corrupt"),
        (shard_bytes(count=-1, body=0), "empty or corrupt: its header says -1 tokens"),
        (shard_bytes(count=2**31 - 1), "truncated"),
    ],
)
def test_broken_shards(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc"], ids=["empty", "odd"])
def test_broken_nanogpt_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(InputError, match=f"train.bin has {len(content)} bytes"):
        read_shard(tmp_path / "train.bin")


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_shard(tmp_path / "train_000000.bin")


def test_dataset(tmp_path: Path) -> None:
    save_tokenizer(CharTokenizer("abc"), tmp_path)
    write(tmp_path, "train", 0, 1, 2, shard_tokens=2)
    write(tmp_path, "val", 2, 1)
    data = TokenDataset.open(tmp_path)
    assert data.tokenizer == CharTokenizer("abc")
    assert [shard.tolist() for shard in data.train] == [[0, 1], [2]]
    assert [shard.tolist() for shard in data.val] == [[2, 1]]
    assert data.names["train"] == [str(tmp_path / f"train_00000{number}.bin") for number in (0, 1)]
    assert data.names["val"] == [str(tmp_path / "val_000000.bin")]


def test_shards_without_a_tokenizer_are_gpt2s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "train", 1)
    write(tmp_path, "val", 1)
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        assert TokenDataset.open(tmp_path).tokenizer == GPT2Tokenizer()
    assert len(caplog.records) == 1
    assert "GPT-2" in caplog.text


def test_a_vocabulary_in_a_pickle(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin", "meta.pkl"):
        tokens(1, 2).tofile(tmp_path / name)
    with pytest.raises(InputError, match=r"meta\.pkl.*fastgpt prepare"):
        TokenDataset.open(tmp_path)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_split(tmp_path: Path, missing: str) -> None:
    write(tmp_path, "val" if missing == "train" else "train", 1)
    with pytest.raises(InputError, match=f"no {missing} tokens in .*fastgpt prepare"):
        TokenDataset.open(tmp_path)


def fingerprint(folder: Path, train: list[int], val: list[int], byte: bool = False, shard: int = 100) -> str:
    write(folder, "train", *train, shard_tokens=shard)
    write(folder, "val", *val)
    save_tokenizer(ByteTokenizer() if byte else CharTokenizer("abc"), folder)
    return TokenDataset.open(folder).fingerprint


def test_the_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    same = fingerprint(tmp_path / "a", [0, 1, 2], [1])
    assert fingerprint(tmp_path / "b", [0, 1, 2], [1]) == same
    others = [
        fingerprint(tmp_path / "c", [0, 1, 2, 0], [1]),
        fingerprint(tmp_path / "d", [0, 1, 1], [1]),
        fingerprint(tmp_path / "e", [0, 1, 2], [1, 1]),
        fingerprint(tmp_path / "f", [0, 1, 2], [1], byte=True),
        fingerprint(tmp_path / "g", [0, 1, 2], [1], shard=2),
    ]
    assert len({same, *others}) == 6


def test_is_token_folder(tmp_path: Path) -> None:
    assert not is_token_folder(tmp_path)
    assert not is_token_folder(tmp_path / "missing")
    write(tmp_path, "val", 1)
    assert is_token_folder(tmp_path)
    assert is_token_folder(str(tmp_path))
    assert not is_token_folder(tmp_path / "val_000000.bin")
