"""How many clocks one warp takes through machine code when nothing else runs: what occupancy has to hide.

Since Volta the compiler writes the schedule into each instruction: how many clocks to wait before the next
one (for results whose latency is fixed), which of six barriers it signals when its result is there or its
operands are read (for those whose latency is not), and which barriers it waits for. The layout of these bits
is not documented by NVIDIA; it was found by Jia et al., Dissecting the NVIDIA Volta GPU Architecture via
Microbenchmarking, arXiv:1804.06826, section 2.1, and is the same from sm_70 to sm_120.

Followed here in order, with the latencies of chips.yaml for the barriers, and no pipe taking a warp's
instructions faster than a quarter of the SM can: that much is the compiler's own knowledge. Not followed are
waits for other warps (BAR) and for mbarriers in shared memory (TMA and tcgen05): they count as nothing, so
the result is a lower bound.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastgpt.chips import Chip, Limits
from fastgpt.inspect.occupancy import PARTITIONS
from fastgpt.inspect.sass import Instruction

WARM, ROUNDS = 6, 12  # of a loop: it settles, and is timed over rounds that 2, 3 and 4 stages divide


def clocks(instruction: Instruction, chip: Chip) -> float:
    """What an instruction of one warp takes of its pipe on an SM, in clocks; 0 for what has no own pipe."""
    lanes, kind = chip.limits.lanes, instruction.kind
    if kind == "tensor":
        peak = chip.peaks[instruction.precision]
        return instruction.flops * chip.sms * chip.clock_hz / peak if peak else 0.0
    if kind == "memory":  # 128 bytes a clock; at least one clock for any
        return max(32 * instruction.width / (4 * lanes["memory"]), 1.0)
    if kind not in lanes:
        return 0.0
    packed = 2 if instruction.name in ("FFMA2", "FMUL2", "FADD2") else 1
    return packed * 32 / lanes[kind]


@dataclass
class _Warp:
    """One warp on its way: when its next instruction can start, and what it has under way."""

    chip: Chip
    memory: int  # clocks until global memory answers
    now: float = 0.0
    barriers: list[float] = field(default_factory=lambda: [0.0] * 6)
    pipes: dict[str, float] = field(default_factory=dict)  # when each takes the next instruction
    copies: float = 0.0  # when the last asynchronous copy arrives
    groups: deque[float] = field(default_factory=lambda: deque(maxlen=64))  # of asynchronous copies
    products: float = 0.0  # when the last wgmma is done
    product_groups: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def run(self, i: Instruction) -> None:
        stall, writes, reads, waits = (
            i.control & 15,
            i.control >> 5 & 7,
            i.control >> 8 & 7,
            i.control >> 11,
        )
        ready = [self.barriers[b] for b in range(6) if waits >> b & 1]
        start = max([self.now, self.pipes.get(i.kind, 0.0), *ready])
        if i.name in ("DEPBAR", "WARPGROUP"):
            start = max(start, self._older(i))
        busy = (
            clocks(i, self.chip) * PARTITIONS
        )  # a warp has one quarter; a wgmma is counted for each of four
        self.pipes[i.kind] = start + busy
        done = start + self._latency(i, busy)
        if writes < 6:
            self.barriers[writes] = done
        if reads < 6:
            self.barriers[reads] = start + min(self.chip.limits.latency["other"], done - start)
        self._note(i, done)
        self.now = start + max(stall, 1)

    def _latency(self, i: Instruction, busy: float) -> float:
        latency = self.chip.limits.latency
        if i.name in ("LDG", "LDGSTS", "LD", "ATOMG", "LDL"):
            return self.memory
        if i.name in ("LDS", "LDSM", "ATOMS"):
            return latency["shared"]
        if i.kind == "tensor":
            return busy + latency["other"]
        return max(busy, latency["other"])

    def _note(self, i: Instruction, done: float) -> None:
        if i.name == "LDGSTS":
            self.copies = max(self.copies, done)
        elif i.name == "LDGDEPBAR":
            self.groups.append(self.copies)
        elif ".64x" in i.opcode and i.kind == "tensor":
            self.products = max(self.products, done)
            if "gsb0" in i.operands:
                self.product_groups.append(self.products)

    def _older(self, i: Instruction) -> float:
        """When all groups but the newest N are done, for a wait that allows N to be under way."""
        allowed = re.search(r"(?:SB0|gsb0), (0x[0-9a-f]+)", i.operands)
        groups = list(self.product_groups if i.name == "WARPGROUP" else self.groups)
        if allowed is None:
            return 0.0
        count = int(allowed[1], 16)
        return max(groups[: len(groups) - count], default=0.0) if count else max(groups, default=0.0)


def alone(body: Sequence[Instruction], chip: Chip, *, loop: bool, cached: bool) -> float:
    """Clocks of one warp through `body` alone: of a round once it is going for a loop, else of the one pass.

    `cached` says that what is loaded from global memory has been loaded before, and comes from L2.
    """
    limits: Limits = chip.limits
    warp = _Warp(chip, limits.latency["l2" if cached else "dram"])
    if not loop:
        for instruction in body:
            warp.run(instruction)
        return max([warp.now, *warp.barriers])
    settled = 0.0
    for count in range(WARM + ROUNDS):
        if count == WARM:
            settled = warp.now
        for instruction in body:
            warp.run(instruction)
    return (warp.now - settled) / ROUNDS
