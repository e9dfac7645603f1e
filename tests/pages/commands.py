"""Commands as the pages have them: taken apart, and held against the real command line without a run."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tyro

from fastgpt.cli import COMMANDS, main

from .blocks import ROOT, Problem

# In place of what a reader chooses, where a name would be looked up before anything else is.
PLACEHOLDERS = {"PRESET": "char-cpu", "SUITE": "ops", "KERNEL": "gelu", "FILE.yaml": "mine.yaml", "...": ""}
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One simple command of a shell."""

    text: str
    """As it stands there, without its comment."""
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """What it assigns before its name."""

    @property
    def program(self) -> str:
        return Path(self.words[0]).name

    def fastgpt(self) -> list[str] | None:
        """What `fastgpt` gets: also by `python -m fastgpt` and by torchrun; None for other programs."""
        if self.program == "fastgpt":
            return list(self.words[1:])
        if "-m" in self.words and self.words[self.words.index("-m") + 1 :][:1] == ("fastgpt",):
            return list(self.words[self.words.index("-m") + 2 :])
        return None


def commands(script: str) -> Iterator[Command]:
    """Those of a script of simple commands, which `&&` and lines separate.

    Raises:
        Problem: quotes that do not end.
    """
    for line in script.replace("\\\n", " ").splitlines():
        code = _without_comment(line).strip()
        for part in filter(None, re.split(r"\s&&\s", code)):
            try:
                words = shlex.split(part)
            except ValueError as error:
                raise Problem(f"{part!r} is no command: {error}") from None
            environment = {}
            while words and (match := _ASSIGNMENT.fullmatch(words[0])):
                environment[match[1]] = match[2]
                words = words[1:]
            yield Command(part, tuple(words), environment)


def _without_comment(line: str) -> str:
    """Up to a # that begins a word outside of quotes."""
    code = re.match(r"""('[^']*'|"[^"]*"|(?<=\S)#|[^'"#])*""", line)
    assert code is not None
    return code[0] if line[code.end() :].startswith("#") else line


# -- checking ------------------------------------------------------------------------------------------------


def check(command: Command) -> None:
    """Hold a command against what would run it; its files are looked for in the current folder.

    Raises:
        Problem: an option, value, file, target or extra that does not exist.
    """
    arguments = command.fastgpt()
    if command.program == "torchrun":
        _check_torchrun(command.words[1:])
    if arguments is not None:
        parse_only(arguments)
    elif command.program == "make":
        make_targets(command.words[1:])
    elif command.program in ("python", "pytest"):
        for word in command.words[1:]:
            if re.fullmatch(r"[\w./-]+(\.py|/\w+)", word) and not Path(word).exists():
                raise Problem(f"{command.text}: there is no {word}")
    elif command.program == "pip":
        for extra in re.findall(r"fastgpt\[([\w,-]+)\]", command.text):
            if not set(extra.split(",")) <= extras():
                raise Problem(f"{command.text}: the extras are {', '.join(sorted(extras()))}")


class _ParsedError(BaseException):
    """Arguments were parsed, and nothing shall run."""


def parse_only(arguments: Sequence[str]) -> None:
    """`fastgpt ARGUMENTS` as far as its options are parsed, into values of their types.

    Raises:
        Problem: the command line refuses them.
    """
    real = tyro.cli

    def cli(*args: Any, **options: Any) -> None:
        real(*args, **options)
        raise _ParsedError

    filled = [PLACEHOLDERS.get(word, word) for word in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", cli)
        with contextlib.suppress(_ParsedError):
            status, said = call([word for word in filled if word])
            if status:
                raise Problem(f"fastgpt {shlex.join(arguments)}: {said}")


def call(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of `fastgpt ARGUMENTS` in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(arguments)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return status, said.getvalue()


def check_inline(code: str) -> None:
    """A command in running text: `fastgpt bench ops` names one, with arguments it must be a whole one.

    Raises:
        Problem: as `check`; also where there is no such command.
    """
    (command,) = commands(code)
    arguments = command.fastgpt()
    if arguments is not None and len(arguments) == 1 and arguments[0] in COMMANDS:
        return  # the name of a command
    if arguments is not None and arguments[0] == "bench" and len(arguments) == 2:
        arguments = [*arguments, "--help"]  # the name of a suite
        parse_only(arguments)
    elif command.program == "torchrun" and arguments is None:
        _check_torchrun([*command.words[1:], "-m", "fastgpt"])  # its own options alone
    else:
        check(command)


def _check_torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import parse_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_args(list(words))
    except SystemExit:
        raise Problem(f"torchrun {shlex.join(words)}: {said.getvalue()}") from None


@functools.cache
def make_targets(arguments: tuple[str, ...]) -> list[Command]:
    """The `fastgpt` commands that `make ARGUMENTS` would run, by a dry run.

    Raises:
        Problem: make refuses, as where there is no such target.
    """
    dry = ["make", "--dry-run", "--no-print-directory", "--old-file=install", *arguments]
    # Without what `make test` hands on to the programs that it calls.
    inherited = {name: value for name, value in os.environ.items() if not re.match("MAKE|MFLAGS|ARGS", name)}
    done = subprocess.run(dry, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Problem(f"make {shlex.join(arguments)}: {done.stderr}")
    calls = re.findall(r"(?:^|\s)\S*bin/fastgpt ([^|>;&\n]+)", done.stdout)
    return [Command(f"fastgpt {found}", ("fastgpt", *shlex.split(found))) for found in calls]


@functools.cache
def extras() -> set[str]:
    """The names of the optional dependencies."""
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", text, re.MULTILINE))


@functools.cache
def options_of_fastgpt() -> set[str]:
    """Every option of every command, as `--help` shows them."""
    from fastgpt.benchmarks.command import SUBCOMMANDS

    named = [[name] for name in COMMANDS if name not in ("bench", "train")]
    shown = ""
    for words in [*named, ["train", "char-cpu"], *(["bench", name] for name in SUBCOMMANDS)]:
        shown += call([*words, "--help"])[1]
    return set(re.findall(r"--[a-z][a-z0-9-]*", shown))
