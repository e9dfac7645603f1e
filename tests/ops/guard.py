"""Poisoned allocations between guard bands: what a kernel does not write, or writes elsewhere, shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

PAD = 256  # bytes on either side; a multiple of 16 keeps alignment as it was


class Guard:
    """Places tensors between bands of 0xFF bytes: NaN in every floating point type, -1 in the integers."""

    def __init__(self) -> None:
        self._placed: list[tuple[Tensor, int]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: Any = "cpu") -> Tensor:
        """A contiguous tensor of poison."""
        size = torch.Size(shape).numel() * dtype.itemsize
        storage = torch.full((PAD + size + PAD,), 255, dtype=torch.uint8, device=device)
        self._placed.append((storage, size))
        return storage[PAD : PAD + size].view(dtype).view(shape)

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy: reading past it gives NaN or -1."""
        return self.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def check(self) -> None:
        """Nothing was written outside the tensors."""
        for storage, size in self._placed:
            for band in (storage[:PAD], storage[PAD + size :]):
                assert (band == 255).all(), f"written outside of a tensor of {size} bytes"


@contextmanager
def guarded() -> Iterator[Guard]:
    """Inside, `torch.empty` and `torch.empty_like` allocate poison between bands; checked on leaving."""
    guard = Guard()
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def guarded_empty(*shape: Any, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guard.empty(sizes, dtype or torch.get_default_dtype(), device or "cpu")

    def guarded_empty_like(tensor: Tensor, *, dtype: Any = None, **options: Any) -> Tensor:
        return guard.empty(tensor.shape, dtype or tensor.dtype, tensor.device)

    def guarded_new_empty(tensor: Tensor, *shape: Any, dtype: Any = None, device: Any = None) -> Tensor:
        return guarded_empty(*shape, dtype=dtype or tensor.dtype, device=device or tensor.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded_empty)
        patch.setattr(torch, "empty_like", guarded_empty_like)
        patch.setattr(Tensor, "new_empty", guarded_new_empty)
        yield guard
    assert (torch.empty, torch.empty_like, Tensor.new_empty) == (empty, empty_like, new_empty)
    guard.check()
