"""What the package's Triton kernels compile to, as tests/inspect/shipped.json records it for CI.

    python -m fastgpt.inspect.table [kernel files] [--families 80 90 ...] [--write | --json] [--candidates]

By default all examples that are not slow are compiled for sm_90, and those that stand for the others for
every family; `make inspect-table` records all that are not slow for every family.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgpt.chips import TYPICAL, chips
from fastgpt.inspect import build, sass, shipped
from fastgpt.inspect.report import analyse
from fastgpt.kernels.examples import Example
from fastgpt.kernels.launch import FAMILIES

TABLE = build.ROOT / "tests/inspect/shipped.json"
# What a compiler of another version may do otherwise.
EXACT = ("registers", "shared_bytes", "instructions", "tensor", "asynchronous")


def key(call: shipped.Call, number: int, family: int) -> str:
    return f"{call.module}/{call.example.name}/{number}:{call.name}/sm_{family}"


def entry(call: shipped.Call, family: int) -> dict[str, Any]:
    """What one launch compiles to."""
    chip = chips()[TYPICAL[family]]
    built = call.compile(family)
    analysis = analyse(call.title, built, chip, call.launch(built), call.work(), call.values())
    code, found = built.code, sass.widths(built.code.instructions)
    limits = analysis.bounds
    return {
        "registers": built.registers,
        "local_bytes": built.local_bytes,
        "shared_bytes": built.shared_bytes,
        "warps": built.warps,
        "instructions": len(code.body()),
        "tensor": code.count(sass.TENSOR),
        "asynchronous": code.count(sass.ASYNC_COPIES),
        # The widest accesses of global memory; a copy to shared memory is a load.
        "load_bytes": max([*found.get("global load", {}), *found.get("global to shared", {}), 0]),
        "store_bytes": max([*found.get("global store", {}), 0]),
        "blocks_of_sm": analysis.fits.blocks,
        "limit": analysis.fits.limit,
        "ceiling_us": round(limits.ceiling * 1e6, 2) if limits else None,
        "binding": limits.binding if limits else None,
        "findings": analysis.findings,
        "missing": shipped.missing(call.example.requires.get(call.name, ()), built),
        "constants": {name: str(value) for name, value in built.constants.items()},
    }


def entries(module: str, example: Example, family: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every kernel that an example launches."""
    for number, call in enumerate(shipped.calls(module, example, chips()[TYPICAL[family]])):
        yield key(call, number, family), entry(call, family)


def candidates(module: str, example: Example, family: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every kernel that an example may launch while its choices are tuned."""
    offered = shipped.candidates(module, example, chips()[TYPICAL[family]])
    for choice, calls in enumerate(offered):
        for number, call in enumerate(calls):
            yield f"{key(call, number, family)}/{choice}", entry(call, family)


def differences(name: str, now: dict[str, Any], before: dict[str, Any], *, same_compiler: bool) -> list[str]:
    """What of a kernel is worse than the record: spills, narrower accesses, tensor cores or findings.

    More registers and shared memory count where the compiler is that of the record.
    """
    worse = []
    if now["local_bytes"] > before["local_bytes"]:
        worse.append(f"{name}: spills {now['local_bytes']} bytes a thread, {before['local_bytes']} before")
    for kind in ("load", "store"):
        if now[f"{kind}_bytes"] < before[f"{kind}_bytes"]:
            found, known = now[f"{kind}_bytes"], before[f"{kind}_bytes"]
            worse.append(f"{name}: the widest global {kind} is of {found} bytes, {known} before")
    if before["tensor"] and not now["tensor"]:
        worse.append(f"{name}: no tensor core instructions, {before['tensor']} before")
    worse += [f"{name}: {finding}" for finding in now["findings"] if _name(finding) not in before["findings"]]
    if same_compiler:
        changed = [field for field in EXACT if now[field] != before[field]]
        worse += [f"{name}: {field} {now[field]}, {before[field]} before" for field in changed]
    return worse


def _name(finding: str) -> str:
    return finding.split(":")[0]


def compare(now: dict[str, dict[str, Any]], record: dict[str, Any], compiler: str) -> list[str]:
    """All differences of what is in the record; what is not in it is one too."""
    known = record["kernels"]
    found = [f"{name}: not in the table: make inspect-table" for name in now if name not in known]
    for name in now.keys() & known.keys():
        found += differences(name, now[name], known[name], same_compiler=compiler == record["triton"])
    return sorted(found)


def due(example: Example, families: Sequence[int] | None) -> Sequence[int]:
    """The families that an example is compiled for."""
    return families or (FAMILIES if example.every_chip else () if example.slow else (90,))


def _write(found: dict[str, dict[str, Any]], compiler: str) -> None:
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
    kept = before["kernels"] if before.get("triton") == compiler else {}
    # Of findings the names: the rest says where in the source, which moves.
    named = {n: {**one, "findings": sorted(set(map(_name, one["findings"])))} for n, one in found.items()}
    table = {"triton": compiler, "kernels": {**kept, **named}}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description="Compile the Triton kernels' examples without a GPU.")
    parser.add_argument("modules", nargs="*", choices=[[], *shipped.modules()], help="default: all")
    parser.add_argument("--families", nargs="*", type=int, choices=FAMILIES, help="default: all that are due")
    parser.add_argument("--candidates", action="store_true", help="those of tuning, not what is shipped")
    parser.add_argument("--write", action="store_true", help=f"record them in {Path(*TABLE.parts[-3:])}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    build.require_triton()
    compiled = candidates if options.candidates else entries
    found: dict[str, dict[str, Any]] = {}
    for module in options.modules or shipped.modules():
        for example in shipped.examples(module):
            if options.write and example.slow and not example.every_chip:
                continue
            for family in due(example, options.families):
                found.update(compiled(module, example, family))
        if options.write:
            _write(found, triton.__version__)
    if options.json:
        print(json.dumps({"triton": triton.__version__, "kernels": found}))
    elif not options.write:
        for name, one in found.items():
            print(f"{name:100} registers={one['registers']} spilled={one['local_bytes']} {one['findings']}")


if __name__ == "__main__":
    main()
