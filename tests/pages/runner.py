"""Pages run from top to bottom, each in a folder that has the files which it names, with small budgets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import cuda_emulator
import pytest

from fastgpt import ops

from .blocks import ROOT, Block, Problem, blocks
from .commands import Command, call, check, commands, make_targets

BENCH = "--out results --device cpu --threads 1"
# What makes a command small. They stand before a command's own options, which win.
SMALL = {
    "train": "--device cpu --corpus input.txt --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 "
    "--batch-size 4 --micro-batch-size 2 --max-steps 3 --warmup-steps 1 --log-every 1 --eval-tokens 64 "
    "--sample-tokens 4",
    "prepare": "--workers 1",
    "sample": "--device cpu --max-new-tokens 8",
    "eval": "--device cpu",
    "bench ops": f"{BENCH} --ops gelu --dtypes float32 --directions both --contenders native "
    "--case-seconds 0.05",
    "bench train": f"{BENCH} --contenders native-fp32 --micro-batches 1 --block-size 16 --steps 2 "
    "--case-seconds 0.05",
    "bench generate": f"{BENCH} --batches 1 --implementations eager --prompt 4 --new-tokens 2",
    "bench modern": "--variants RoPE --seeds 1337 --steps 2 --n-layer 1 --n-embd 16 --no-times",
}
# What stands after them, and wins: recipes of make have budgets of minutes.
LIMITS = {"bench generate": "--budget 0.5", "bench train": "--budget 1"}
SHELL = ("python", "pytest", "g++", "mkdir", "ls")  # what bash runs, as it stands; and ./programs
SECONDS = 900


class Compiler:
    """A process in which Triton compiles kernels, for `fastgpt inspect`: here it interprets them."""

    SOURCE = """
import json, os, sys
from pages.commands import call
for line in sys.stdin:
    folder, arguments = json.loads(line)
    os.chdir(folder)
    print(json.dumps(call(arguments)), flush=True)
"""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process is not None:
            self._process.communicate()

    def call(self, arguments: Sequence[str]) -> tuple[int, str]:
        """As `commands.call`, in the current folder."""
        if self._process is None:
            source = [sys.executable, "-c", self.SOURCE]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(source, stdin=pipe, stdout=pipe, text=True, env=environment())
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(Path.cwd()), list(arguments)]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise Problem(f"fastgpt {shlex.join(arguments)}: the process ended")
        status, said = json.loads(answer)
        return status, said


def environment(**more: str) -> dict[str, str]:
    """For processes: this checkout's fastgpt, on its own, without what tests ask of Triton."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    toolkit = {"CUDA_HOME": str(include.parent)} if (include := cuda_emulator.toolkit()) else {}
    return {**toolkit, **inherited, **paths, **more}


def run_page(page: Path, compiler: Compiler, *, slow: bool = False) -> None:
    """Run all blocks of a page in the current folder; without `slow`, lines so marked are only parsed.

    Raises:
        Problem: a block that fails or cannot be run, or a marker that is about nothing.
    """
    names: dict[str, object] = {"__name__": "page"}
    started: set[str] = set()
    for block in blocks(page):
        _check_markers(block)
        if block.title is not None:
            with Path(block.title).open("a" if block.title in started else "w", encoding="utf-8") as file:
                file.write(("\n\n" if block.title in started else "") + block.text + "\n")
            started.add(block.title)
        elif block.language == "python":
            _run_python(block, names)
        elif block.language in ("sh", "bash"):
            for command in commands(block.text):
                _run_command(block, command, compiler, slow)


def _check_markers(block: Block) -> None:
    for lines in (*block.skipped, *block.slow):
        for word in lines.words:
            if word not in block.text:
                raise block.problem(f"a marker is about {word!r}, which the block does not have")
    for options in block.options:
        if not any(_extends(options, command) for command in commands(block.text)):
            raise block.problem(f"`run with: {shlex.join(options)}` is about no command of the block")


def _extends(options: Sequence[str], command: Command) -> bool:
    """Whether the words of a marker before its first option are those that the command begins with."""
    name = _name(options)
    return command.words[: len(name)] == name


def _name(words: Sequence[str]) -> tuple[str, ...]:
    first = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    return tuple(words[:first])


def _run_python(block: Block, names: dict[str, object]) -> None:
    code = compile(block.text, block.place, "exec")
    if block.skipped:
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), ops.use():
            exec(code, names)
    except Exception as error:
        raise block.problem(f"{type(error).__name__}: {error}") from error


def _run_command(block: Block, command: Command, compiler: Compiler, slow: bool) -> None:
    skipped = any(lines.has(command.text) for lines in block.skipped)
    later = not slow and any(lines.has(command.text) for lines in block.slow)
    more = [
        word
        for options in block.options
        if _extends(options, command)
        for word in options[len(_name(options)) :]
    ]
    try:
        if skipped or later or _lacks_a_compiler(command):
            check(command)
        else:
            run(command, more, compiler, slow=slow)
    except Problem as problem:
        raise block.problem(str(problem)) from None


def _lacks_a_compiler(command: Command) -> bool:
    """Whether this machine has none for a command that compiles CUDA, or runs what was compiled."""
    if command.program == "g++" or command.words[0].startswith("./"):
        return cuda_emulator.absent() is not None
    return any(".cu" in word for word in command.words) and shutil.which("nvcc") is None


def run(command: Command, more: Sequence[str], compiler: Compiler, *, slow: bool) -> None:
    """Run a command with `more` options. With `slow` torchrun starts processes, else this one has to do.

    Raises:
        Problem: it fails, or is nothing that tests run.
    """
    arguments = command.fastgpt()
    if command.program == "make":
        found = make_targets(command.words[1:])
        if not found:
            raise Problem(f"{command.text} calls no fastgpt: mark the block")
        for inner in found:
            run(inner, (), compiler, slow=slow)
    elif command.program == "torchrun" and slow:
        launcher = re.sub(r"--nproc-per-node \d+", "--nproc-per-node 2", command.text).split("-m fastgpt")[0]
        _shell(f"{launcher} -m fastgpt {shlex.join([*small(arguments or []), *more])}", command.environment)
    elif arguments is not None:
        check(command)
        _call([*small(arguments), *more], command.environment, compiler)
    elif command.program in SHELL or command.words[0].startswith("./"):
        check(command)
        _shell(" ".join([command.text, shlex.join(more)]), {})
    else:
        raise Problem(f"{command.text}: nothing that the tests run: mark the block")


def small(arguments: Sequence[str]) -> list[str]:
    """A command of fastgpt with the options of SMALL and LIMITS; a run that is resumed has its own."""
    name = _name(arguments)
    keys = " ".join(name[:2]), name[0]
    options, limits = (
        next((table[key] for key in keys if key in table), "").split() for table in (SMALL, LIMITS)
    )
    if "--resume" in arguments and name == ("train",):
        options = []
    return [*name, *options, *arguments[len(name) :], *limits]


def _call(arguments: list[str], assigned: dict[str, str], compiler: Compiler) -> None:
    with pytest.MonkeyPatch.context() as patch, ops.use():
        for name, value in assigned.items():
            patch.setenv(name, value)
        if "FASTGPT_OPS" in assigned:
            ops.use_environment()
        status, said = (compiler.call if arguments[0] == "inspect" else call)(arguments)
    if status:
        raise Problem(f"fastgpt {shlex.join(arguments)}: exit status {status}\n{said}")


def _shell(text: str, assigned: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-euc", text],
        env=environment(**assigned),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        raise Problem(f"{text}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")


def slow_pages(pages: Sequence[Path]) -> list[Path]:
    """Those with something that only `make test-slow` runs: a marker, or processes of torchrun."""
    return [page for page in pages if re.search(r"<!-- run: slow|^torchrun ", page.read_text(), re.MULTILINE)]
