"""What a chip can do at most, from chips.yaml: the denominators of utilisation figures, and every limit."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.errors import InputError

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
# The chip that stands for a capability where only `sm_90` is said: what launches are chosen for.
TYPICAL = {80: "a100", 86: "rtx3090", 89: "rtx4090", 90: "h100", 100: "b200", 120: "rtx5090"}


@dataclass(frozen=True)
class Limits:
    """What an SM of a compute capability has: chips.yaml says what each is, and where it is from."""

    warps: int
    blocks: int
    registers: int
    register_unit: int
    shared: int
    shared_block: int
    shared_unit: int
    reserved: int
    issue: int
    latency: dict[str, int]
    lanes: dict[str, int]
    latency_of: str = ""


@dataclass(frozen=True)
class Chip:
    """One product. `peaks` are FLOP/s of dense matrix products by precision, None where it has none."""

    name: str
    pattern: str
    capability: tuple[int, int]
    sms: int
    clock_hz: float
    bandwidth: float  # bytes/s of its memory
    l2: int  # bytes
    memory: int  # bytes
    link: float  # bytes/s in each direction to GPUs of the same machine
    network: float | None  # bytes/s in each direction to other machines, where NVIDIA sells one with the chip
    peaks: dict[str, float | None]
    source: str
    limits: Limits

    @property
    def sm(self) -> int:
        """90 for compute capability 9.0."""
        return 10 * self.capability[0] + self.capability[1]

    def peak(self, precision: str) -> float | None:
        """FLOP/s of dense matmuls in `fp32 | tf32 | bf16 | fp16`; None where the chip cannot."""
        return self.peaks[precision]


@functools.cache
def chips() -> dict[str, Chip]:
    """All chips by their short name, such as h100."""
    import yaml

    data = yaml.safe_load((Path(__file__).parent / "chips.yaml").read_text(encoding="utf-8"))
    limits = {name: Limits(**values) for name, values in data["capabilities"].items()}
    return {name: _chip(name, limits[values["capability"]], values) for name, values in data["chips"].items()}


def _chip(name: str, limits: Limits, values: dict[str, Any]) -> Chip:
    major, minor = map(int, values["capability"].split("."))
    return Chip(
        name=name,
        pattern=values["pattern"],
        capability=(major, minor),
        sms=values["sms"],
        clock_hz=values["clock"] * 1e6,
        bandwidth=values["bandwidth"] * 1e9,
        l2=values["l2"] << 20,
        memory=values["memory"] << 30,
        link=values["link"] * 1e9,
        network=None if values["network"] is None else values["network"] * 1e9,
        peaks={p: None if values["peak"][p] is None else values["peak"][p] * 1e12 for p in PRECISIONS},
        source=values["source"],
        limits=limits,
    )


def chip_named(device_name: str) -> Chip | None:
    """The chip that the driver calls so, such as `NVIDIA H100 80GB HBM3`; None if it is not in chips.yaml."""
    return next((chip for chip in chips().values() if re.fullmatch(chip.pattern, device_name)), None)


def chip(name: str) -> Chip:
    """The chip of a short name (h100), of an architecture (sm_90) or of the driver's name.

    Raises:
        InputError: there is none.
    """
    short = name.lower().removeprefix("sm_").rstrip("a")
    if short.isdigit() and int(short) in TYPICAL:
        return chips()[TYPICAL[int(short)]]
    if found := chips().get(name.lower()) or chip_named(name):
        return found
    known = ", ".join([*chips(), *(f"sm_{sm}" for sm in TYPICAL)])
    raise InputError(f"no chip {name!r}: choose one of {known}")


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of dense matmuls on the chip of that name in `fp32 | tf32 | bf16 | fp16`; None if unknown."""
    found = chip_named(device_name)
    return None if found is None else found.peak(precision)
