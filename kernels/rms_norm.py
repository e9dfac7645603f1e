"""RMSNorm: the kernels of `layer_norm.py` compiled without the mean and the bias.

    rstd = 1 / sqrt(sum_c x^2 / C + eps),  xhat = x * rstd,  y = xhat * w
    g = dy * w,  dx = rstd * (g - xhat * sum_c (g * xhat) / C),  dw = sum_rows dy * xhat

Bytes and launch are those of `layer_norm.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastgpt.kernels.examples import MEMORY_BOUND, Example, meta
from fastgpt.kernels.layer_norm import norm_backward, norm_forward


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norm_forward(x, None, weight, None, eps, centered=False)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw, _ = norm_backward(dy, None, x, weight, None, rstd, has_bias=False)
    return dx, dw


def examples() -> Iterator[Example]:
    """The shared kernels as they are compiled without the mean."""
    x, w, row = meta(8192, 768), meta(768), meta(8192, dtype=torch.float32)
    yield Example("forward-768", partial(rms_norm_forward, x, w, 1e-6), {"_forward": MEMORY_BOUND})
    yield Example("backward-768", partial(rms_norm_backward, x, x, w, row), {"_backward": MEMORY_BOUND})
