"""Which bytes the threads of a warp touch together: sectors of global memory, banks of shared memory.

The integer instructions of a kernel's PTX are followed for the 32 threads of one warp, once from top to
bottom, with made-up arguments: pointers far apart, sizes and strides that are the same as in the launch where
that is known and 4096 otherwise. An address that depends on something else (a loaded value, a float, a loop's
carried value) is unknown and left out. What is found is exact for those arguments; that they stand for all is
a HEURISTIC, and so is that threads of one warp stand for all.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

LANES = range(32)
SECTOR = 32  # bytes that L2 and DRAM move at least
BANKS = 32  # of 4 bytes
UNKNOWN_SIZE = 4096  # a multiple of every alignment that matters

Lanes = list[int]  # a value of each thread


@dataclass(frozen=True)
class Access:
    """One memory instruction of a warp. `cost` is against `ideal`: sectors, or passes over the banks."""

    operation: str  # ld.global, st.shared, ...
    bytes: int  # of each thread
    cost: int
    ideal: int
    stride: int | None  # bytes between neighbouring threads, where it is the same for most
    line: str  # of the source, empty where it is not known
    touched: frozenset[int]  # the bytes, as addresses of pieces of 4 or less

    @property
    def is_global(self) -> bool:
        return "global" in self.operation

    @property
    def wasteful(self) -> bool:
        """Twice what is needed, or more, and of global memory more than 32 neighbours of 4 bytes take."""
        return self.cost >= 2 * self.ideal and (self.cost > 4 or not self.is_global)

    def beside(self, other: Access) -> Access:
        """Both as one: a thread may read its neighbouring bytes in several instructions."""
        both = self.touched | other.touched
        useful = len(both) * min(self.bytes, 4)
        cost = len({address // SECTOR for address in both})
        return replace(self, cost=cost, ideal=-(-useful // SECTOR), touched=both)


def accesses(ptx: str, values: Sequence[Any] = (), *, warp: int = 0) -> list[Access]:
    """Those of a kernel whose addresses can be told; `values` are its scalar arguments where known.

    `values[i]` is the value of parameter i, None for a pointer or an unknown one.
    """
    machine = _Machine(values, warp)
    found: list[Access] = []
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]+)"', ptx, re.MULTILINE))
    line = ""
    for text in re.split(r"[;\n]", re.sub(r"//[^\n]*", "", ptx)):
        text = text.strip()
        if at := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            line = f"{files.get(at[1], at[1])}:{at[2]}"
            continue
        machine.run(text)
        found += machine.accesses(text, line)
    return found


_REGISTER = re.compile(r"%[a-z]+\d+")
_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
_WIDE = ("b64", "u64", "s64", "f64")
_SIGNED = ("shr", "mul", "mad", "cvt", "div", "rem")  # what differs between signed and unsigned numbers


class _Machine:
    """Registers of 32 threads, as far as they are known."""

    def __init__(self, values: Sequence[Any], warp: int) -> None:
        self.values = values
        zero = [0] * 32
        self.registers: dict[str, Lanes] = {
            "%tid.x": [32 * warp + lane for lane in LANES],
            "%laneid": list(LANES),
            "%ntid.x": [1024] * 32,
            "%nctaid.x": [1024] * 32,
            "%ctaid.x": zero,
            **{f"%{kind}.{axis}": zero for kind in ("tid", "ctaid") for axis in "yz"},
            **{f"%ntid.{axis}": [1] * 32 for axis in "yz"},
        }
        self.symbols: dict[str, int] = {}

    def value(self, operand: str) -> Lanes | None:
        operand = operand.strip()
        if operand in self.registers:
            return self.registers[operand]
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return [int(operand.rstrip("U"), 0)] * 32
        if re.fullmatch(r"[A-Za-z_$][\w$]*", operand):  # of shared memory: the base of an array
            return [self.symbols.setdefault(operand, len(self.symbols) << 20)] * 32
        return None

    def run(self, text: str) -> None:
        match = re.match(r"(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(%[a-z]+\d+(?:\|%p\d+)?)\s*,\s*(.*)$", text)
        if match is None:
            return
        opcode, target, rest = match.groups()
        operands = re.split(r",\s*(?![^{\[]*[}\]])", rest)
        self.registers.pop(target, None)
        result = self._compute(opcode, operands)
        if result is not None:
            bits = 64 if target.startswith("%rd") else 16 if target.startswith("%rs") else 32
            self.registers[target] = [_signed(v, bits) for v in result]

    def _compute(self, opcode: str, operands: Sequence[str]) -> Lanes | None:
        name, *modifiers = opcode.split(".")
        if name == "ld" and "param" in modifiers:
            return self._parameter(operands[0], modifiers)
        if name in ("ld", "shfl", "atom", "redux"):
            return [0] * 32 if name == "shfl" and self.value(operands[0]) == [0] * 32 else None
        if any(m in ("f32", "f16", "f64", "bf16", "f16x2", "bf16x2", "pred") for m in modifiers):
            return None
        read = [self.value(operand) for operand in operands]
        known = [r for r in read if r is not None]
        if len(known) != len(read):
            return None
        function = _FUNCTIONS.get(name)
        if function is None:
            return None
        if name in _SIGNED and any(m.startswith(("u", "b")) for m in modifiers):
            bits = 64 if any(m in _WIDE for m in modifiers[-1:]) else 32
            known = [[v & ((1 << bits) - 1) for v in r] for r in known]
        if name in ("mul", "mad") and "hi" in modifiers:
            return None
        try:
            return [function(*(r[lane] for r in known)) for lane in LANES]
        except (ValueError, ZeroDivisionError, TypeError):
            return None

    def _parameter(self, operand: str, modifiers: Sequence[str]) -> Lanes | None:
        at = re.search(r"_param_(\d+)", operand)
        if at is None or any(m in ("f32", "f64") for m in modifiers):
            return None
        number = int(at[1])
        known = self.values[number] if number < len(self.values) else None
        if isinstance(known, int):
            return [known] * 32
        is_pointer = any(m in _WIDE for m in modifiers)
        return [(number + 1) << 40 if is_pointer else UNKNOWN_SIZE] * 32

    def accesses(self, text: str, line: str) -> list[Access]:
        """What a memory instruction touches; none for any other, or where the address is unknown."""
        text = re.sub(r"^@!?%p\d+\s+", "", text)
        opcode = text.split(None, 1)[0] if text else ""
        places = re.findall(r"\[\s*([^\]]+?)\s*\]", text)
        if opcode.startswith("cp.async.c") and "shared" in opcode and len(places) == 2:
            size = int((re.search(r"\]\s*,\s*(0x[0-9a-f]+|\d+)", text) or ["", "16"])[1], 0)
            kinds = [("st.shared", size, places[0]), ("ld.global", size, places[1])]
        elif re.match(r"(ld|st)\.(?:\w+\.)*?(global|shared)", opcode) and places:
            space = "global" if "global" in opcode else "shared"
            kinds = [(f"{opcode[:2]}.{space}", _bytes(opcode), places[0])]
        else:
            return []
        found = []
        for operation, size, place in kinds:
            if (addresses := self._address(place)) is not None:
                found.append(_access(operation, size, addresses, line))
        return found

    def _address(self, place: str) -> Lanes | None:
        base, _, offset = place.partition("+")
        start, added = self.value(base), self.value(offset or "0")
        if start is None or added is None:
            return None
        return [a + b for a, b in zip(start, added, strict=True)]


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _bfe(value: int, start: int, length: int) -> int:
    return value >> start & ((1 << length) - 1)


def _divide(a: int, b: int) -> int:
    """Towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_FUNCTIONS: dict[str, Any] = {
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "cvt": lambda a: a,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": lambda a, b, c: a * b + c,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "neg": operator.neg,
    "min": min,
    "max": max,
    "bfe": _bfe,
    "div": _divide,
    "rem": lambda a, b: a - b * _divide(a, b),
}


def _bytes(opcode: str) -> int:
    parts = opcode.split(".")
    each = next((_SIZES.get(p, 8) for p in reversed(parts) if p in _SIZES or p in _WIDE), 4)
    count = next((int(p[1]) for p in parts if p in ("v2", "v4", "v8")), 1)
    return each * count


def _access(operation: str, size: int, addresses: Lanes, line: str) -> Access:
    steps = [b - a for a, b in itertools.pairwise(addresses)]
    common = max(set(steps), key=steps.count)
    stride = common if steps.count(common) > len(steps) // 2 else None
    touched = {a + offset for a in addresses for offset in range(0, size, min(size, 4))}
    if "global" in operation:
        sectors = {a // SECTOR for a in touched}
        useful = len(touched) * min(size, 4)
        return Access(operation, size, len(sectors), -(-useful // SECTOR), stride, line, frozenset(touched))
    # A pass serves 128 bytes: all threads if they access 4 bytes each, eight threads of 16.
    together = max(128 // max(size, 4), 1)
    passes = 0
    for first in range(0, 32, together):
        words = {(a + o) // 4 for a in addresses[first : first + together] for o in range(0, size, 4)}
        passes += max(sum(word % BANKS == bank for word in words) for bank in range(BANKS))
    return Access(operation, size, passes, -(-32 // together), stride, line, frozenset(touched))
