import importlib.util

import pytest
import torch
import triton_interpreter

if importlib.util.find_spec("triton") is None:  # there is none for macOS
    collect_ignore_glob = ["test_*.py"]

triton_interpreter.request()


@pytest.fixture(autouse=True, scope="session")
def right_bf16() -> None:
    triton_interpreter.repair()


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)
