"""RMSNorm: the kernels of `layer_norm.py` compiled without the mean and the bias.

    rstd = 1 / sqrt(sum_c x^2 / C + eps),  xhat = x * rstd,  y = xhat * w
    g = dy * w,  dx = rstd * (g - xhat * sum_c (g * xhat) / C),  dw = sum_rows dy * xhat

Bytes and launch are those of `layer_norm.py`.
"""

from __future__ import annotations

from fastgpt.kernels.layer_norm import norm_backward, norm_forward
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norm_forward(x, None, weight, None, eps, centered=False)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw, _ = norm_backward(dy, None, x, weight, None, rstd, has_bias=False)
    return dx, dw
