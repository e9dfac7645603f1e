from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fastgpt.ops import choices

from . import world
from .runner import Compiler


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    with Compiler() as started:
        yield started


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that pages name, which is the current one; the hub is a folder too."""
    world.copy(files, tmp_path)

    def snapshot_download(name: str, **_: Any) -> str:
        return str(files / "hub" / name.removeprefix("openai-community/"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    choices.user_record().unlink(missing_ok=True)
    choices.forget()
