"""Rounding of bf16 attention: that its errors have no sign of their own.

Qiu and Yao (arXiv 2510.04212) trace late divergence of GPT-2 in bf16 to rows with several maxima: weights
exp(s - max) are then exactly 1, and where v has one sign the sum of exp(s - max) v, rounded to bf16 before
it is divided, falls on ties that the small weights decide alike. The error of o has a sign, and so has that
of delta = do . o.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastgpt import ops

from .helpers import kernels_of

MUTANTS = {
    "csrc/cuda/attention_forward.cuh": [
        (
            "ptx::exp2((s[r][n][e] - anchor) * scale2)",
            "ptx::exp2(fmaf(s[r][n][e], scale2, -(anchor * scale2)))",
            "tests/ops/test_attention_rounding.py -k emulated",
        ),
    ],
    "kernels/attention.py": [
        (
            "acc / total[:, None]",
            "acc.to(o_ptr.dtype.element_ty).to(tl.float32) / total[:, None]",
            "tests/ops/test_attention_rounding.py -k triton",
        ),
    ],
}

KERNELS = kernels_of("attention")
T, D = 64, 16
ULP = 2.0**-7  # of bf16 between 1 and 2, where outputs are


def inputs(level: float, top: float = 0.0, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """q, k and v (2, T, 1, D) in bf16 and do: in each row from the second on two maxima, at the first keys.

    Args:
        level: how far the other scores are below, in nats, give or take a half.
        top: the score of the maxima, which is another one in each row.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.zeros(2, T, 1, D), torch.zeros(2, T, 1, D)
    q[..., 0] = 8.0  # times k / 4
    k[..., 0] = -level / 2 + torch.randn(2, T, 1, generator=generator) / 4
    k[:, :2, :, 0] = 0.0
    q[..., 1] = top * (1 + torch.rand(2, T, 1, generator=generator))
    k[..., 1] = 4.0
    v = -1 - torch.rand(2, T, 1, D, generator=generator)  # of one sign
    do = torch.randn(2, T, 1, D, generator=generator)
    return [x.bfloat16() for x in (q, k, v)], do.bfloat16()


def errors(o: Tensor, exact: Tensor) -> Tensor:
    """In units of the last place, over the rows with two maxima."""
    return (o.double() - exact)[:, 2:] / ULP


def bias(error: Tensor) -> float:
    """The mean, in standard deviations of a mean of so many independent errors."""
    return error.mean().item() / (error.std().item() / math.sqrt(error.numel()))


def blamed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All in fp32, but for the sum of the weighted v, which is rounded before it is divided."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    s = (q @ k.mT * D**-0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    weights = (s - s.amax(-1, keepdim=True)).exp()
    summed = (weights.bfloat16().float() @ v).bfloat16()
    return (summed / weights.sum(-1, keepdim=True)).bfloat16().transpose(1, 2)


def test_what_is_blamed_is_biased() -> None:
    """So that the tests below could fail."""
    qkv, _ = inputs(12.0)
    exact = ops.causal_attention(*[x.double() for x in qkv], backend="eager")
    assert bias(errors(blamed(*qkv), exact)) < -20


@pytest.mark.parametrize("top", [0.0, 3.0])
@pytest.mark.parametrize("level", [4.0, 8.0, 12.0])
@pytest.mark.parametrize("backend", KERNELS)
def test_errors_have_no_sign(backend: str, level: float, top: float) -> None:
    """Forward; the error of delta, which goes into every score's gradient; and dq, dk and dv.

    Errors are not independent where rows share v: five standard deviations of independent ones, or a mean
    of a fiftieth of a unit in the last place, where what is blamed has a fifth.
    """
    qkv, do = inputs(level, top)
    wide = [x.double().requires_grad_() for x in qkv]
    exact = ops.causal_attention(*wide, backend="eager")
    wanted = torch.autograd.grad(exact, wide, do.double())
    leaves = [x.requires_grad_() for x in qkv]
    o = ops.causal_attention(*leaves, backend=backend)
    error = errors(o.detach(), exact.detach())
    assert abs(bias(error)) < 5 or abs(error.mean()) < 0.02
    delta = (error * do.double()[:, 2:]).sum(-1)
    assert abs(bias(delta)) < 5
    for gradient, expected in zip(torch.autograd.grad(o, leaves, do), wanted, strict=True):
        difference = (gradient.double() - expected)[:, 2:]
        assert abs(bias(difference)) < 5 or abs(difference.mean()) < 0.02 * expected.std() * ULP


@pytest.mark.parametrize("backend", KERNELS)
def test_ties_are_rounded_to_even(backend: str) -> None:
    """With two weights of exactly a half, o is halfway between two numbers of bf16 in half of the columns.

    Both directions then occur in each row, whatever its maximum: a weight of 1 that is off by a rounding
    error of fp32 would send all ties of a row the same way. In Triton's interpreter a fused multiply-add
    rounds twice, which hides that one cause.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.full((1, T, 1, D), -1.5)
    pair = -1 - torch.randint(0, 64, (2, D), generator=generator) / 128
    v[0, :2, 0] = pair
    odd = (pair.sum(0) * 128).long() % 2 != 0
    assert 4 < odd.sum() < D
    for top in (0.0, 1.0, 3.0, 5.5, 7.0, 11.0, 13.0, -3.0):
        q, k = torch.zeros(1, T, 1, D), torch.full((1, T, 1, D), -60.0)
        q[..., 0] = 8.0
        k[:, :2, :, 0] = top
        o = ops.causal_attention(*[x.bfloat16() for x in (q, k, v)], backend=backend)
        expected = (pair.sum(0) / 2).bfloat16()  # exact in fp32: to the nearest, ties to even
        assert (o[0, 2:, 0] == expected).all(), top
        away = (expected.float() < pair.sum(0) / 2)[odd]
        assert away.any() and not away.all()
