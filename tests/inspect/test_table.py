"""The record of the shipped kernels: what counts as worse, and that the record itself is good."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

from fastgpt.inspect import shipped
from fastgpt.inspect.table import TABLE, compare, due

RECORD = json.loads(TABLE.read_text())
NAME = "gelu/gelu_forward-tanh-bfloat16/0:_gelu_forward/sm_80"
HELD = "attention/forward 64 bfloat16/0:_attention_forward/sm_80"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (NAME, {}, None),
        (NAME, {"local_bytes": 8}, "spills 8 bytes a thread, 0 before"),
        (NAME, {"load_bytes": 8}, "the widest global load is of 8 bytes, 16 before"),
        (NAME, {"store_bytes": 2}, "the widest global store is of 2 bytes, 16 before"),
        (HELD, {"tensor": 0}, "no tensor core instructions"),
        (NAME, {"findings": ["uncoalesced: loads"]}, "uncoalesced: loads"),
    ],
)
@pytest.mark.parametrize("compiler", [RECORD["triton"], "another"])
def test_what_is_worse(name: str, changes: dict[str, Any], message: str | None, compiler: str) -> None:
    """Whatever the compiler: spills, narrower accesses, lost tensor cores and new findings."""
    found = compare({name: {**RECORD["kernels"][name], **changes}}, RECORD, compiler)
    if message is None:
        assert not found
    else:
        assert any(message in line for line in found), found


def test_registers_count_for_the_same_compiler() -> None:
    more = {NAME: {**RECORD["kernels"][NAME], "registers": RECORD["kernels"][NAME]["registers"] + 1}}
    assert compare(more, RECORD, "another") == []
    assert "registers" in compare(more, RECORD, RECORD["triton"])[0]
    assert "make inspect-table" in compare({"new": more[NAME]}, RECORD, "another")[0]


def test_the_record() -> None:
    """Every example that tests compile is in it; nothing in it spills or lacks what it must have."""
    for module in shipped.modules():
        for example in shipped.examples(module):
            for family in due(example, None):
                start = f"{module}/{example.name}/"
                found = [n for n in RECORD["kernels"] if n.startswith(start) and n.endswith(f"/sm_{family}")]
                assert found, f"{start} for sm_{family}: make inspect-table"
    for name, entry in RECORD["kernels"].items():
        assert entry["local_bytes"] == 0 and not entry["missing"] and entry["ceiling_us"], name
        assert set(entry["findings"]) <= {"tail", "few warps", *accepted(name)}, (name, entry["findings"])


def accepted(name: str) -> set[str]:
    """What is known of a kernel, and why it stays."""
    if ":_prepare/" in name:
        return {"uncoalesced"}  # a row of a table for each tensor, of which there are a few hundred
    if ":_linear_gelu/" in name and "float32" in name:
        return {"no tensor cores"}  # fp32 is exact products, unless the user allows tf32
    if "attention" in name and ("float32" in name or "backward 80 bfloat16 dropout window" in name):
        return {"bank conflicts"}  # Triton's own conversion of scores to the layout of an operand
    return set()


MUTANTS = {
    "fastgpt/inspect/table.py": [
        ('now["local_bytes"] > before["local_bytes"]', "False"),
        ('now[f"{kind}_bytes"] < before[f"{kind}_bytes"]', "False"),
        ("compiler == record[\"triton\"]", "True"),
    ],
}  # fmt: skip
