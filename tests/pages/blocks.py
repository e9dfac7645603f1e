"""What a page holds that can be run: fenced blocks with their markers, and inline code.

Every fence names its language. Blocks of `sh` and `python` are run, in the order of the page and in one
folder, and a fence with a title, as in ```python title="relu2.py", is (a piece of) that file. HTML comments,
which no reader sees, stand before a fence and say what is different:

    <!-- run: no, needs the network -->                  not run, only parsed; REASONS lists the reasons
    <!-- run: no, needs the network: fineweb, hf: -->    only the lines with one of these pieces of text
    <!-- run: slow -->                                   run by `make test-slow`; for lines too, as above
    <!-- run with: fastgpt bench train --steps 2 -->     these options at the end of that command
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ("sh", "bash", "python")
LANGUAGES = (*RUN, "text", "cpp", "yaml")
REASONS = (
    "needs the network",
    "needs a GPU",
    "needs several machines",
    "installs packages",
    "takes minutes",
    "runs these tests",
)

_FENCE = re.compile(r'(?P<indent> *)(?P<ticks>```+)(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\s*$')
_COMMENT = re.compile(r"<!--\s*(run(?: with)?)\s*:\s*(.*?)\s*-->\s*$")
_INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


class Problem(AssertionError):
    """Something in a page that does not work, with its place."""


@dataclass(frozen=True)
class Lines:
    """Which lines of a block a marker is about: those with one of `words`, or all without words."""

    reason: str = ""
    words: tuple[str, ...] = ()

    def has(self, line: str) -> bool:
        return not self.words or any(word in line for word in self.words)


@dataclass(frozen=True)
class Block:
    """One fence. `place` is PAGE:LINE of its first line."""

    place: str
    language: str
    title: str | None
    text: str
    skipped: tuple[Lines, ...] = ()
    slow: tuple[Lines, ...] = ()
    options: tuple[tuple[str, ...], ...] = field(default=())

    def problem(self, what: str) -> Problem:
        return Problem(f"{self.place}: {what}\n\n{self.text}")


def pages() -> list[Path]:
    """README and CONTRIBUTING and all of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def blocks(page: Path) -> list[Block]:
    """The fences of a page.

    Raises:
        Problem: one without a language or an end, a marker that does not say what it should, or that stands
            before no fence.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    found, markers, number = [], _Markers(), 0
    while number < len(lines):
        place, line = f"{name_of(page)}:{number + 1}", lines[number]
        number += 1
        if match := _COMMENT.match(line.strip()):
            markers.add(match[1], match[2], place)
        elif match := _FENCE.match(line):
            end = next((n for n in range(number, len(lines)) if lines[n].strip() == match["ticks"]), None)
            if end is None or match["language"] not in LANGUAGES:
                wrong = "has no end" if end is None else f"is of {match['language'] or 'no language'}"
                raise Problem(f"{place}: the fence {wrong}: it must be of one of {', '.join(LANGUAGES)}")
            text = "\n".join(line.removeprefix(match["indent"]) for line in lines[number:end])
            found.append(markers.block(place, match["language"], match["title"], text))
            markers, number = _Markers(), end + 1
        elif line.strip() and markers.any():
            raise Problem(f"{place}: a marker must stand right before a fence")
        elif re.match(r"( {4}|\t)\s*(\w+=\S+ )*(fastgpt|make|torchrun|python|pip|pytest) ", line):
            raise Problem(f"{place}: a command in an indented block, which is not run: make it a fence of sh")
    return found


class _Markers:
    """Those read since the last fence."""

    def __init__(self) -> None:
        self.skipped: list[Lines] = []
        self.slow: list[Lines] = []
        self.options: list[tuple[str, ...]] = []

    def any(self) -> bool:
        return bool(self.skipped or self.slow or self.options)

    def add(self, kind: str, value: str, place: str) -> None:
        if kind == "run with":
            self.options.append(tuple(shlex.split(value)))
            return
        what, _, words = value.partition(": ")
        lines = Lines(what.removeprefix("no, "), tuple(filter(None, words.split(", "))))
        if what == "slow":
            self.slow.append(lines)
        elif what.startswith("no, ") and lines.reason in REASONS:
            self.skipped.append(lines)
        else:
            allowed = ", ".join(["slow", *(f"no, {reason}" for reason in REASONS)])
            raise Problem(f"{place}: run: {what!r} must be one of {allowed}")

    def block(self, place: str, language: str, title: str | None, text: str) -> Block:
        return Block(place, language, title, text, tuple(self.skipped), tuple(self.slow), tuple(self.options))


def inline(page: Path) -> Iterator[tuple[str, str]]:
    """(place, code) of all inline code outside of fences; its line breaks are spaces."""
    lines, inside = page.read_text(encoding="utf-8").splitlines(), ""
    for number, line in enumerate(lines):
        if match := _FENCE.match(line):
            inside = "" if inside == match["ticks"] else inside or match["ticks"]
            lines[number] = ""
        elif inside:
            lines[number] = ""
    text = "\n".join(lines)
    for match in _INLINE.finditer(text):
        place = f"{name_of(page)}:{text.count(chr(10), 0, match.start()) + 1}"
        yield place, " ".join(match[2].split())
