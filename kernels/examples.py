"""What a kernel file's `examples()` is made of: see `fastgpt.inspect.shipped`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One launcher call on `meta` tensors. `requires` names, for a kernel, what it must compile to: any of

    vector_load, vector_store: 128-bit accesses of global memory;
    wide_offsets: no pointer into a tile of two dimensions has a 32-bit offset, and some have 64-bit ones;
    wide_rows: a program's row is a pointer of its own, and every such pointer has a 64-bit offset;
    tensor_cores: the instructions of the chip's tensor cores.

    Tests compile examples with `every_chip` for all families, the others for sm_90 alone, `slow` ones not at
    all, unless slow tests run, which compile all for all: one example per kernel is enough to see that a chip
    takes it.
    """

    name: str
    call: Callable[[], Any]
    requires: dict[str, tuple[str, ...]] = field(default_factory=dict)
    every_chip: bool = False
    slow: bool = False


MEMORY_BOUND = ("vector_load", "vector_store", "wide_offsets")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")
