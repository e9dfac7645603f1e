"""What is special to the embedding kernels: runs of equal tokens, and the chunks they are cut into."""

from __future__ import annotations

import pytest
import torch
from ops.helpers import DTYPES, assert_accurate, kernels_of
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.kernels import embedding as kernels
from fastgpt.ops import embedding

MUTANTS = {
    "kernels/embedding.py": [
        (
            "start + rows % T",
            "rows % T",
            "tests/ops/test_embedding.py tests/kernels/test_embedding.py -k forward",
        ),
        ("((within == 0) | (before != token))", "(before != token)"),  # a chunk starts no part
        ("(before != token) & (after != token)", "before != token"),  # a run that leaves is taken for whole
        ("places = within + tl.arange(0, CHUNK)", "places = within + tl.arange(0, CHUNK // 2)"),
        ("tl.where(within == 0, 0, 1)", "0"),  # both partial sums in one place
        ("tl.where(whole, 0, 1)", "1"),
        ("start + tl.sum(sums, 0)", "tl.sum(sums, 0)"),  # the part in the chunk where a run begins
        ("more = tl.sum(same.to(tl.int32), 0) == ROWS", "more = False"),
        ("rows = tl.load(order_ptr + i + parts", "rows = tl.load(order_ptr + i + parts * 0"),
        ("mask = (b < B)[:, None] & col_in", "mask = (b < B - 1)[:, None] & col_in"),
        ("        return  # it began in a chunk before", "        pass"),
        ("(idx < 0) | (idx >= vocab_size)", "(idx < 0) | (idx > vocab_size)"),
    ]
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", kernels_of("embedding"))
CHUNK, GROUP = kernels.CHUNK, kernels.GROUP


def gradients(idx: Tensor, dy: Tensor, vocab_size: int, backend: str, dtype: torch.dtype) -> list[Tensor]:
    wt = torch.zeros(vocab_size, dy.shape[-1], dtype=dtype, device=dy.device, requires_grad=True)
    wp = torch.zeros(idx.shape[1] + 1, dy.shape[-1], dtype=dtype, device=dy.device, requires_grad=True)
    y = embedding(idx, wt, wp, start=1, backend=backend)
    return list(torch.autograd.grad(y, [wt, wp], dy.to(dtype)))


def check_backward(
    backend: str, idx: Tensor, width: int, dtype: torch.dtype = torch.float32, vocab_size: int = 64
) -> None:
    dy = torch.randn(*idx.shape, width).to(dtype)
    oracle = gradients(idx, dy, vocab_size, "eager", torch.float64)
    eager = gradients(idx, dy, vocab_size, "eager", dtype)
    on_device = idx.to(DEVICE), dy.to(DEVICE), vocab_size
    first, again = (gradients(*on_device, backend, dtype) for _ in range(2))
    for values in zip(first, eager, oracle, again, strict=True):
        assert_accurate(*values[:3])
        assert torch.equal(values[0], values[3])


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [CHUNK],  # to the very edge of the last chunk
        [CHUNK, CHUNK],  # runs that begin and end at an edge
        [CHUNK - 1, 2],  # one that crosses, by one token either way
        [CHUNK - 1, 2 * CHUNK + 2],  # begins inside, goes over whole chunks, and ends inside
        [2 * CHUNK, 5],  # begins at an edge and goes over a whole chunk
        [5, CHUNK, CHUNK, CHUNK],  # one run leaves each chunk and another enters it
        [1] * 17,  # more tokens than a group, each its own run
        [GROUP - 1, 1, GROUP, 1],  # runs to the edges of groups
        [7 * CHUNK + 9],  # more parts than the tile of the second kernel has rows at 768 columns
    ],
    ids=str,
)
@backends
def test_runs(lengths: list[int], backend: str) -> None:
    """Sorted, the tokens are runs of these lengths; the batch has them in another order."""
    idx = torch.repeat_interleave(torch.arange(len(lengths)) * 3, torch.tensor(lengths))
    width = 768 if len(lengths) == 1 else 33  # narrow columns make tall tiles
    check_backward(backend, idx[torch.randperm(len(idx))][None], width, vocab_size=3 * len(lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_text(dtype: torch.dtype, backend: str) -> None:
    """Frequencies as in text, one token in five the same; batch and length off every tile."""
    tokens = (torch.rand(3, 197).pow(4) * 64).long()
    check_backward(backend, tokens, 33, dtype)


# One element, off every vector width, and two blocks of columns of which the second is not full.
@pytest.mark.parametrize("width", [1, 33, 1600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_forward(width: int, dtype: torch.dtype, backend: str) -> None:
    idx = torch.randint(0, 11, (3, 65))
    wt, wp = torch.randn(11, width).to(dtype), torch.randn(70, width).to(dtype)
    y = embedding(idx.to(DEVICE), wt.to(DEVICE), wp.to(DEVICE), start=5, backend=backend)
    assert torch.equal(y.cpu(), embedding(idx, wt, wp, start=5, backend="eager"))  # one rounding in both


@backends
def test_widths_backward(backend: str) -> None:
    for width in (1, 1600):
        check_backward(backend, torch.randint(0, 5, (2, 70)), width)


@pytest.mark.parametrize("token_dtype", DTYPES, ids=str)
@backends
def test_mixed_dtypes(token_dtype: torch.dtype, backend: str) -> None:
    """As PyTorch's addition promotes, and gradients in the dtypes of their tables."""
    idx = torch.randint(0, 5, (2, 3), device=DEVICE)
    wt = torch.randn(5, 7, device=DEVICE).to(token_dtype).requires_grad_()
    wp = torch.randn(4, 7, device=DEVICE).bfloat16().requires_grad_()
    y, expected = (embedding(idx, wt, wp, backend=name) for name in (backend, "eager"))
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    grads, wanted = (torch.autograd.grad(out.sum(), [wt, wp]) for out in (y, expected))
    for grad, other in zip(grads, wanted, strict=True):
        assert grad.dtype == other.dtype
        assert torch.equal(grad, other)  # small integers


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA it gives NaN")
@pytest.mark.parametrize("token", [-1, 4])
@backends
def test_a_token_out_of_range_is_an_error_on_a_cpu(token: int, backend: str) -> None:
    wt, wp = torch.ones(4, 3), torch.ones(2, 3)
    embedding(torch.tensor([[0, 3]]), wt, wp, backend=backend)
    with pytest.raises(InputError, match=f"{token}"):
        embedding(torch.tensor([[0, token]]), wt, wp, backend=backend)


def test_a_token_out_of_range_touches_nothing_else() -> None:
    """On CUDA nobody looks at the values: such a token gives NaN and no gradient."""
    width = 5
    dy = torch.randn(1, 70, width, device=DEVICE)
    idx = torch.arange(70, device=DEVICE)[None] - 2
    idx[0, -1] = 1 << 40
    arguments = (4, 70, 0, torch.float32, torch.float32)
    dwt, dwp = kernels.embedding_backward(dy, idx, *arguments)
    assert torch.equal(dwt, dy[0, 2:6])
    assert torch.equal(dwp, dy[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU it is an error")
def test_a_token_out_of_range_gives_nan() -> None:
    wt, wp = torch.ones(4, 3, device=DEVICE), torch.ones(3, 3, device=DEVICE)
    y = embedding(torch.tensor([[0, 4, -1]], device=DEVICE), wt, wp, backend="triton")
    assert torch.equal(y.isnan().any(-1), torch.tensor([[False, True, True]], device=DEVICE))
