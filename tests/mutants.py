"""Break the code in known ways, one at a time, and see that a test notices.

    python tests/mutants.py [-j jobs] [word ...]      only mutants whose file or text holds one of the words

A test file lists what its tests must notice:

    MUTANTS = {"kernels/foo.py": [("text that occurs once", "what to put there"), ...]}

A third string in the tuple is given to pytest in place of the test file. Each mutant is made in a copy of
the tree, so that the tree itself is never touched. What a mutant of csrc/ changes is compiled again: for the
emulator (csrc/cuda), or into the copy's fastgpt._C. Prints the mutants that no test noticed, and exits with
status 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_emulator
import torch

ROOT = Path(__file__).parents[1]
COPIED = ("fastgpt", "kernels", "benchmarks", "csrc", "docs", "tests", "pyproject.toml")
EMULATED = Path("build/emulator/plain")  # what the emulator has compiled


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r}"


def mutants() -> Iterator[Mutant]:
    """What the test files list, in order."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MUTANTS":
                for file, changes in ast.literal_eval(node.value).items():
                    for old, new, *tests in changes:
                        yield Mutant(file, old, new, *(tests or [str(path.relative_to(ROOT))]))


def mutate(mutant: Mutant, tree: Path) -> None:
    """Copy what tests need to `tree`, with the change."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, tree / name)
    # Installed for development, these two of fastgpt's are the original tree's: here they must be the copy's.
    for name in ("kernels", "benchmarks"):
        link = tree / "fastgpt" / name
        link.unlink(missing_ok=True)
        link.symlink_to(f"../{name}")
    path = tree / mutant.file
    text = path.read_text()
    if (count := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.file} holds {count} times, not once: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new))
    if (ROOT / EMULATED).exists():  # else the tests compile all of it, for minutes
        shutil.copytree(ROOT / EMULATED, tree / EMULATED)
    if mutant.file.startswith("csrc/") and not mutant.file.startswith("csrc/cuda/"):
        build_extension(tree, mutant.file)


def build_extension(tree: Path, changed: str) -> None:
    """Link fastgpt._C of what was compiled for the CPU in ROOT, but for the files that read `changed`.

    Compiling all of it for each mutant would take minutes.
    """
    folder = next((ROOT / "build").glob("temp.*"))
    ask = [sys.executable, "-m", "ninja", "-t", "compdb", "compile"]
    said = subprocess.run(ask, cwd=folder, check=True, capture_output=True, text=True)
    objects = {}
    for step in json.loads(said.stdout):
        source, target, command = Path(step["file"]), step["output"], step["command"]
        if "/csrc/cuda/" in target:
            continue
        objects[source] = target
        if tree / changed in reads(tree / source.relative_to(ROOT), set()):
            objects[source] = f"{tree}/{source.parent.name}_{source.stem}.o"
            command = command.replace(target, objects[source]).replace(f"{ROOT}/csrc", f"{tree}/csrc")
            subprocess.run(command, shell=True, check=True, capture_output=True)
    out = next((tree / "fastgpt").glob("_C.*.so"))
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python"]
    subprocess.run(["c++", "-shared", "-fopenmp", *objects.values(), *libraries, "-o", out], check=True)


def reads(source: Path, seen: set[Path]) -> set[Path]:
    """The file and those of csrc/ that it includes, also by way of a macro; added to `seen`."""
    csrc = next(folder for folder in source.parents if folder.name == "csrc")
    seen.add(source)
    for name in re.findall(r'"([\w/]+\.h)"', source.read_text()):
        if (csrc / name).exists() and csrc / name not in seen:
            reads(csrc / name, seen)
    return seen


def noticed(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        mutate(mutant, tree)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    # 1: a test failed; 2: a test file could not be read; below 0: a signal, such as for memory that is not
    # there. Anything else is a mistake in the list.
    if done.returncode > 2:
        raise SystemExit(f"{mutant}\n{done.stdout}{done.stderr}")
    first = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    verdict = "noticed " if done.returncode else "SURVIVED"
    print(f"{verdict} {time.perf_counter() - start:4.0f} s  {mutant}\n    {first[:150]}", flush=True)
    return done.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Break the code in known ways and see that tests notice.")
    parser.add_argument("words", nargs="*")
    parser.add_argument("-j", type=int, default=1, help="how many at the same time")
    options = parser.parse_args()
    chosen = [m for m in mutants() if not options.words or any(word in str(m) for word in options.words)]
    if any(mutant.file.startswith("csrc/cuda/") for mutant in chosen):
        cuda_emulator.loaded()  # compiles what is not yet
    with ThreadPoolExecutor(options.j) as pool:
        results = list(pool.map(noticed, chosen))
    survivors = [mutant for mutant, seen in zip(chosen, results, strict=True) if not seen]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants noticed")
    for mutant in survivors:
        print(f"survived: {mutant}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
