"""How kernels are started: what is refused says which kernel it was, guards and streams."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import cuda_emulator
import pytest

pytestmark = pytest.mark.skipif(cuda_emulator.absent() is not None, reason=str(cuda_emulator.absent()))
SOURCE = Path(__file__).with_name("launch.cu")
BINDINGS = sorted(cuda_emulator.CUDA.glob("*_ops.cpp"))


def compiled(compiler: str) -> Path:
    if compiler == "g++":
        return cuda_emulator.build([SOURCE], "launch")
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    call = ["nvcc", "-std=c++17", f"-I{cuda_emulator.CSRC}", str(SOURCE)]
    return cuda_emulator.kept(call, cuda_emulator.BUILD.parent / "nvcc/launch")


def said(compiler: str, case: str) -> str:
    return subprocess.run(
        [compiled(compiler), case], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("case", ["shared", "threads"])
def test_an_error_names_the_kernel_and_the_shape(case: str) -> None:
    """With CUDA's own words after it, which without a GPU are that there is none."""
    assert re.fullmatch(r"fill of shape \(3, 5\): \w.+", said("nvcc", case))


@pytest.mark.parametrize("compiler", ["g++", "nvcc"])
def test_a_grid_that_is_too_large(compiler: str) -> None:
    assert said(compiler, "grid").startswith("fill of shape (3, 5): a grid of 1 x 70000 x 1 blocks")


@pytest.mark.parametrize("compiler", ["g++", "nvcc"])
def test_nothing_is_not_launched(compiler: str) -> None:
    """With a block that would be refused."""
    assert said(compiler, "nothing") == "no error"


@pytest.mark.parametrize("path", BINDINGS, ids=lambda path: path.name)
def test_bindings_take_the_device_and_its_stream(path: Path) -> None:
    """Each operator's first statement is the guard; launchers get the stream that is current under it."""
    text = path.read_text()
    registered = set(re.findall(r'\bimpl\(\s*"\w+",\s*&(\w+)\)', text))
    for pair in re.findall(r"implement_norms<(\w+), (\w+)>", text):
        registered |= set(pair)
    assert registered
    for name in registered:
        found = re.search(rf"^\S.*\b{name}\([^{{;]*\) {{\n(.*?)^}}", text, re.MULTILINE | re.DOTALL)
        assert found is not None, name
        statements = [s.strip() for s in found[1].split(";") if not s.strip().startswith("TORCH_CHECK")]
        assert re.fullmatch(r"const DeviceGuard guard\(.*\)", statements[0]), f"{path.name}: {name}"
        if path.name != "linear_ops.cpp":  # all of which is PyTorch's own operators
            assert "current_stream()" in found[1], f"{path.name}: {name}"
