"""The least time that a kernel can take on a chip, and what takes it.

Each bound leaves out everything but one thing, so that none can be beaten: what a pipe needs for the
instructions of the main loop (or of the whole kernel, where there is none), what memory needs for the bytes
that have to move, and what waiting needs when each warp runs alone and an SM holds as many blocks as fit.
The largest bound is the kernel's ceiling on that chip; what is counted and what is not: docs/inspect.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt.chips import Chip
from fastgpt.inspect.occupancy import Occupancy
from fastgpt.inspect.sass import OTHERS, PIPES, Instruction
from fastgpt.inspect.schedule import alone, clocks


@dataclass(frozen=True)
class Work:
    """What a launch has to do: floating point operations, and bytes of memory read plus written.

    `tensor_flops` are those of `flops` that matrix products are; None where nothing is known.
    """

    flops: float | None = None
    bytes: float | None = None
    tensor_flops: float | None = None
    precision: str = "bf16"  # of the matrix products


@dataclass(frozen=True)
class Launch:
    """How a kernel is started: programs (blocks), warps of each, and rounds of the main loop in each."""

    programs: int
    warps: int
    trips: float | None = None  # None: as many as the work takes


@dataclass(frozen=True)
class Bounds:
    """Seconds by what they are for, the largest first."""

    seconds: dict[str, float]
    trips: float
    work: Work

    @property
    def binding(self) -> str:
        return next(iter(self.seconds))

    @property
    def ceiling(self) -> float:
        """Seconds."""
        return self.seconds[self.binding]

    @property
    def tflops(self) -> float | None:
        return self.work.flops / self.ceiling / 1e12 if self.work.flops else None

    @property
    def gbytes(self) -> float | None:
        return self.work.bytes / self.ceiling / 1e9 if self.work.bytes else None


def bounds(
    body: Sequence[Instruction],
    chip: Chip,
    fits: Occupancy,
    launch: Launch,
    work: Work,
    *,
    loop: bool,
    flops_of_round: float = 0.0,
) -> Bounds | None:
    """All bounds; None where no block fits an SM, or nothing is known of the work and the rounds.

    `flops_of_round` are the products of a round of a program's loop where machine code does not show them.
    """
    if not fits.blocks:
        return None
    trips = launch.trips or (trips_of(body, launch, work, flops_of_round) if loop else 1.0)
    seconds = _pipes(body, chip, launch, trips)
    if work.bytes:
        seconds["bandwidth"] = work.bytes / chip.bandwidth
    peak = chip.peaks[work.precision]
    if work.tensor_flops and peak:
        seconds["tensor"] = max(seconds.get("tensor", 0.0), work.tensor_flops / peak)
    rounds = trips * alone(body, chip, loop=loop, cached=_cached(body, launch, work, trips))
    seconds["latency"] = max(launch.programs / (chip.sms * fits.blocks), 1.0) * rounds / chip.clock_hz
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return Bounds({name: value for name, value in ordered if value}, trips, work)


def trips_of(body: Sequence[Instruction], launch: Launch, work: Work, flops_of_round: float = 0.0) -> float:
    """Rounds of the loop of a program, if all of the work is done in it; 1 where nothing says how much."""
    flops = max(sum(i.flops for i in body) * launch.warps, flops_of_round)
    if flops and work.tensor_flops:
        return work.tensor_flops / (flops * launch.programs)
    moved = _moved(body) * launch.warps
    if moved and work.bytes:
        return work.bytes / (moved * launch.programs)
    return 1.0


def _moved(body: Sequence[Instruction]) -> int:
    """Bytes of global memory that a warp loads and stores."""
    return 32 * sum(i.width for i in body if i.is_global)


def _cached(body: Sequence[Instruction], launch: Launch, work: Work, trips: float) -> bool:
    """Whether a kernel loads most things more than once, of which L2 can answer the later times."""
    asked = _moved(body) * launch.warps * launch.programs * trips
    return bool(work.bytes) and asked > 2 * (work.bytes or 0)


def _pipes(body: Sequence[Instruction], chip: Chip, launch: Launch, trips: float) -> dict[str, float]:
    """Seconds that each pipe is busy, with the work shared out evenly."""
    spent = dict.fromkeys(PIPES, 0.0)
    for instruction in body:
        if instruction.kind not in OTHERS:
            spent[instruction.kind] += clocks(instruction, chip)
    spent["issue"] = len(body) / chip.limits.issue
    warps = launch.programs * launch.warps
    per_clock = min(chip.sms, launch.programs) * chip.clock_hz
    return {kind: value * warps * trips / per_clock for kind, value in spent.items()}
