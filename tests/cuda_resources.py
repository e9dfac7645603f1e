"""The registers and the shared memory of the CUDA kernels, as ptxas reports them.

python tests/cuda_resources.py [chip ...]      compiles csrc/cuda for these chips: tests/cuda/resources.json
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cuda_emulator

from fastgpt.kernels import aot

SOURCES = sorted(path.name for path in cuda_emulator.CUDA.glob("*.cu") if '.cuh"' in path.read_text())
CHIPS = ["sm_80", "sm_90a", "sm_100a", "sm_120"]
# Of a multiprocessor: warps, blocks, and bytes of shared memory, of which each block takes one KiB more than
# it asks for (CUDA programming guide, "technical specifications per compute capability").
LIMITS = {
    "sm_80": (64, 32, 164 << 10),
    "sm_90a": (64, 32, 228 << 10),
    "sm_100a": (64, 32, 228 << 10),
    "sm_120": (48, 24, 100 << 10),
}
REGISTERS = 65536  # of a multiprocessor; a warp's are rounded up to REGISTER_UNIT
REGISTER_UNIT = 256
TABLE = cuda_emulator.ROOT / "tests/cuda/resources.json"
Resources = dict[
    str, list[int]
]  # of a kernel: registers of a thread, bytes of static shared memory of a block


@functools.cache
def version() -> str:
    """Of nvcc."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return str(re.findall(r"release ([\d.]+)", said)[0])


def cubin(source: Path, chip: str) -> Path:
    """The compiled file, with what ptxas said beside it. A warning, of which a spill is one, is an error."""
    folder = cuda_emulator.BUILD.parent / "nvcc"
    options = ["-std=c++17", "-O3", f"-arch={chip}", f"-I{cuda_emulator.ROOT / 'csrc'}"]
    options += [
        "-Werror=all-warnings",
        "-Xcompiler=-Wall,-Wextra",
        "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
    ]
    return cuda_emulator.kept(["nvcc", *options, "--cubin", str(source)], folder / f"{source.name}.{chip}")


def resources(said: str) -> Iterator[tuple[str, int, int, int]]:
    """(kernel, registers, static shared memory, spilled bytes) of each."""
    pattern = (
        r"Function properties for (\S+)\n.*, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stores, loads, registers, rest in re.findall(pattern, said):
        shared = re.findall(r"(\d+) bytes smem", rest)
        yield name, int(registers), int(shared[0]) if shared else 0, int(stores) + int(loads)


def occupancy(chip: str, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that blocks of `threads` threads can fill; 0 if none fits."""
    most_warps, most_blocks, most_shared = LIMITS[chip]
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // warp_registers // warps
    blocks = min(most_blocks, most_warps // warps, by_registers, most_shared // (shared + 1024))
    return blocks * warps / most_warps


def demangled(names: list[str]) -> list[str]:
    """Without arguments and our namespace."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [
        re.sub(r"\(.*|^void ", "", line.replace("fastgpt::cuda::", "")) for line in text.stdout.splitlines()
    ]


def measured(source: str, chip: str) -> Resources:
    found = list(resources(Path(f"{cubin(cuda_emulator.CUDA / source, chip)}.said").read_text()))
    names = demangled([name for name, *_ in found])
    assert len(set(names)) == len(found)
    return {name: [registers, shared] for name, (_, registers, shared, _) in zip(names, found, strict=True)}


def machine_code(source: str, chip: str) -> dict[str, str]:
    """Of each kernel."""
    code = aot.sass(cubin(cuda_emulator.CUDA / source, chip).read_bytes())
    found = dict(re.findall(r"\.text\.(\w+):\n(.*?)(?=\n\.text\.|\Z)", code, re.DOTALL))
    return dict(zip(demangled(list(found)), found.values(), strict=True))


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
    table["nvcc"] = version()
    table["kernels"] = {source: table["kernels"].get(source, {}) for source in SOURCES}
    for chip in sys.argv[1:] or CHIPS:
        for source in SOURCES:
            table["kernels"][source][chip] = measured(source, chip)
            TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            print(source, chip, flush=True)


if __name__ == "__main__":
    main()
