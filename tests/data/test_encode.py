"""A text cut into pieces has the tokens of the whole, in order, whoever tokenizes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgpt.data import ByteTokenizer, GPT2Tokenizer
from fastgpt.data.encode import Piece, cut, encode_all
from fastgpt.errors import InputError

# What a pre-tokenizer minds: runs of white space of every kind (\x1c to \x1f are Python's alone, \x85 and
# \u2028 Unicode's), letters, digits, contractions, marks, and characters of two and four bytes.
WHITE = tuple(" \n\r\t\v\f\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b")
OTHER = ["a", "the", "'", "'s", "'ll", "0", "42", "!", "...", "é", "é", "字", "😀", "<|endoftext|>"]
tricky = st.one_of(st.sampled_from(" \n"), st.sampled_from(WHITE), st.sampled_from(OTHER))
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=500)
@given(text=st.one_of(st.lists(tricky).map("".join), any_text), piece=st.integers(1, 6))
@example(text="a\n\nb", piece=1)
@example(text="a\r\nb", piece=1)
@example(text="a  b", piece=1)
@example(text="a \n b", piece=1)
@example(text="a\n\x1c b", piece=1)
def test_pieces_have_the_tokens_of_the_whole(gpt2: GPT2Tokenizer, text: str, piece: int) -> None:
    pieces = list(cut(text, piece))
    assert "".join(pieces) == text
    assert all(len(part) >= piece for part in pieces[:-1])
    tokens = [token for part in pieces for token in gpt2.encode(part).tolist()]
    assert tokens == gpt2.encode(text).tolist()


def test_pieces_are_about_as_long_as_asked() -> None:
    """Also with Windows newlines, and with no newline at all."""
    for text in ("some words\nand more\n" * 500, "some words\r\nand more\r\n" * 500, "some words " * 500):
        lengths = [len(part) for part in cut(text, 100)]
        assert max(lengths) < 120
        assert min(lengths[:-1]) >= 100
    assert list(cut("x" * 1000, 100)) == ["x" * 1000]
    assert list(cut("", 100)) == []


def pieces(count: int) -> Iterator[Piece]:
    for number in range(count):
        yield Piece("train", f"piece {number} " * (20 - number), begins=number == 0)


class Fatal(ByteTokenizer):
    """Kills the process that uses it, as a machine out of memory does."""

    def encode(self, text: str, *, allow_special: bool = False) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_process_that_dies_is_an_error_and_no_hang() -> None:
    with pytest.raises(InputError, match="a tokenizing process died"):
        list(encode_all(Fatal(), pieces(3), 2))


ORPHANS = """
import os, signal, multiprocessing
from fastgpt.data import ByteTokenizer
from fastgpt.data.encode import Piece, encode_all

if __name__ == "__main__":
    stream = encode_all(ByteTokenizer(), (Piece("train", "text " * 60_000, True) for _ in iter(int, 1)), 2)
    next(stream)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    result = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=60)
    workers = result.stdout.split()
    assert result.returncode == -signal.SIGKILL
    assert workers
    deadline = time.monotonic() + 20
    while any(Path("/proc", worker).exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
