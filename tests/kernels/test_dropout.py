"""What is special to the dropout kernels: the random numbers, which backward must find again."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ops.helpers import DTYPES, assert_accurate, kernels_of, spread
from torch import Tensor

from fastgpt.kernels import dropout as kernels
from fastgpt.ops import dropout_add

MUTANTS = {
    "kernels/dropout.py": [  # p off by 0.001; another scale in backward; two quarters with one word; ...
        ("uint32, bitcast=True) >= threshold", "uint32, bitcast=True) > threshold + 4000000"),
        ("threshold.to(tl.uint32), scale, Q)\n    first = tl.program_id(0).to(tl.int64) * (4 * Q)\n"
        "    for k in tl.static_range(4):\n        at = first + k * Q + tl.arange(0, Q)\n        dy",
         "threshold.to(tl.uint32), scale * scale, Q)\n    first = tl.program_id(0).to(tl.int64) * (4 * Q)\n"
        "    for k in tl.static_range(4):\n        at = first + k * Q + tl.arange(0, Q)\n        dy"),
        ("tl.where(_keep(r3, threshold)", "tl.where(_keep(r2, threshold)"),
        ("j * 0 + tl.program_id(0), j * 0", "j * 0, j * 0"),  # every block the same mask
        ("z[k] * x + residual, at < N)", "z[k] * x + residual, at < N - 1)"),
    ],
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", kernels_of("dropout_add"))
Q = kernels.Q


def backward(backend: str, dy: Tensor, seed: int, p: float) -> Tensor:
    operators = getattr(torch.ops, f"fastgpt_{backend}")
    return operators.dropout_add_backward(dy, torch.tensor([seed], device=DEVICE), p, dy.dtype)


def scales(
    backend: str, shape: tuple[int, ...], p: float, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """z of every element."""
    return backward(backend, torch.ones(shape, dtype=dtype, device=DEVICE), seed, p)


def philox(key: int, counter: list[int]) -> list[int]:
    """Philox 4x32-10 as published: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    word = (1 << 32) - 1
    k0, k1 = key & word, key >> 32 & word
    c = counter
    for _ in range(10):
        high, low = 0xCD9E8D57 * c[2], 0xD2511F53 * c[0]
        c = [high >> 32 ^ c[1] ^ k0, high & word, low >> 32 ^ c[3] ^ k1, low & word]
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c


def test_philox_is_philox() -> None:
    """The authors' known answer for a counter and key of zeros."""
    assert philox(0, [0] * 4) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, -1, 0x123456789ABCDEF])
@backends
def test_masks_are_the_documented_ones(seed: int, backend: str) -> None:
    """Element k Q + j of block b takes word k of counter (j, b)."""
    p, n = 0.3, 4 * Q + 3 * Q + 5
    kept = scales(backend, (n,), p, seed) != 0
    for element in [0, 1, Q - 1, Q, 2 * Q + 7, 4 * Q - 1, 4 * Q, 5 * Q + 3, n - 1]:
        block, rest = divmod(element, 4 * Q)
        word = philox(seed % (1 << 64), [rest % Q, block, 0, 0])[rest // Q]
        assert bool(kept[element]) == (word >= round(p * 2**32)), element


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@backends
def test_law(p: float, backend: str) -> None:
    """Frequencies of single elements and of pairs at distances where words, lanes and blocks meet."""
    n = 12 * Q
    dropped = (scales(backend, (n,), p, 7) == 0).double()
    deviation = math.sqrt(p * (1 - p) / n)
    assert abs(dropped.mean() - p) < 5 * deviation
    for k in range(4):  # each word by itself
        assert abs(dropped.view(-1, 4, Q)[:, k].mean() - p) < 5 * 2 * deviation
    q = p * p
    for distance in (1, 2, 8, 32, Q, 2 * Q, 4 * Q):
        pairs = dropped[distance:] * dropped[:-distance]
        assert abs(pairs.mean() - q) < 5 * math.sqrt(2 * q * (1 - q) / len(pairs)), distance
    other = (scales(backend, (n,), p, 8) == 0).double()  # a neighbouring seed
    assert abs((dropped * other).mean() - q) < 5 * math.sqrt(2 * q * (1 - q) / n)


@backends
def test_mask_depends_on_seed_and_number_alone(backend: str) -> None:
    expected = scales(backend, (6, 1000), 0.4, 3)
    assert torch.equal(scales(backend, (6000,), 0.4, 3), expected.flatten())
    assert torch.equal(scales(backend, (3, 1000), 0.4, 3), expected[:3])
    for dtype in DTYPES:
        assert torch.equal(scales(backend, (6, 1000), 0.4, 3, dtype) != 0, expected != 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (3, 768), (197, 33)])  # of one block, and of two
@backends
def test_accuracy(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    p = 0.3
    x, residual, dy = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
    for inputs in ((x, residual, dy), tuple(map(spread, (x, residual, dy)))):
        torch.manual_seed(5)
        leaves = [t.detach().requires_grad_() for t in inputs[:2]]
        y = dropout_add(leaves[0], leaves[1], p=p, backend=backend)
        dx, dresidual = torch.autograd.grad(y, leaves, inputs[2])
        torch.manual_seed(5)
        z = (dropout_add(torch.ones_like(x), torch.zeros_like(x), p=p, backend=backend) != 0).double()
        z = (z / (1 - p)).cpu()
        wide, narrow = z, z.to(dtype)
        assert_accurate(y, x.cpu() * narrow + residual.cpu(), x.cpu() * wide + residual.cpu().double())
        assert_accurate(dx, dy.cpu() * narrow, dy.cpu() * wide)
        assert torch.equal(dresidual, inputs[2])


@backends
def test_expanded_gradient_and_mixed_dtypes(backend: str) -> None:
    for first, second in itertools.permutations(DTYPES, 2):
        x = torch.ones(5, 7, dtype=first, device=DEVICE, requires_grad=True)
        residual = torch.zeros(5, 7, dtype=second, device=DEVICE, requires_grad=True)
        y = dropout_add(x, residual, p=0.5, backend=backend)
        assert y.dtype == torch.promote_types(first, second)
        dx, dresidual = torch.autograd.grad(y.sum(), [x, residual])
        assert (dx.dtype, dresidual.dtype) == (first, second)
        assert torch.equal(dx.double(), y.double())
        assert (dresidual == 1).all()


@backends
def test_nan_and_infinity_propagate_even_where_dropped(backend: str) -> None:
    """0 times NaN is NaN, as in PyTorch: a broken activation is not hidden by chance."""
    x = torch.full((64,), torch.nan, device=DEVICE)
    assert dropout_add(x, torch.zeros_like(x), p=0.9, backend=backend).isnan().all()
    dy = torch.full((64,), torch.inf, device=DEVICE)
    dx = backward(backend, dy, 1, 0.5)
    assert not dx.isfinite().any()


@backends
def test_extreme_p(backend: str) -> None:
    n = 100
    assert (scales(backend, (n,), 1 - 2**-33, 0) == 0).all()
    torch.testing.assert_close(scales(backend, (n,), 2**-33, 0), torch.ones(n, device=DEVICE))
