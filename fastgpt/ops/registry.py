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
    """Add a row to the table; `function` has the signature of the public function less `backend`.

    It may trust its arguments, which the public function has checked, but for the values of indices: on a CPU
    it raises IndexError for one out of range, which the public function turns into an InputError.
    """
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

    Leaving the block restores the choice of every operation as it was before `use(...)` was called, whatever
    was chosen inside and however the block is left.

    An operation that has no such implementation keeps its choice when `use("triton")` names them all, and is
    an error when it is named itself. The environment variable FASTGPT_OPS takes the same choices:
    `FASTGPT_OPS=triton` or `FASTGPT_OPS=attention=triton,gelu=eager`.

    Raises:
        InputError: an operation or implementation that does not exist.
    """

    def __init__(self, implementation: str | None = None, /, **operations: str) -> None:
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
        self._chosen = chosen
        self._outer: list[dict[str, str]] = []  # what each open block restores
        self._first: dict[str, str] | None = dict(_choice)  # what the first block restores
        _choice.update(chosen)

    def __enter__(self) -> use:
        self._outer.append(dict(_choice) if self._first is None else self._first)
        self._first = None
        _choice.update(self._chosen)  # the same object may be entered again
        return self

    def __exit__(self, *_: object) -> None:
        _choice.clear()
        _choice.update(self._outer.pop())


def use_environment() -> None:
    """Apply FASTGPT_OPS, if it is set.

    Raises:
        InputError: it names an operation or implementation that does not exist.
    """
    value = os.environ.get(ENVIRONMENT, "")
    items = [item.strip() for item in value.split(",") if item.strip()]
    everything = [item for item in items if "=" not in item]
    named = [item.split("=", 1) for item in items if "=" in item]
    if len(everything) > 1:
        raise InputError(f"{ENVIRONMENT}={value!r} names several implementations for every operation")
    try:
        use(*everything, **{operation.strip(): name.strip() for operation, name in named})
    except InputError as error:
        raise InputError(f"{ENVIRONMENT}={value!r}: {error}") from None
