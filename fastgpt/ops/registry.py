"""Which implementation of an operation runs: one table, and one choice from it.

Every row of the table is one implementation of one operation: `eager` (plain PyTorch, runs everywhere),
`triton` (kernels/) or `native` (csrc/). Tests, benchmarks and the microscope iterate over the same table,
so that adding a row is all it takes for a new kernel to be tested and measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.errors import InputError

Function = Callable[..., Any]
AUTO = "auto"
ENVIRONMENT = "FASTGPT_OPS"


@dataclass(frozen=True)
class Implementation:
    """One row of the table. `missing(device)` says why it cannot run there, or None when it can."""

    operation: str
    name: str
    function: Function
    missing: Callable[[torch.device], str | None]


@dataclass(frozen=True)
class Cost:
    """The least work an operation can do: floating point operations, and bytes read plus written."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


_table: dict[str, dict[str, Implementation]] = {}
_choice: dict[str, str] = {}


def runs_everywhere(device: torch.device) -> None:
    """The `missing` of implementations that need nothing but PyTorch."""


def register(
    operation: str,
    name: str,
    function: Function,
    missing: Callable[[torch.device], str | None] = runs_everywhere,
) -> None:
    """Add a row to the table; `function` has the signature of the public function less `backend`."""
    _table.setdefault(operation, {})[name] = Implementation(operation, name, function, missing)


def table() -> list[Implementation]:
    """All rows, in the order of registration."""
    return [row for rows in _table.values() for row in rows.values()]


def select(operation: str, backend: str | None, device: torch.device) -> Function:
    """The function that runs `operation` on `device`: `backend` if given, else the current choice.

    Raises:
        InputError: the implementation asked for does not exist or cannot run here.
    """
    rows = _table[operation]
    name = _choice.get(operation, AUTO) if backend is None else backend
    if name == AUTO:
        return rows["eager"].function
    if name not in rows:
        raise InputError(
            f"{operation} has no implementation {name!r}: choose one of {', '.join([AUTO, *rows])}"
        )
    if reason := rows[name].missing(device):
        raise InputError(f"{operation} cannot run as {name!r} on {device.type}: {reason}")
    return rows[name].function


class use:
    """Choose implementations, globally or for a `with` block.

    >>> fastgpt.ops.use("eager")                                # every operation, from here on
    >>> with fastgpt.ops.use(attention="triton", gelu="eager"): # these two, inside the block
    ...     model(idx)

    An operation that has no such implementation keeps its choice when `use("triton")` names them all, and is
    an error when it is named itself. The environment variable FASTGPT_OPS takes the same choices:
    `FASTGPT_OPS=triton` or `FASTGPT_OPS=attention=triton,gelu=eager`.

    Raises:
        InputError: an operation or implementation that does not exist.
    """

    def __init__(self, implementation: str | None = None, /, **operations: str) -> None:
        self._before = dict(_choice)
        chosen = {}
        if implementation is not None:
            known = {AUTO} | {row.name for row in table()}
            if implementation not in known:
                raise InputError(
                    f"no implementation {implementation!r}: choose one of {', '.join(sorted(known))}"
                )
            chosen = {op: implementation for op, rows in _table.items() if implementation in {AUTO, *rows}}
        for operation, name in operations.items():
            if operation not in _table:
                raise InputError(f"no operation {operation!r}: choose from {', '.join(sorted(_table))}")
            if name not in {AUTO, *_table[operation]}:
                allowed = ", ".join([AUTO, *_table[operation]])
                raise InputError(f"{operation} has no implementation {name!r}: choose one of {allowed}")
            chosen[operation] = name
        _choice.update(chosen)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        _choice.clear()
        _choice.update(self._before)


def use_environment() -> None:
    """Apply FASTGPT_OPS, if it is set."""
    value = os.environ.get(ENVIRONMENT, "").strip()
    if not value:
        return
    pairs = [item.split("=", 1) for item in value.split(",")]
    everything = [pair[0].strip() for pair in pairs if len(pair) == 1]
    if len(everything) > 1:
        raise InputError(f"{ENVIRONMENT}={value!r} names several implementations for every operation")
    use(*everything, **{pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2})
