"""What setup.py decides, and says, on machines that lack something: asked through its own command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def setup(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *(args or ["--version"])]
    inherited = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit of a version that no PyTorch was built for."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 7.5, V7.5.17'\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_unknown_choice() -> None:
    done = setup(FASTGPT_BUILD="gpu")
    assert done.returncode != 0
    assert "FASTGPT_BUILD='gpu': it must be one of cpu, cuda, none" in done.stderr


def test_without_a_compiler_it_is_installed_without_native_kernels(tmp_path: Path) -> None:
    absent = {"PATH": str(tmp_path), "CXX": "absent-c++"}
    done = setup(**absent)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler: installing without the native kernels" in done.stderr
    asked = setup(FASTGPT_BUILD="cpu", **absent)
    assert asked.returncode != 0
    assert "FASTGPT_BUILD=cpu: no C++ compiler: install g++ or clang++, or set CXX" in asked.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")
def test_a_toolkit_for_another_version_is_explained(toolkit: Path) -> None:
    done = setup(CUDA_HOME=str(toolkit), FASTGPT_BUILD="cuda")
    assert done.returncode != 0
    assert (
        f"nvcc is 7.5 and torch {torch.__version__} is for CUDA {torch.version.cuda}: "
        "they must agree in the major version" in done.stderr
    )
    automatic = setup(CUDA_HOME=str(toolkit))
    assert automatic.returncode == 0
    assert "building for the CPU alone: nvcc is 7.5" in automatic.stderr


def test_without_nvcc(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    done = setup(PATH=str(tmp_path), CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert "building for the CPU alone: no nvcc: install the CUDA toolkit, or set CUDA_HOME" in done.stderr
    asked = setup(PATH=str(tmp_path), CXX=compiler, FASTGPT_BUILD="cuda")
    assert asked.returncode != 0
    assert "FASTGPT_BUILD=cuda: no nvcc" in asked.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A clean tree, as a checkout has it."""
    ignore = shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignore))


def test_source_distribution_holds_what_is_compiled(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    environment = {**os.environ, "FASTGPT_BUILD": "none"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    files = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*.*")}
    assert len(files) > 90
    assert files | {"setup.py", "kernels/layer_norm.py", "fastgpt/model.py"} <= names


# Without the finder of an editable installation, which would supply its own fastgpt._C.
PROBE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import torch
from fastgpt import ops
print(ops.gelu(torch.zeros(2), backend="eager").tolist())
ops.gelu(torch.zeros(2), backend="native")
"""


def test_wheel_without_native_kernels_holds_the_package(source: Path, tmp_path: Path) -> None:
    """It works; the error of whoever asks for what is not there says what to do."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(
        command, cwd=source, env={**os.environ, "FASTGPT_BUILD": "none"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = wheel.namelist()
    assert {"fastgpt/model.py", "fastgpt/kernels/layer_norm.py", "fastgpt/py.typed"} <= set(names)
    report = [path.name for path in (source / "benchmarks" / "report").iterdir() if path.is_file()]
    assert {"page.html", "page.css", "page.js"} <= set(report)
    assert {f"fastgpt/benchmarks/report/{name}" for name in report} <= set(names)
    assert not [name for name in names if name.endswith(".so") or name.split("/")[0] in ("kernels", "tests")]
    wheel.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    tried = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert tried.stdout == "[0.0, 0.0]\n", tried.stderr
    assert "the native kernels were not built: install fastgpt again with a C++ compiler" in tried.stderr
