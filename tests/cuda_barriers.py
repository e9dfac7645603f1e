"""Take each barrier and each wait out of the CUDA kernels, one at a time, and see that a test notices.

    python tests/cuda_barriers.py [word ...]      those alone whose file or text holds one of the words

Prints which removals nothing noticed, and exits with status 1 if there are any: such a barrier is not needed,
or the tests do not see that it is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cuda_emulator
from cuda_emulator import CSRC, CUDA, EMULATOR, ROOT

BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(\);|(?:ptx::)?cp_async_wait<\w+>\(\);")

PYTEST = [
    sys.executable,
    *"-m pytest -xqs -n 0 --tb=short -p no:cacheprovider tests/ops/test_emulated.py".split(),
]


class Barrier(NamedTuple):
    file: str
    line: int
    start: int
    end: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def barriers() -> Iterator[Barrier]:
    for path in sorted(CUDA.glob("*.cuh")):
        source = path.read_text()
        for match in BARRIER.finditer(source):
            if not source[: match.start()].split("\n")[-1].strip().startswith("//"):
                line = source.count("\n", 0, match.start()) + 1
                yield Barrier(path.name, line, *match.span(), match.group())


def launchers(barrier: Barrier) -> list[Path]:
    """The files that have to be compiled again."""
    reads = {path: Path(f"{cuda_emulator.compiled(path)}.d").read_text() for path in CUDA.glob("*.cu")}
    return sorted(path for path, names in reads.items() if f"/{barrier.file}" in names)


def operations(files: list[Path]) -> str:
    """For pytest's -k: the rows whose bindings call one of these launchers."""
    headers = {f'"cuda/{path.stem}.h"' for path in files} | {
        f'"cuda/{path.stem.split("_")[0]}.h"' for path in files
    }
    names = set()
    for path in CUDA.glob("*_ops.cpp"):
        text = path.read_text()
        if any(header in text for header in headers):
            names |= cuda_emulator.operations(path)
    return " or ".join(f"emulated-{name}-" for name in sorted(names))


def tests_fail(barrier: Barrier | None, files: list[Path], checked: str) -> str | None:
    """What is reported with the barrier gone, or None where all is well."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(CSRC, csrc)
        if barrier is not None:
            path = csrc / "cuda" / barrier.file
            text = path.read_text()
            path.write_text(text[: barrier.start] + ";" + text[barrier.end :])
        objects = [cuda_emulator.compiled(EMULATOR / name, checked) for name in ("runtime.cpp", "copy.cpp")]
        for source in cuda_emulator.sources():
            if source in files:
                target = Path(folder) / f"{source.name}.o"
                changed = csrc / "cuda" / source.name
                cuda_emulator.run([*cuda_emulator.command(changed, checked, csrc), "-o", str(target)])
                objects.append(target)
            else:
                objects.append(cuda_emulator.compiled(source, checked))
        library = Path(folder) / "libkernels.so"
        cuda_emulator.link(objects, library, checked)
        done = subprocess.run(
            [*PYTEST, "-k", operations(files)],
            env=cuda_emulator.environment(checked, library),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode == 0:
        return None
    told = re.findall(
        r"^E  .*|WARNING: ThreadSanitizer.*|Fatal.*|AddressSanitizer.*", done.stdout + done.stderr, re.M
    )
    assert told, done.stdout + done.stderr
    return " ".join(told[0].split())


def noticed(barrier: Barrier) -> bool:
    """The schedules are asked first, then ThreadSanitizer."""
    files = launchers(barrier)
    told = tests_fail(barrier, files, "") or tests_fail(barrier, files, "thread")
    print(f"{'noticed ' if told else 'SURVIVED'} {barrier}\n    {told or ''}", flush=True)
    return told is not None


def main() -> None:
    words = sys.argv[1:]
    chosen = [b for b in barriers() if not words or any(word in str(b) for word in words)]
    survivors = [barrier for barrier in chosen if not noticed(barrier)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} removals noticed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
