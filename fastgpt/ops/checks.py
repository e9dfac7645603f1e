"""Argument checks shared by the public functions: each names the argument, its value and what is allowed.

They compare attributes only, so that they cost about a microsecond, never wait for a device, and trace under
`torch.compile`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.errors import InputError


def check_floating(**tensors: Tensor | None) -> None:
    """All are floating point and on the device of the first; None stands for an argument left out."""
    first = ""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise InputError(f"{name} has dtype {tensor.dtype}: it must be floating point")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise InputError(f"{name} is on {tensor.device}: it must be on {device}, where {first} is")


def check_indices(name: str, indices: Tensor, other: str, tensor: Tensor) -> None:
    """Indices are int64 and on the device of `tensor`, the argument called `other`."""
    if indices.dtype != torch.int64:
        raise InputError(f"{name} has dtype {indices.dtype}: it must be torch.int64")
    if indices.device != tensor.device:
        raise InputError(f"{name} is on {indices.device}: it must be on {tensor.device}, where {other} is")


def check_shape(name: str, tensor: Tensor | None, shape: Sequence[int], symbols: str) -> None:
    """`tensor` has exactly `shape`; `symbols` says in letters what that is, such as "(C,) of x"."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: it must be {tuple(shape)}, {symbols}")


def check_ndim(name: str, tensor: Tensor, ndim: int, symbols: str) -> None:
    if tensor.ndim != ndim:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: it must be {symbols}")


def last_dimension(name: str, tensor: Tensor) -> int:
    """The size of the last dimension, which must exist."""
    if tensor.ndim == 0:
        raise InputError(f"{name} is a scalar: it must have at least one dimension")
    return tensor.shape[-1]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}")


def check_dropout(name: str, p: float) -> None:
    if not 0 <= p < 1:  # false for NaN too
        raise InputError(f"{name} is {p}: it must be at least 0 and less than 1")


def check_at_least(name: str, value: float, least: int) -> None:
    if not value >= least:  # false for NaN too
        raise InputError(f"{name} is {value}: it must be at least {least}")


def out_of_range(name: str, indices: Tensor, size: int, also: int | None = None) -> InputError:
    """The error for indices outside 0..size-1 (`also` is allowed besides), naming the first of them."""
    bad = (indices < 0) | (indices >= size)
    if also is not None:
        bad &= indices != also
    allowed = f"0 to {size - 1}" + ("" if also is None else f" or ignore_index = {also}")
    return InputError(f"{name} holds {indices[bad][0].item()}: it must be {allowed}")
