"""Every kernel compiles for every chip family, without a GPU, into the code that was meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastgpt.chips import chip
from fastgpt.inspect.table import TABLE, compare

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = sorted(path.stem for path in KERNELS.glob("*.py") if "\ndef examples(" in path.read_text())
TUNED = [name for name in MODULES if "@tunable\n" in (KERNELS / f"{name}.py").read_text()]
FAMILIES = (80, 90, 100, 120)


def compiled(*arguments: str) -> tuple[dict[str, dict[str, Any]], str]:
    """What `fastgpt.inspect.table` finds, in a process where kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt.inspect.table", *arguments, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["kernels"], found["triton"]


def parts(name: str) -> tuple[str, int]:
    """The kernel and the family in the name of a record."""
    kernel, family = name.split("/")[2:4]
    return kernel.split(":")[1], int(family.removeprefix("sm_"))


def check(results: dict[str, dict[str, Any]]) -> None:
    assert results
    for name, result in results.items():
        limits = chip(f"sm_{parts(name)[1]}").limits
        assert not result["missing"], (name, result)
        assert result["local_bytes"] == 0, f"spills: {name} {result}"
        assert result["shared_bytes"] <= limits.shared_block, (name, result)
        assert result["blocks_of_sm"] >= 1, f"no SM has so much: {name} {result}"


@pytest.mark.parametrize("module", MODULES)
def test_compiles(module: str) -> None:
    """All examples for sm_90, those that cover each kernel once for every family: as recorded."""
    results, compiler = compiled(module)
    check(results)
    assert not compare(results, json.loads(TABLE.read_text()), compiler)
    kernels = {parts(name)[0] for name in results}
    for family in FAMILIES:
        if any(parts(name)[1] != 90 for name in results):
            assert {parts(name)[0] for name in results if parts(name)[1] == family} == kernels


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_for_every_family(module: str, family: int) -> None:
    """All examples: those that are recorded as they are recorded."""
    results, compiler = compiled(module, "--families", str(family))
    check(results)
    record = json.loads(TABLE.read_text())
    known = {name: result for name, result in results.items() if name in record["kernels"]}
    assert known and not compare(known, record, compiler)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("module", TUNED)
def test_candidates_compile(module: str, family: int) -> None:
    """Whatever tuning may choose compiles without spills, as what is shipped does."""
    check(compiled(module, "--families", str(family), "--candidates")[0])
