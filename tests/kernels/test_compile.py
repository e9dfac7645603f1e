"""Every kernel compiles for every chip family, without a GPU, into the code that was meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = sorted(path.stem for path in KERNELS.glob("*.py") if "\ndef examples(" in path.read_text())
TUNED = [name for name in MODULES if "@tunable\n" in (KERNELS / f"{name}.py").read_text()]
FAMILIES = (80, 90, 100, 120)


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What `fastgpt.kernels.aot` finds, in a process where kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt.kernels.aot", *arguments, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def check(results: list[dict[str, Any]]) -> None:
    assert results
    for result in results:
        assert not result["missing"], result
        assert result["local_bytes"] == 0, f"spills: {result}"
        assert result["shared_bytes"] <= result["shared_limit"], result
        assert result["registers"] * 32 * result["warps"] <= 65536, f"no SM has so many registers: {result}"


@pytest.mark.parametrize("module", MODULES)
def test_compiles(module: str) -> None:
    """All examples for sm_90, and those that cover each kernel once for every family."""
    results = compiled(module)
    check(results)
    kernels = {result["kernel"] for result in results}
    for family in FAMILIES:
        if any(result["family"] != 90 for result in results):
            assert {r["kernel"] for r in results if r["family"] == family} == kernels


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_for_every_family(module: str, family: int) -> None:
    check(compiled(module, "--families", str(family)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("module", TUNED)
def test_candidates_compile(module: str, family: int) -> None:
    """Whatever tuning may choose compiles without spills, as what is shipped does."""
    check(compiled(module, "--families", str(family), "--candidates"))


def test_every_kernel_file_is_compiled() -> None:
    """A file with kernels lists examples, or serves a file that does."""
    sources = {path.stem: path.read_text() for path in KERNELS.glob("*.py")}
    for name, source in sources.items():
        if "@triton.jit" in source and name not in MODULES:
            users = [other for other in MODULES if f"from fastgpt.kernels.{name} import" in sources[other]]
            assert users, f"kernels/{name}.py has no examples()"
