"""Kernels with planted mistakes are diagnosed by name, through the command as users call it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SLOW = ["*fp32,*fp32,*fp32,*fp32,i32:16,i32:16", "--constexpr", "BLOCK=64", "STEP=16", "--num-warps", "1"]
SOME = ["--grid", "512", "--flops", "1e9", "--bytes", "1e7"]


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`fastgpt inspect`, in a process where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fastgpt", "inspect", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def records(*arguments: str) -> list[dict[str, Any]]:
    done = inspect(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def named(record: dict[str, Any]) -> set[str]:
    return {finding.split(":")[0] for finding in record["findings"]}


@pytest.fixture(scope="module")
def triton_kernels() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    slow = ["--signature", *SLOW]
    return records(f"{HERE / 'slow.py'}:slow_matmul", "--arch", "sm_80", *slow, *SOME)


@pytest.fixture(scope="module")
def cuda_kernels() -> dict[str, dict[str, Any]]:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    found = records(str(HERE / "slow.cu"), "--arch", "sm_80")
    return {record["title"].split(": ")[1]: record for record in found}


def test_a_slow_triton_kernel(triton_kernels: list[dict[str, Any]]) -> None:
    (record,) = triton_kernels
    assert {"spills", "uncoalesced", "no tensor cores"} <= named(record), record["findings"]
    assert record["local_bytes"] > 0 and record["mix"].get("tensor") is None
    uncoalesced = next(f for f in record["findings"] if f.startswith("uncoalesced"))
    assert re.match(
        r"uncoalesced: loads of 4 bytes.*: 32 sectors where 4 would do \(slow\.py:\d+\)", uncoalesced
    )
    assert record["bounds_us"]["bandwidth"] == pytest.approx(1e7 / 2039e9 * 1e6)
    assert record["ceiling_us"] == max(record["bounds_us"].values()) == record["bounds_us"][record["binding"]]


def test_a_slow_cuda_kernel(cuda_kernels: dict[str, dict[str, Any]]) -> None:
    record = cuda_kernels["slow_matmul"]
    assert {"spills", "uncoalesced", "no tensor cores"} <= named(record), record["findings"]
    assert record["threads"] == 1024 and record["registers"] <= 64
    assert record["bounds_us"] is None, "nothing is known of the launch"


def test_bank_conflicts(cuda_kernels: dict[str, dict[str, Any]]) -> None:
    record = cuda_kernels["conflicts"]
    assert named(record) == {"bank conflicts", "narrow accesses"}, record["findings"]
    assert any("128 bytes apart: 32 passes where 1 would do (slow.cu:" in f for f in record["findings"])


def test_a_good_kernel_side_by_side(tmp_path: Path) -> None:
    """The report of `copy`, beside more warps and another chip: no findings, and bandwidth is the ceiling."""
    pytest.importorskip("triton")
    done = inspect(
        f"{HERE / 'slow.py'}:copy", "--arch", "sm_80", "--signature", "*fp32,*fp32,i32:16", "--constexpr",
        "BLOCK=1024", "--grid", "262144", "--bytes", f"{8 << 28}", "--compare", "num_warps=8", "h100",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines()[1:] if line}
    table = {name: values for name, values in rows.items() if name}
    assert table["threads"] == ["128", "256", "128"]
    assert table["by"] == ["bandwidth"] * 3
    assert table["GB/s"] == ["2039.0", "2039.0", "3350.0"]
    assert table["findings"] == ["0", "0", "0"]


def test_one_page(tmp_path: Path) -> None:
    """All stages, each line with its source, and nothing that is fetched from elsewhere.

    Of a copy, so that what Triton has kept of the same kernel elsewhere does not count.
    """
    pytest.importorskip("triton")
    page, kernels = tmp_path / "copy.html", Path(shutil.copy(HERE / "slow.py", tmp_path))
    signature = ["--signature", "*fp32,*fp32,i32:16", "--constexpr", "BLOCK=1024"]
    done = inspect(f"{kernels}:copy", "--arch", "sm_80", *signature, "--html", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    for stage, sign in {
        "ttir": "tt.load",
        "ttgir": "ttg.blocked",
        "llir": "define ",
        "ptx": "ld.global",
        "sass": "LDG.E.128",
    }.items():
        assert f'data-stage="{stage}"' in text and sign in text, stage
    rows = kernels.read_text().splitlines()
    line = next(number for number, row in enumerate(rows, 1) if "tl.store(y_ptr" in row)
    linked = re.findall(rf"<i data-s=\"[^\"]*slow\.py:{line}\">([^<]*)", text)
    for sign in ("tl.store(y_ptr", "tt.store", "st.global", "STG.E.128"):
        assert any(sign in row for row in linked), sign
    assert not re.search(r"(src|href)\s*=", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gelu_forwrd"], "no kernel 'gelu_forwrd': did you mean 'gelu_forward'?"),
        (["gelu", "--chip", "h1000"], "no chip 'h1000': choose one of a100, "),
        (["gelu", "--chip", "t4"], "chip t4: compute capability 8.0 or newer"),
        (["missing.py:kernel"], "missing.py: no such file"),
        (["missing.cu"], "missing.cu: no such file"),
        (["SLOW:matmul"], "has no Triton kernel 'matmul': it has slow_matmul, copy"),
        (["SLOW:copy", "--signature", "*fp32,*fp32,int"], "--signature: 'int' is no type"),
        (["gelu", "--num-warps", "3"], "--num-warps 3: it must be"),
        (["gelu", "--grid", "0"], "--grid 0: it must be positive"),
        (["--sweep", "gelu"], "--sweep 'gelu': the choices are attention_backward_keys, "),
        (
            ["gelu_forward", "--compare", "BLOCK=64"],
            "--compare BLOCK: the grid of gelu_forward depends on it",
        ),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what is wrong, before anything is compiled."""
    pytest.importorskip("triton")
    from fastgpt.cli import main
    from fastgpt.inspect import build

    monkeypatch.setattr(build, "require_triton", lambda: None)
    assert main(["inspect", *[word.replace("SLOW", str(HERE / "slow.py")) for word in arguments]]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("signature", "constants", "message"),
    [
        ("*fp32", {"BLOCK": 64}, "--signature has 1 types: copy takes x_ptr, y_ptr, N"),
        ("*fp32,*fp32,i32", {}, "--constexpr: copy needs BLOCK"),
        ("*fp32,*fp32,i32", {"BLOCK": 64, "BLOK": 1}, "--constexpr: copy has no BLOK"),
    ],
)
def test_mistakes_in_a_signature(signature: str, constants: dict[str, int], message: str) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    from fastgpt.errors import InputError
    from fastgpt.inspect.build import compile_user, load_triton

    kernel = jit.JITFunction(load_triton(HERE / "slow.py", "copy").fn)
    with pytest.raises(InputError, match=message):
        compile_user(kernel, signature, constants, warps=4, stages=1, sm=80)


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The interpreter instead of the compiler, and no nvcc."""
    from fastgpt.cli import main

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["inspect", "gelu"]) == 2
    assert "TRITON_INTERPRET=1 makes Triton interpret kernels: unset it" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(HERE))
    assert main(["inspect", str(HERE / "slow.cu")]) == 2
    assert "inspecting CUDA needs nvcc" in capsys.readouterr().err


MUTANTS = {
    "fastgpt/inspect/findings.py": [
        ("if not built.local_bytes and not loads + stores:", "if True:"),
        ("        if access.is_global:", "        if False:"),
        ('if re.search(PRODUCTS, built.stages.get("ttgir", "")):', "if False:"),
    ],
    "fastgpt/inspect/bounds.py": [
        ("ordered = sorted(seconds.items(), key=lambda item: -item[1])", "ordered = list(seconds.items())")
    ],
}
