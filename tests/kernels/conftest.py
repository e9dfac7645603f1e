import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:  # there is none for macOS
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)
