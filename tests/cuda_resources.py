"""The registers and the shared memory of the CUDA kernels, as ptxas reports them.

python tests/cuda_resources.py [chip ...]      compiles csrc/cuda for these chips: tests/cuda/resources.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import cuda_emulator

from fastgpt.chips import chip as chip_of
from fastgpt.inspect import build
from fastgpt.inspect.occupancy import occupancy as fitting

SOURCES = sorted(path.name for path in cuda_emulator.CUDA.glob("*.cu") if '.cuh"' in path.read_text())
CHIPS = list(build.ARCHITECTURES.values())
TABLE = cuda_emulator.ROOT / "tests/cuda/resources.json"
Resources = dict[
    str, list[int]
]  # of a kernel: registers of a thread, bytes of static shared memory of a block


def cubin(source: Path, chip: str) -> Path:
    """The compiled file, with what ptxas said beside it. A warning, of which a spill is one, is an error."""
    folder = cuda_emulator.BUILD.parent / "nvcc"
    options = [
        "-Werror=all-warnings",
        "-Xcompiler=-Wall,-Wextra",
        "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
    ]
    call = [*build.nvcc_command(source, chip), *options, "--cubin"]
    return cuda_emulator.kept(call, folder / f"{source.name}.{chip}")


def occupancy(chip: str, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that blocks of `threads` threads can fill; 0 if none fits."""
    return fitting(chip_of(chip).limits, threads, registers, shared).share


def measured(source: str, chip: str) -> Resources:
    found = list(build.ptxas_report(Path(f"{cubin(cuda_emulator.CUDA / source, chip)}.said").read_text()))
    names = build.demangled([name for name, *_ in found])
    assert len(set(names)) == len(found)
    return {name: [registers, shared] for name, (_, registers, shared, _) in zip(names, found, strict=True)}


def machine_code(source: str, chip: str) -> dict[str, str]:
    """Of each kernel."""
    code = build.machine_code(cubin(cuda_emulator.CUDA / source, chip).read_bytes())
    found = dict(re.findall(r"\.text\.(\w+):\n(.*?)(?=\n\.text\.|\Z)", code, re.DOTALL))
    return dict(zip(build.demangled(list(found)), found.values(), strict=True))


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
    table["nvcc"] = build.nvcc_version()
    table["kernels"] = {source: table["kernels"].get(source, {}) for source in SOURCES}
    for chip in sys.argv[1:] or CHIPS:
        for source in SOURCES:
            table["kernels"][source][chip] = measured(source, chip)
            TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            print(source, chip, flush=True)


if __name__ == "__main__":
    main()
