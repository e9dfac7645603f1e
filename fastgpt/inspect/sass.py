"""Machine code as nvdisasm prints it: instructions, the pipes that run them, memory accesses and loops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TENSOR = r"U?[HIDQBO](G?MMA)|UTC[A-Z]*MMA"
UNIFORM = r"U(?!TC|TMA|BLK|CGABAR)[A-Z0-9]+|R2UR|S2UR|LDCU|VOTEU"
# The kind of an instruction by its name; the first pattern that matches the whole of it counts.
KINDS = {
    "tensor": TENSOR,
    "fp32": r"FFMA2?|FMUL2?|FADD2?|FFMA32I|FMUL32I|FADD32I|FSWZADD",
    "half2": r"HFMA2|HADD2|HMUL2|HFMA2_MMA",
    "fp64": r"DFMA|DADD|DMUL|DSETP",
    "imad": r"IMAD|IDP|IDP4A",
    "sfu": r"MUFU|POPC|FLO|BREV",
    "convert": r"F2F|F2I|I2F|FRND|I2I|F2IP",
    "shuffle": r"SHFL|REDUX|MATCH",
    "memory": r"LDG|STG|LDS|STS|LDSM|STSM|LDGSTS|LDL|STL|LD|ST|ATOM[GS]?|RED|REDG|LDC|LDTM|STTM|UTMA[A-Z]*|"
    r"UBLK[A-Z]*",
    "barrier": r"BAR|DEPBAR|LDGDEPBAR|WARPSYNC|MEMBAR|FENCE|SYNCS|WARPGROUP|UTC[A-Z]*|ERRBAR|BSYNC|BSSY|CCTL|"
    r"UCGABAR_[A-Z]+|ARRIVES|ACQBULK|B2R",
    "control": r"BRA|BRX|BRXU|JMP|CALL|RET|EXIT|NOP|YIELD|NANOSLEEP|ELECT|BREAK|BMOV|KILL|BPT|RPCMOV|PREEXIT",
    "uniform": UNIFORM,
}
# What a kind is called in reports, in their order; instructions of no kind above are `alu`.
PIPES = ("tensor", "fp32", "half2", "fp64", "imad", "alu", "sfu", "convert", "shuffle", "memory")
OTHERS = ("barrier", "uniform", "control")
_KINDS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}

ASYNC_COPIES = r"LDGSTS|UTMALDG|UTMASTG|UBLKCP"
LOCAL = r"LDL|STL"


@dataclass(frozen=True)
class Instruction:
    """One instruction. `control` is what the compiler tells the scheduler: see schedule.py."""

    address: int
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicate: str
    control: int
    source: str  # file:line, empty without line information

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(self.name)), "alu")

    @property
    def width(self) -> int:
        """Bytes that a thread loads or stores; 0 for what is not a memory access of threads."""
        if self.kind != "memory" or self.name.startswith(("U", "LDC", "LDTM", "STTM")):
            return 0
        if self.name in ("LDSM", "STSM"):  # matrices of 8 x 8 halves: 4 bytes a thread each
            return 4 * int(self.opcode[-1]) if self.opcode[-1] in "24" else 4
        sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in self.opcode.split(".")[1:] if part in sizes), 4)

    @property
    def is_global(self) -> bool:
        return self.name in ("LDG", "STG", "LDGSTS", "RED", "REDG", "ATOMG")

    @property
    def flops(self) -> int:
        """Of a warp's part of a tensor core instruction; 0 where the instruction does not tell (UTCHMMA)."""
        if self.kind != "tensor":
            return 0
        if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", self.opcode):  # a group of four warps
            m, n, k = map(int, shape.groups())
            return 2 * m * n * k // 4
        if shape := re.search(r"\.(16|8)(8)(\d+)", self.opcode):
            m, n, k = map(int, shape.groups())
            return 2 * m * n * k
        return 0

    @property
    def precision(self) -> str:
        """Of a tensor core instruction: tf32, or bf16, whose peak fp16 shares."""
        return "tf32" if "TF32" in self.opcode or ".1684" in self.opcode else "bf16"


@dataclass(frozen=True)
class Loop:
    """Instructions first..last, where the last branches back to the first."""

    first: int  # positions in the kernel
    last: int


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    name: str
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...] = field(default=())

    def main_loop(self) -> Loop | None:
        """The loop in which most of the work is: of tensor cores, else of global memory, else of all.

        What counts is a loop's own part, without loops inside it. One that loads from global memory comes
        before those that only store, which fill what is left out. Of loops that do equally much the shortest
        is taken: a causal mask makes another of the same loop that fewer steps run through.
        """
        best, best_score = None, (0, False, 0, 0)
        for loop in self.loops:
            own = [
                self.instructions[i] for i in range(loop.first, loop.last + 1) if not self._deeper(i, loop)
            ]
            tensor = sum(i.kind == "tensor" for i in own)
            moved = sum(i.width for i in own if i.is_global)
            loads = any(i.name in ("LDG", "LDGSTS") for i in own)
            score = (tensor, loads, moved, -len(own) if tensor or moved else len(own))
            if best is None or score > best_score:
                best, best_score = loop, score
        return best

    def _deeper(self, position: int, loop: Loop) -> bool:
        return any(
            inner.first <= position <= inner.last
            for inner in self.loops
            if inner != loop and loop.first <= inner.first and inner.last <= loop.last
        )

    def body(self) -> tuple[Instruction, ...]:
        """The main loop, or all of a kernel without loops, up to its last EXIT."""
        loop = self.main_loop()
        if loop is not None:
            return self.instructions[loop.first : loop.last + 1]
        ends = [i for i, instruction in enumerate(self.instructions) if instruction.name == "EXIT"]
        return self.instructions[: ends[-1] + 1] if ends else self.instructions

    def count(self, pattern: str) -> int:
        return sum(re.fullmatch(pattern, i.name) is not None for i in self.instructions)


def mix(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many instructions of each kind, in the order of PIPES and OTHERS."""
    counts = Counter(i.kind for i in instructions)
    return {kind: counts[kind] for kind in (*PIPES, *OTHERS) if counts[kind]}


def widths(instructions: Iterable[Instruction]) -> dict[str, dict[int, int]]:
    """Bytes of a thread's accesses, and how many there are: {"global load": {16: 4}, ...}."""
    names = {
        "LDG": "global load", "STG": "global store", "LDGSTS": "global to shared", "LDS": "shared load",
        "STS": "shared store", "LDSM": "shared load", "STSM": "shared store", "LDL": "local load",
        "STL": "local store",
    }  # fmt: skip
    found: dict[str, dict[int, int]] = {}
    for instruction in instructions:
        if name := names.get(instruction.name):
            counts = found.setdefault(name, {})
            counts[instruction.width] = counts.get(instruction.width, 0) + 1
    return {name: dict(sorted(counts.items(), reverse=True)) for name, counts in found.items()}


_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<predicate>@!?U?P[0-9T]+)\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;]*);\s*/\* (?P<low>0x[0-9a-f]{16}) \*/"
)
_HIGH = re.compile(r"^\s+/\* (0x[0-9a-f]{16}) \*/")
_SOURCE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')


def parse(text: str) -> dict[str, Code]:
    """The kernels in what `nvdisasm -c -hex -g` prints, by their (mangled) names."""
    found = {}
    for section in re.split(r"(?m)^//-+ \.text\.", text)[1:]:
        name = section.split(None, 1)[0]
        found[name] = _parse_section(name, section.splitlines())
    return found


def _parse_section(name: str, lines: Sequence[str]) -> Code:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}  # the position of the instruction that follows
    source, fresh = "", False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif at := _SOURCE.match(line):
            if not fresh:  # of lines inlined into each other the first is the innermost
                source, fresh = f"{at[1]}:{at[2]}", True
        elif match := _LINE.match(line):
            high = _HIGH.match(following)
            instructions.append(
                Instruction(
                    address=int(match["address"], 16),
                    opcode=match["opcode"],
                    operands=match["operands"].strip(),
                    predicate=match["predicate"] or "",
                    control=int(high[1], 16) >> 41 if high else 0,
                    source=source,
                )
            )
            fresh = False
    return Code(name, tuple(instructions), tuple(_loops(instructions, labels)))


def _loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Backward branches, one loop for each place that is branched to.

    Left out are the endless branch after a kernel's end and loops that only wait for a barrier in shared
    memory.
    """
    ends: dict[int, int] = {}
    for position, instruction in enumerate(instructions):
        target = re.search(r"`\((\.L_x_\d+)\)", instruction.operands)
        if (
            instruction.name in ("BRA", "CALL", "JMP")
            and target
            and labels.get(target[1], position) < position
        ):
            first = labels[target[1]]
            body = instructions[first : position + 1]
            waits = any(i.name == "SYNCS" for i in body) and {i.kind for i in body} <= {*OTHERS, "alu"}
            if not waits:
                ends[first] = max(ends.get(first, 0), position)
    found = [Loop(first, last) for first, last in sorted(ends.items())]
    return [loop for loop in found if not _shared_tail(loop, instructions)]


def _shared_tail(loop: Loop, instructions: Sequence[Instruction]) -> bool:
    """Whether the branch back only returns from code that was moved out of line, after the kernel's end."""
    return any(i.name == "EXIT" and not i.predicate for i in instructions[loop.first : loop.last])
