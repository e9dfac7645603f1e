"""The rules of occupancy, against NVIDIA's own calculator, which comes as a header."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from fastgpt.chips import chip, chips
from fastgpt.inspect.occupancy import occupancy, waves

PROGRAM = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, minor, warps, shared_sm, shared_block, reserved, threads, registers;
  long shared;
  while (scanf("%d%d%d%d%d%d%d%d%ld", &major, &minor, &warps, &shared_sm, &shared_block, &reserved, &threads,
               &registers, &shared) == 9) {
    cudaOccDeviceProp p;
    p.computeMajor = major, p.computeMinor = minor, p.maxThreadsPerBlock = 1024, p.warpSize = 32;
    p.maxThreadsPerMultiprocessor = 32 * warps, p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.sharedMemPerBlock = 48 << 10, p.sharedMemPerMultiprocessor = shared_sm, p.numSms = 1;
    p.sharedMemPerBlockOptin = shared_block, p.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes f;
    f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0;
    f.partitionedGCConfig = PARTITIONED_GC_OFF, f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    f.maxDynamicSharedSizeBytes = shared_block, f.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &state, threads, shared);
    printf("%d\n", error ? -error : result.activeBlocksPerMultiprocessor);
  }
}
"""


def header() -> Path | None:
    """Where Triton has it."""
    found = importlib.util.find_spec("triton")
    path = Path(str(found and found.origin)).parent / "backends/nvidia/include/cuda_occupancy.h"
    return path if path.exists() else None


@pytest.mark.skipif(header() is None or shutil.which("g++") is None, reason="needs g++ and Triton's headers")
def test_rules(tmp_path: Path) -> None:
    """Random kernels on every compute capability, as many blocks as NVIDIA's calculator says."""
    source, program, found = tmp_path / "occupancy.cpp", tmp_path / "occupancy", header()
    assert found is not None
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-O1", "-w", f"-I{found.parent}", source, "-o", program], check=True)
    rng, cases = random.Random(0), []
    for one in {c.capability: c for c in chips().values()}.values():
        for _ in range(400):
            threads = rng.choice([32, 64, 96, 128, 160, 256, 384, 512, 768, 1024])
            shared = rng.choice([0, rng.randrange(2048), rng.randrange(one.limits.shared_block)])
            cases.append((one, threads, rng.randint(16, 255), shared))
    lines = [
        f"{c.capability[0]} {c.capability[1]} {c.limits.warps} {c.limits.shared} {c.limits.shared_block} "
        f"{c.limits.reserved} {threads} {registers} {shared}"
        for c, threads, registers, shared in cases
    ]
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    expected = [int(line) for line in done.stdout.split()]
    ours = [occupancy(c.limits, threads, registers, shared).blocks for c, threads, registers, shared in cases]
    wrong = [line for line, a, b in zip(lines, expected, ours, strict=True) if a != b]
    assert len(expected) == len(cases) and not wrong, wrong[:5]
    assert 0 in ours and max(ours) >= 16


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks", "limit"),
    [
        (256, 32, 0, 8, "warps"),  # 8 blocks of 8 warps: all 64
        (256, 128, 0, 2, "registers"),  # 65536 / (128 * 256)
        (256, 33, 0, 6, "registers"),  # 33 registers are 40, in units of 256 a warp
        (32, 32, 0, 32, "blocks"),
        (128, 32, 99 << 10, 1, "shared memory"),  # one block of 100 KiB in 164
        (1024, 72, 0, 0, "registers"),  # does not start at all
        (128, 32, 164 << 10, 0, "shared memory"),  # more than a block may have
    ],
)
def test_limits(threads: int, registers: int, shared: int, blocks: int, limit: str) -> None:
    """Worked by hand from the CUDA programming guide's table of compute capability 8.0."""
    found = occupancy(chip("sm_80").limits, threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * threads / 32 / 64


def test_waves() -> None:
    assert waves(432, 108, 2) == 2.0
    assert waves(1, 108, 0) == float("inf")


MUTANTS = {
    "fastgpt/inspect/occupancy.py": [
        ("shared + limits.reserved", "shared"),
        (
            "limits.registers // PARTITIONS // of_warp * PARTITIONS // warps",
            "limits.registers // of_warp // warps",
        ),
        ("-(-registers * 32 // unit) * unit", "registers * 32"),
    ],
}
