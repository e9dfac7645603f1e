"""Rotary position embedding (RoPE): queries and keys turned by their positions, so that scores see distances.

Channels i and i + D/2 of a head are a point in the plane, turned at position t by an angle of its own:

    angle_i = t * BASE^(-2i / D)                       i < D/2
    y_i       = x_i cos(angle_i) - x_{i + D/2} sin(angle_i)
    y_{i+D/2} = x_{i + D/2} cos(angle_i) + x_i sin(angle_i)

The product of a query turned by t and a key turned by s depends on t - s alone, and lengths stay as they are.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864. It pairs
neighbours (2i, 2i + 1); pairing halves, as GPT-NeoX does, only renames the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


class Rotation:
    """The turns of positions start .. start + length - 1; calling it turns (B, T, H, D), in the same dtype.

    The tables are at least fp32 and computed anew in each forward pass: buffers would be rounded with the
    weights by `model.bfloat16()`. FSDP's mixed precision rounds the tensors that a block is called with, in
    tuples and dataclasses too, which is why this is neither.

    Args:
        start: the first position, a number or int64 (1,) on the device of `like`.
        length: how many, T.
        head_size: D, even.
        like: a tensor of the network's device and dtype.
    """

    def __init__(self, start: int | Tensor, length: int, head_size: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        channels = torch.arange(0, head_size, 2, device=like.device, dtype=dtype)
        positions = start + torch.arange(length, device=like.device, dtype=dtype)
        angles = positions[:, None, None] * BASE ** (-channels / head_size)  # (T, 1, D/2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x.dtype)
