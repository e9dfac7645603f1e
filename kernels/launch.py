"""What every launcher needs: the chip it runs on, tile sizes, and the launch itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton

FAMILIES = (80, 90, 100, 120)


class Chip(NamedTuple):
    """What launch choices depend on."""

    family: int  # the greatest of FAMILIES that is not above its compute capability
    sms: int


class Tile(NamedTuple):
    """A block of rows x columns that one program works on, and with how many warps."""

    rows: int
    columns: int
    warps: int


Capture = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_capture: tuple[Chip, Capture] | None = None


def chip(device: torch.device) -> Chip:
    """The chip that launches on `device` are for."""
    return _capture[0] if _capture is not None else _chip(device)


@functools.cache
def _chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(80, 2)  # the interpreter: two programs at least, so that partial sums are real ones
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    family = max((family for family in FAMILIES if family <= capability), default=FAMILIES[0])
    return Chip(family, properties.multi_processor_count)


@contextmanager
def capture(target: Chip, function: Capture) -> Iterator[None]:
    """Hand launches, as chosen for `target`, to `function(kernel, grid, args, options)`, not to a device."""
    global _capture
    before, _capture = _capture, (target, function)
    try:
        yield
    finally:
        _capture = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)` on the device of the first argument; nothing for an empty grid.

    Products and sums are not contracted into fused multiply-adds unless a kernel says `tl.fma`. In
    tl.sum(a * b) the compiler would contract a product into the first addition between lanes, in each lane
    its own: the lanes then disagree in the last bit, and the result depends on which of them writes last.
    """
    if 0 in grid:
        return
    options.setdefault("enable_fp_fusion", False)
    if _capture is not None:
        _capture[1](kernel, grid, args, options)
        return
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def tile(width: int, *, elements: int, per_thread: int, widest: int) -> Tile:
    """A tile of about `elements`, at most `widest` columns, for rows of `width`.

    `per_thread` elements fall to a thread where 4 to 16 warps allow it.
    """
    columns = min(triton.next_power_of_2(max(width, 1)), widest)
    rows = max(1, elements // columns)
    warps = rows * columns // (32 * per_thread)
    return Tile(rows, columns, min(max(warps, 4), 16))
