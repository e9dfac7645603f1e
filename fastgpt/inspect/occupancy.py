"""How many blocks an SM holds at a time, by NVIDIA's rules, and what keeps it from holding more."""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt.chips import Limits

PARTITIONS = 4  # of an SM: each has a quarter of the registers and runs every fourth warp


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that are resident on an SM at a time; `limit` names what allows no more blocks."""

    blocks: int
    warps: int
    share: float  # of the warps that an SM can hold
    limit: str


def occupancy(limits: Limits, threads: int, registers: int, shared: int) -> Occupancy:
    """Of blocks of `threads` threads with `registers` each and `shared` bytes; 0 blocks if none fits.

    Registers are given to a warp in units, and each quarter of an SM gives from its own; a block's shared
    memory is rounded up with what every block takes in addition.
    """
    warps = -(-threads // 32)
    by = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": _by_registers(limits, warps, registers),
        "shared memory": _by_shared(limits, shared),
    }
    blocks = min(by.values())
    limit = next(name for name, allowed in by.items() if allowed == blocks)
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, limit)


def _by_registers(limits: Limits, warps: int, registers: int) -> int:
    unit = limits.register_unit
    of_warp = max(-(-registers * 32 // unit) * unit, unit)
    if of_warp * -(-warps // PARTITIONS) * PARTITIONS > limits.registers:
        return 0  # the block alone is too large: it is checked as if all quarters had equally many warps
    return limits.registers // PARTITIONS // of_warp * PARTITIONS // warps


def _by_shared(limits: Limits, shared: int) -> int:
    if shared > limits.shared_block:
        return 0
    unit = limits.shared_unit
    taken = -(-(shared + limits.reserved) // unit) * unit
    return limits.shared // taken if taken else limits.blocks


def waves(programs: int, sms: int, blocks: int) -> float:
    """How often all SMs are filled; 0.5 leaves half of the places empty, 2.1 most of a third wave."""
    return programs / (sms * blocks) if blocks else float("inf")
