"""The CUDA kernels as nvcc compiles them: no warning, no spill, and no more resources than are known."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cuda_emulator
import pytest
from cuda_resources import CHIPS, SOURCES, TABLE, cubin, machine_code, measured

from fastgpt.inspect import build, shipped

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compare(source: str, chip: str) -> None:
    table = json.loads(TABLE.read_text())
    known = table["kernels"].get(source, {}).get(chip, {})
    now = measured(source, chip)
    assert now.keys() == known.keys(), "other kernels than before: run python tests/cuda_resources.py"
    for kernel, (registers, shared) in now.items():
        assert shared <= known[kernel][1], kernel
        if build.nvcc_version() == table["nvcc"]:  # registers are the compiler's choice
            assert registers <= known[kernel][0], kernel


@pytest.mark.parametrize("source", SOURCES)
def test_resources(source: str) -> None:
    """On the oldest chip; the others take minutes."""
    compare(source, "sm_80")


# Kernels (the beginning of a name) that read and write 16 bytes at a time, and that use tensor cores.
ELEMENTWISE = (
    "norm_forward|norm_backward|(bias_)?gelu_|dropout_add_|embedding_|cross_entropy_kernel|scale_kernel"
)
TENSOR_CORES = "attention_forward_kernel|attention_backward_keys_kernel|attention_backward_queries_kernel"
REQUIRED = {
    f"{ELEMENTWISE}|norm_sums_wide|{TENSOR_CORES}": shipped.VECTOR_LOAD,
    f"{ELEMENTWISE}|{TENSOR_CORES}": shipped.VECTOR_STORE,
    TENSOR_CORES: shipped.TENSOR_CORES[80],
}


@pytest.mark.parametrize("source", SOURCES)
def test_machine_code(source: str) -> None:
    for kernel, code in machine_code(source, "sm_80").items():
        for kernels, instruction in REQUIRED.items():
            if re.match(kernels, kernel):
                assert re.search(instruction, code), f"{kernel}: no {instruction}"


def test_the_required_kernels_exist() -> None:
    kernels = [k for chips in json.loads(TABLE.read_text())["kernels"].values() for k in chips["sm_80"]]
    for name in "|".join(REQUIRED).replace("(bias_)?", "").split("|"):
        assert any(kernel.startswith(name) for kernel in kernels), name


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS[1:])
@pytest.mark.parametrize("source", SOURCES)
def test_resources_of_other_chips(source: str, chip: str) -> None:
    compare(source, chip)


def test_a_report_is_read() -> None:
    said = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    40 bytes stack frame, 120 bytes spill stores, 112 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]
"""
    assert list(build.ptxas_report(said)) == [("_Z1kPf", 64, 256, 232)]


def test_a_spill_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) k(float* x, int n) { float v[80]; "
        "for (int i = 0; i < 80; ++i) v[i] = x[i * n]; __syncthreads(); "
        "for (int i = 0; i < 80; ++i) x[i * n + 1] = v[i] * v[79 - i]; }"
    )
    with pytest.raises(cuda_emulator.InputError, match="spilled"):
        cubin(source, "sm_80")
