"""The CUDA kernels of csrc/cuda on the CPU: one more implementation, `emulated`, that only tests know.

`register_rows()` adds a row to the table for each operator with a CUDA binding, and `loaded()` makes them
run: it builds the kernels, their launchers and their bindings with g++ against tests/cuda/emulator
(docs/emulator.md), but for what has been built already, in build/emulator.

    python tests/cuda_emulator.py address|thread [pytest options]     tests/ops/test_emulated.py so checked

Environment: FASTGPT_EMULATOR_ONLY=gelu,dropout builds the files that begin so; FASTGPT_EMULATOR_SCHEDULE is
the order of threads, one of SCHEDULES or another seed; FASTGPT_EMULATOR_LIBRARY, a library to use as it is.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from fastgpt.errors import InputError
from fastgpt.ops import library, registry

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
EMULATOR = ROOT / "tests/cuda/emulator"
BUILD = ROOT / "build/emulator"
NAMESPACE = "fastgpt_emulated"
LIBRARY = "FASTGPT_EMULATOR_LIBRARY"
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
SCHEDULES = [
    "greedy:late",
    "greedy:early",
    "reverse:late",
    "reverse:early",
    "random:1:late",
    "random:2:early",
]


def toolkit() -> Path | None:
    """The CUDA toolkit's headers, which g++ compiles too."""
    homes = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    if nvcc := shutil.which("nvcc"):  # which may be a script that calls the real one
        done = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)]
    for home in homes:
        for include in (home / "include", home / "targets" / f"{os.uname().machine}-linux" / "include"):
            if (include / "crt/host_defines.h").exists():
                return include.resolve()
    return None


def absent() -> str | None:
    """Why nothing can be emulated here, or None."""
    if LIBRARY in os.environ:
        return None
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if toolkit() is None:
        return "the emulator needs the headers of the CUDA toolkit: put nvcc on PATH or set CUDA_HOME"
    return None


def sources() -> list[Path]:
    """Launchers, bindings and the like, in order."""
    only = tuple(os.environ.get("FASTGPT_EMULATOR_ONLY", "").split(","))
    names = sorted(path.name for path in CUDA.iterdir() if path.suffix in (".cu", ".cpp"))
    return [CUDA / name for name in names if name.startswith((*only, "partials"))]


def named(path: Path | str | None) -> str:
    """As the compiler is told of it, which runs in ROOT: the same in a copy of the tree."""
    return str(path).removeprefix(f"{ROOT}/")


def command(source: Path, checked: str, csrc: Path) -> list[str]:
    """The compiler's, but for what it writes."""
    flags = ["-fPIC", "-Wall", "-Wextra", "-Wno-attributes", "-Wno-unknown-pragmas", "-DFASTGPT_EMULATED"]
    includes = [EMULATOR, csrc, toolkit()]
    if source.name.endswith("_ops.cpp"):
        torch_include = Path(torch.__file__).parent / "include"
        includes += [torch_include, torch_include / "torch/csrc/api/include", sysconfig.get_path("include")]
        language = ["-std=c++20", "-O0", "-w"]
    elif source.name == "runtime.cpp":
        defined = [f"-DEMULATOR_{checked.upper()}_SANITIZER"] if checked else []
        language = ["-std=c++17", "-O2", *defined]
    else:
        language = ["-x", "c++", "-std=c++17", "-O2" if not checked else "-O1", "-g1", *SANITIZERS[checked]]
    return ["g++", *flags, *language, *(f"-I{named(path)}" for path in includes), "-c", named(source)]


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Test processes start together and make each file once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{target}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kept(call: Sequence[str], target: Path) -> Path:
    """The compiler's output in `target`, and what it said in `target`.said.

    They are from an earlier call where neither the command nor a file that it reads has changed since.
    """
    reads, said, stamp = (Path(f"{target}.{suffix}") for suffix in ("d", "said", "stamp"))

    def state() -> str:
        names = re.findall(r"[^\s\\]+", reads.read_text().split(":", 1)[1])
        digest = hashlib.sha256(" ".join(call).encode())
        for path in (ROOT / name for name in names):
            digest.update(path.read_bytes() if path.exists() else b"?")
        return digest.hexdigest()

    with locked(target):
        if not (target.exists() and stamp.exists() and stamp.read_text() == state()):
            stamp.unlink(missing_ok=True)
            said.write_text(run([*call, "-MMD", "-MF", str(reads), "-o", str(target)]))
            stamp.write_text(state())
    return target


def run(call: Sequence[str]) -> str:
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise InputError(f"{' '.join(call)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(source: Path, checked: str = "", csrc: Path = CSRC) -> Path:
    """The object file of a launcher, a binding or a part of the emulator."""
    # The sanitizers have to know what kernels do: bindings, like PyTorch, are not compiled for them.
    folder = BUILD / ("plain" if source.name.endswith("_ops.cpp") else checked or "plain")
    return kept(command(source, checked, csrc), folder / f"{source.name}.o")


def link(objects: Sequence[Path], out: Path, checked: str = "") -> None:
    """A shared library (`lib...`) or a program."""
    options = ["-shared"] if out.name.startswith("lib") else []
    if any(path.name.endswith("_ops.cpp.o") for path in objects):
        options += [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    run(["g++", *SANITIZERS[checked], *map(str, objects), *options, "-o", str(out)])


def build(files: Sequence[Path], name: str, checked: str = "", jobs: int = 2) -> Path:
    """Links the emulator and `files`, compiled where they have changed."""
    parts = [EMULATOR / "runtime.cpp", EMULATOR / "copy.cpp", *files]
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda part: compiled(part, checked), parts))
    digest = hashlib.sha256()
    for part in objects:
        digest.update(Path(f"{part}.stamp").read_bytes())
    # Named for its contents: a process may still run what was built before.
    out = BUILD / (checked or "plain") / f"{name}-{digest.hexdigest()[:16]}"
    with locked(out.with_name(name)):
        if not out.exists():
            for old in out.parent.glob(f"{name}-*"):
                if old.stat().st_mtime < time.time() - 3600:  # others may run it, and look up its symbols
                    old.unlink()
            link(objects, out, checked)
    return out


@functools.cache
def loaded() -> ctypes.CDLL:
    """The library of all kernels; loading it registers the bindings with PyTorch."""
    if reason := absent():
        raise InputError(reason)
    path = os.environ.get(LIBRARY) or build(sources(), "libkernels")
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def launches(clear: bool = False) -> list[tuple[str, int, int]]:
    """Launches so far, each once: kernel (mangled), threads of a block, bytes of dynamic shared memory."""
    call = loaded().emulator_launches
    call.restype = ctypes.c_char_p
    lines = [line.split() for line in call(clear).decode().splitlines()]
    return [(name, int(threads), int(shared)) for name, threads, shared in lines]


def set_schedule(schedule: str) -> None:
    if loaded().emulator_schedule(schedule.encode()) != 0:
        raise InputError(f"no schedule {schedule!r}")


def operations(binding: Path) -> set[str]:
    """Those that a binding registers, itself or by what it includes of csrc/shared."""
    text = binding.read_text()
    for name in re.findall(r'#include "(shared/\w+\.h)"', text):
        text += (CSRC / name).read_text()
    return set(re.findall(r'\bimpl\(\s*"(\w+)_forward"', text))


def operators() -> list[library.Operator]:
    """Those with a binding in csrc/cuda."""
    bound = {name for path in CUDA.glob("*_ops.cpp") if path in sources() for name in operations(path)}
    modules = [
        importlib.import_module(f"fastgpt.ops.{m.name}") for m in pkgutil.iter_modules(registry_path())
    ]
    found = {v.name: v for m in modules for v in vars(m).values() if isinstance(v, library.Operator)}
    return [found[name] for name in sorted(bound)]


def registry_path() -> list[str]:
    return [str(Path(registry.__file__).parent)]


_library: torch.library.Library | None = None


def register_rows() -> None:
    """Add the rows `emulated`, once a process."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library(NAMESPACE, "DEF")
    reason = absent()

    def missing(device: torch.device) -> str | None:
        return reason if device.type == "cpu" else "the emulator runs on CPU tensors"

    for operator in operators():
        for direction, schema in (("forward", operator.forward), ("backward", operator.backward)):
            if schema is not None:
                _library.define(f"{operator.name}_{direction}{schema}")
        kernels = library._attach(NAMESPACE, operator)
        registry.register(operator.name, "emulated", functools.partial(operator.call, kernels), missing)


OPTIONS = {
    # Python and PyTorch are not instrumented, and keep memory to the end.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def environment(checked: str, path: Path) -> dict[str, str]:
    """In which Python runs the kernels of a library; a sanitizer's own must be there from the start."""
    changes = {**OPTIONS, LIBRARY: str(path)}
    if checked:
        # With libstdc++, which Python does not load: the sanitizers would not find what throws exceptions.
        names = [f"lib{checked[0]}san.so", "libstdc++.so.6"]
        found = [run(["g++", f"-print-file-name={name}"]).strip() for name in names]
        changes["LD_PRELOAD"] = ":".join(found)
    return {**os.environ, **changes}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("address", "thread"):
        sys.exit(__doc__)
    path = build(sources(), "libkernels", sys.argv[1])
    call = [sys.executable, "-m", "pytest", "-q", "-s", "-n", "0", "-p", "no:cacheprovider"]
    call += ["tests/ops/test_emulated.py", *sys.argv[2:]]
    sys.exit(subprocess.run(call, env=environment(sys.argv[1], path), cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
