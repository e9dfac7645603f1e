"""What is wrong with a kernel, by name: each finding says what was seen, and where in the source."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from fastgpt.inspect import sass
from fastgpt.inspect.addresses import Access
from fastgpt.inspect.bounds import Bounds, Launch
from fastgpt.inspect.build import Built
from fastgpt.inspect.occupancy import PARTITIONS, Occupancy, waves

PRODUCTS = r"tt\.dot\b|warp_group_dot\b|tc_gen5_mma\b"
# A loop that multiplies matrices by hand: so many multiply-adds, of them so large a part.
FMAS, FMA_SHARE = 8, 0.25


def findings(
    built: Built,
    fits: Occupancy,
    launch: Launch | None,
    limits: Bounds | None,
    touched: Sequence[Access],
    sms: int,
) -> list[str]:
    """All that apply, the gravest first."""
    return [
        *_does_not_fit(built, fits),
        *_spills(built),
        *_no_tensor_cores(built),
        *_uncoalesced(touched),
        *_bank_conflicts(touched),
        *_narrow(built, touched),
        *_few_warps(fits, limits),
        *_tail(fits, launch, sms),
    ]


def _does_not_fit(built: Built, fits: Occupancy) -> list[str]:
    if fits.blocks:
        return []
    return [
        f"does not fit: a block of {built.threads} threads asks for more than an SM has ({fits.limit}): "
        f"{built.registers} registers a thread, {built.shared_bytes} bytes of shared memory"
    ]


def _spills(built: Built) -> list[str]:
    loads, stores = built.code.count("LDL"), built.code.count("STL")
    if not built.local_bytes and not loads + stores:
        return []
    inside = sum(re.fullmatch(sass.LOCAL, i.name) is not None for i in built.code.body())
    where = f", {inside} in the main loop" if built.code.main_loop() else ""
    moves = f"{loads} loads and {stores} stores{where}"
    return [f"spills: {built.local_bytes} bytes a thread of local memory, {moves}"]


def _no_tensor_cores(built: Built) -> list[str]:
    if built.code.count(sass.TENSOR):
        return []
    if re.search(PRODUCTS, built.stages.get("ttgir", "")):
        return [
            "no tensor cores: a matrix product is compiled to multiply-adds (fp32 operands with "
            'input_precision="ieee", or a tile that is too small)'
        ]
    loop = built.code.main_loop()
    if loop is None:
        return []
    for one in built.code.loops:
        body = built.code.instructions[one.first : one.last + 1]
        fmas = sum(i.name in ("FFMA", "FFMA2") for i in body)
        functions = sum(i.kind == "sfu" for i in body)  # polynomials of elementwise functions are no products
        loads = sum(i.name in ("LDG", "LDS") for i in body)
        if fmas >= FMAS and fmas >= FMA_SHARE * len(body) and loads >= fmas / 16 and not functions:
            share = f"{fmas} of the {len(body)} instructions of a loop are fp32 multiply-adds"
            return [f"no tensor cores: {share} {_at(body[0].source)}".strip()]
    return []


def _uncoalesced(touched: Sequence[Access]) -> list[str]:
    """Accesses of one kind and place count together where they are of the same bytes' neighbours."""
    groups: dict[tuple[Any, ...], list[Access]] = {}
    for access in touched:
        if access.is_global:
            groups.setdefault((access.operation, access.bytes, access.stride, access.line), []).append(access)
    found = []
    for group in groups.values():
        together = functools.reduce(Access.beside, group)
        found += [access for access in group if access.wasteful and 2 * together.ideal <= together.cost]
    return _wasteful("uncoalesced", "sectors", found)


def _bank_conflicts(touched: Sequence[Access]) -> list[str]:
    return _wasteful("bank conflicts", "passes", [a for a in touched if not a.is_global])


def _wasteful(name: str, unit: str, touched: Sequence[Access]) -> list[str]:
    """One line for each kind of access and place in the source."""
    found: dict[str, int] = {}
    for access in touched:
        if access.wasteful:
            apart = "" if access.stride is None else f", {access.stride} bytes apart"
            kind = "loads" if access.operation.startswith("ld") else "stores"
            text = (
                f"{kind} of {access.bytes} bytes{apart}: {access.cost} {unit} where {access.ideal} would do"
            )
            text = f"{name}: {text} {_at(access.line)}".strip()
            found[text] = found.get(text, 0) + 1
    return [text if count == 1 else f"{text}, {count} times" for text, count in found.items()]


def _narrow(built: Built, touched: Sequence[Access]) -> list[str]:
    """Neighbouring threads read neighbouring bytes, but few at a time, in most of the main loop's traffic."""
    moved = [i for i in built.code.body() if i.is_global and i.width]
    narrow = sum(i.width for i in moved if i.width <= 4)
    total = sum(i.width for i in moved)
    if len(moved) < 2 or 2 * narrow <= total:
        return []
    if not any(a.is_global and a.stride == a.bytes and a.bytes <= 4 for a in touched):
        return []
    return [
        f"narrow accesses: {narrow} of the {total} bytes that a thread moves in a round go in pieces of 4 or "
        "less, where 16 would need a quarter of the instructions"
    ]


def _few_warps(fits: Occupancy, limits: Bounds | None) -> list[str]:
    if limits is None or limits.binding != "latency" or fits.warps > 4 * PARTITIONS:
        return []
    return [f"few warps: {fits.warps} on an SM ({fits.limit}) do not hide the latency, which is the ceiling"]


def _tail(fits: Occupancy, launch: Launch | None, sms: int) -> list[str]:
    """A last wave that is mostly empty costs as much as a full one."""
    if launch is None or not fits.blocks:
        return []
    count = waves(launch.programs, sms, fits.blocks)
    part = count % 1
    if count < 1 or count > 4 or part == 0 or part > 0.5:
        return []
    places = sms * fits.blocks
    rest = launch.programs % places
    return [f"tail: {launch.programs} blocks on {places} places: the last {rest} run almost alone"]


def _at(source: str) -> str:
    """(file:line) with the file's name alone."""
    return f"({source.rsplit('/', 1)[-1]})" if source else ""
