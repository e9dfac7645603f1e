"""The instructions of ptx.cuh as they are compiled: the emulator has functions of its own in their place."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastgpt.inspect import build

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

SOURCE = Path(__file__).with_name("wrappers.cu")
CSRC = Path(__file__).parents[2] / "csrc"
R4, R2 = r"\{%r\d+, %r\d+, %r\d+, %r\d+\}", r"\{%r\d+, %r\d+\}"
# The instruction of each kernel: mnemonic with all its modifiers and operands, in PTX and in machine code.
EXPECTED = {
    "mma_bf16": (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32 ",
        r"HMMA\.16816\.F32\.BF16 R\d+, R\d+, R\d+, R\d+ ",
    ),
    "mma_half": (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32 ",
        r"HMMA\.16816\.F32 R\d+, R\d+, R\d+, R\d+ ",
    ),
    "ldmatrix_x4": (
        rf"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 {R4}, \[%r\d+\];",
        r"LDSM\.16\.M88\.4 ",
    ),
    "ldmatrix_x4_trans": (
        rf"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16 {R4}, \[%r\d+\];",
        r"LDSM\.16\.MT88\.4 ",
    ),
    "ldmatrix_x2": (
        rf"ldmatrix\.sync\.aligned\.m8n8\.x2\.shared\.b16 {R2}, \[%r\d+\];",
        r"LDSM\.16\.M88\.2 ",
    ),
    "ldmatrix_x2_trans": (
        rf"ldmatrix\.sync\.aligned\.m8n8\.x2\.trans\.shared\.b16 {R2}, \[%r\d+\];",
        r"LDSM\.16\.MT88\.2 ",
    ),
    "cp_async_16": (
        r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;",
        r"LDGSTS\.E\.BYPASS\.128 ",
    ),
    "cp_async_commit": (r"cp\.async\.commit_group;", r"LDGDEPBAR "),
    "cp_async_wait": (
        r"cp\.async\.wait_group 0;[^.]*\n.*cp\.async\.wait_group 1;",
        r"DEPBAR\.LE SB0, 0x0 ;[^D]*DEPBAR\.LE SB0, 0x1 ;",
    ),
    "approximate_exp2": (r"ex2\.approx\.ftz\.f32 %f(\d+), %f\d+;", r"MUFU\.EX2 "),
    "approximate_rsqrt": (r"rsqrt\.approx\.f32 %f(\d+), %f\d+;", r"MUFU\.RSQ "),
    "approximate_tanh": (r"tanh\.approx\.f32 %f(\d+), %f\d+;", r"MUFU\.TANH "),
}


def compiled(kind: str, folder: Path) -> Path:
    out = folder / kind
    options = ["-std=c++17", "-O3", "-arch=sm_80", f"-I{CSRC}", "-Werror=all-warnings"]
    subprocess.run(["nvcc", *options, f"--{kind}", "-o", out, SOURCE], check=True)
    return out


@pytest.fixture(scope="session")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The body of each kernel."""
    text = compiled("ptx", tmp_path_factory.mktemp("ptx")).read_text()
    return dict(re.findall(r"\.entry (\w+)\(.*?\n\{\n(.*?)\n\}", text, re.DOTALL))


@pytest.fixture(scope="session")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    code = build.machine_code(compiled("cubin", tmp_path_factory.mktemp("cubin")).read_bytes())
    return dict(re.findall(r"\.text\.(\w+):\n(.*?)(?=\n\.text\.|\Z)", code, re.DOTALL))


def test_every_wrapper_is_listed() -> None:
    names = set(re.findall(r"FASTGPT_DEVICE \w+ (\w+)", (CSRC / "cuda/ptx.cuh").read_text()))
    called = set(re.findall(r"ptx::(\w+)", SOURCE.read_text()))
    assert names - {"shared_address"} == called
    assert set(re.findall(r"__global__ void (\w+)", SOURCE.read_text())) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_instruction(ptx: dict[str, str], machine_code: dict[str, str], name: str) -> None:
    in_ptx, in_sass = EXPECTED[name]
    assert len(re.findall(in_ptx, ptx[name])) == 1, ptx[name]
    assert re.search(in_sass, machine_code[name]), machine_code[name]


@pytest.mark.parametrize("name", ["mma_bf16", "mma_half"])
def test_operands_of_mma(ptx: dict[str, str], name: str) -> None:
    """Each register holds the word that the kernel took for it: a, b, then d, which is read and written."""

    def offset(text: str) -> int:
        return int(text or 0) // 4

    loaded = {
        reg: offset(at) for reg, at in re.findall(r"ld\.global\.\w+\s+(%\w+), \[%rd\d+\+?(\d*)\]", ptx[name])
    }
    lists = re.findall(r"\{([^}]*)\}", re.findall(r"mma\..*?;", ptx[name])[0])
    d, a, b, c = ([loaded[reg] for reg in text.split(", ")] for text in lists)
    assert (a, b, c, d) == ([0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [6, 7, 8, 9])
    stored = re.findall(r"st\.global\.\w+\s+\[%rd\d+\+?(\d*)\], (%\w+)", ptx[name])
    assert [(offset(at), loaded[reg]) for at, reg in stored] == [(0, 6), (1, 7), (2, 8), (3, 9)]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("ldmatrix")])
def test_operands_of_ldmatrix(ptx: dict[str, str], name: str) -> None:
    registers = re.findall(r"ldmatrix\S* \{([^}]*)\}", ptx[name])[0].split(", ")
    stored = re.findall(r"st\.global\.\w+\s+\[%rd\d+\+?(\d*)\], (%\w+)", ptx[name])
    assert [(int(at or 0) // 4, reg) for at, reg in stored] == list(enumerate(registers))


def test_cp_async_reads_nothing_when_not_valid(ptx: dict[str, str]) -> None:
    body = ptx["cp_async_16"]
    size = re.findall(r"cp\.async\.cg\S* .*, 16, (%r\d+);", body)[0]
    choice = re.findall(rf"selp\.b32\s+{size}, (\d+), (\d+), (%p\d+);", body)[0]
    condition = re.findall(rf"setp\.(\w+)\.\w+\s+{choice[2]}, %rs\d+, 0;", body)[0]
    assert (*choice[:2], condition) in (("0", "16", "eq"), ("16", "0", "ne"))


def test_approximations_are_functions_of_their_argument(ptx: dict[str, str]) -> None:
    for name in ("exp2", "rsqrt", "tanh"):
        body = ptx[f"approximate_{name}"]
        result, argument = re.findall(r"approx\S* (%f\d+), (%f\d+);", body)[0]
        assert f"ld.global.f32 \t{argument}, " in body
        assert f"], {result};" in body
