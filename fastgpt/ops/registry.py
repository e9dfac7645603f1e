"""Which implementation of an operation runs: one table, and one choice from it.

Every row of the table is one implementation of one operation: `eager` (plain PyTorch, runs everywhere),
`triton` (kernels/) or `native` (csrc/). Tests, benchmarks and the microscope iterate over the same table,
so that adding a row is all it takes for a new kernel to be tested and measured.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.ops import choices

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


def select(
    operation: str, backend: str | None, x: Tensor, *, elements: int | None = None, fits: bool = True
) -> Function:
    """The function that runs `operation`: `backend` if given, else the current choice.

    `auto` is what was measured to be fastest for x's device and class of shapes (see `fastgpt.ops.choices`).

    Args:
        x: the tensor that decides: its device and dtype.
        elements: what the class of shapes goes by; by default those of x.
        fits: whether kernels take these arguments: where they do not, or x is float64, `auto` is eager.

    Raises:
        InputError: the implementation asked for does not exist or cannot run here.
    """
    rows = _table[operation]
    name = _choice.get(operation, AUTO) if backend is None else backend
    if name == AUTO:
        if not fits or x.dtype == torch.float64:
            name = choices.EAGER
        elif torch.compiler.is_compiling():
            # One traced graph serves shapes of several classes. Looking at the sizes would guard on them, and
            # so trace again, or fail where the user has declared them dynamic.
            name = automatic_compiled(operation, x.device)
        else:
            cls = choices.shape_class(x.numel() if elements is None else elements)
            name = automatic(operation, x.device, cls)
        return rows[name].function
    if name not in rows:
        raise InputError(
            f"{operation} has no implementation {name!r}: choose one of {', '.join([AUTO, *rows])}"
        )
    if reason := rows[name].missing(x.device):
        raise InputError(f"{operation} cannot run as {name!r} on {x.device.type}: {reason}")
    return rows[name].function


@functools.cache
def automatic(operation: str, device: torch.device, cls: str | None) -> str:
    """The implementation that `auto` is: the recorded one, or eager where none is recorded or it cannot run.

    `cls` is the class of shapes; None is for inside `torch.compile`.
    """
    found = choices.find(operation, device, cls)
    if found is None:
        return choices.EAGER
    name = found.choice.implementation if cls else found.choice.compiled
    row = _table[operation].get(name)
    reason = "there is no such implementation" if row is None else row.missing(device)
    if reason is None:
        return name
    choices.say_once(
        f"auto: {name} was measured fastest on this {device.type} ({found.path}) but cannot run, so eager "
        f"runs instead: {reason}"
    )
    return choices.EAGER


def automatic_compiled(operation: str, device: torch.device) -> str:
    """`automatic` for `torch.compile`, which calls this when it traces instead of tracing it."""
    return automatic(operation, device, None)


# What torch.compiler.assume_constant_result does, without importing the whole compiler, which takes seconds.
automatic_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
