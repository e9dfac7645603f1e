"""The compiler's stages line by line, each with the source line that it comes from."""

from __future__ import annotations

import re
from typing import NamedTuple


class Line(NamedTuple):
    """A line of a stage; `source` is file:line, empty where it is not known."""

    text: str
    source: str


def annotated(stage: str, text: str) -> list[Line]:
    """The lines of `ttir`, `ttgir`, `llir`, `ptx` or `sass`."""
    find = {"ttir": _mlir, "ttgir": _mlir, "llir": _llvm, "ptx": _ptx, "sass": _sass}[stage]
    return find(text.splitlines())


def as_text(stage: str, text: str) -> str:
    """With the source in front of each line where it changes."""
    shown, before = [], ""
    for line in annotated(stage, text):
        source = line.source.rsplit("/", 1)[-1]
        shown.append(f"{source if source != before else '':>28} | {line.text}".rstrip())
        before = source
    return "\n".join(shown)


def _mlir(lines: list[str]) -> list[Line]:
    """MLIR names places at the end of the text: #loc3 = loc("file":line:column), or by another place."""
    places: dict[str, str] = {}
    for line in lines:
        if match := re.match(r"(#loc\d*) = loc\((.*)\)$", line):
            places[match[1]] = match[2]

    def resolve(place: str, depth: int = 0) -> str:
        if at := re.match(r'"([^"]+)":(\d+):\d+', place):
            return f"{at[1]}:{at[2]}"
        inner = re.search(r"#loc\d*", place)  # callsite(#loc1 at #loc2), "name"(#loc1)
        return resolve(places.get(inner[0], ""), depth + 1) if inner and depth < 20 else ""

    found = []
    for line in lines:
        match = re.search(r"\s*loc\((#loc\d*)\)$", line)
        if not line.startswith("#loc"):
            found.append(Line(line[: match.start()] if match else line, resolve(match[1]) if match else ""))
    return found


def _llvm(lines: list[str]) -> list[Line]:
    """LLVM names places !DILocation(line: 3, scope: !4), and a scope names its file."""
    metadata = {m[1]: m[2] for line in lines if (m := re.match(r"(!\d+) = (.*)$", line))}

    def file_of(scope: str, depth: int = 0) -> str:
        text = metadata.get(scope, "")
        if name := re.search(r'!DIFile\(filename: "([^"]+)"', text):
            return name[1]
        inner = re.search(r"\bfile: (!\d+)", text) or re.search(r"\bscope: (!\d+)", text)
        return file_of(inner[1], depth + 1) if inner and depth < 20 else ""

    def source(place: str) -> str:
        text = metadata.get(place, "")
        at = re.search(r"DILocation\(line: (\d+).*?scope: (!\d+)", text)
        return f"{file_of(at[2])}:{at[1]}" if at else ""

    found = []
    for line in lines:
        place = re.search(r", !dbg (!\d+)", line)
        if not re.match(r"!\d+ = ", line):
            found.append(Line(re.sub(r", !dbg !\d+", "", line), source(place[1]) if place else ""))
    return found


def _ptx(lines: list[str]) -> list[Line]:
    files = {m[1]: m[2] for line in lines if (m := re.match(r'\s*\.file\s+(\d+) "([^"]+)"', line))}
    found, source = [], ""
    for line in lines:
        if at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)\s+\d+(?:[^/]*//\s*(\S+?):\d+)?", line):
            named = at[3].rsplit(":", 1)[0] if at[3] else at[1]
            source = f"{files.get(at[1], named)}:{at[2]}"
        elif not re.match(r"\s*(\$L__tmp\d+:|//)", line):
            found.append(Line(line, source if line.startswith("\t") else ""))
    return found


def _sass(lines: list[str]) -> list[Line]:
    """Without the encodings, which take a line of their own."""
    found, source, fresh = [], "", False
    for line in lines:
        if at := re.match(r'\s*//## (?:File )?"?([^",]+?)"?(?:, line |:)(\d+)', line):
            if not fresh:
                source, fresh = f"{at[1]}:{at[2]}", True
        elif not re.match(r"\s*/\* 0x[0-9a-f]{16} \*/", line):
            fresh = False
            is_code = re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)
            text = re.sub(r"\s*/\* 0x[0-9a-f]{16} \*/\s*$", "", line)
            found.append(Line(text, source if is_code else ""))
    return found
