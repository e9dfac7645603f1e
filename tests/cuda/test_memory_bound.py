"""The CUDA kernels of gelu, bias_gelu, dropout_add, embedding and adamw_ at their edges, emulated.

tests/ops has their accuracy on ordinary tensors. Here: addresses off the 16-byte accesses, the last piece of
a tensor, runs of tokens that cross chunks, chunks of many tensors, the random numbers.
"""

from __future__ import annotations

import itertools
from typing import Any

import cuda_emulator
import pytest
import torch
from ops.helpers import DTYPES, assert_accurate
from torch import Tensor

from fastgpt.ops import adamw_, bias_gelu, dropout_add, embedding, gelu, grad_norm

pytestmark = pytest.mark.skipif(cuda_emulator.absent() is not None, reason=str(cuda_emulator.absent()))
CHUNK = 64  # kChunk of embedding.cuh
QUARTER = 1024  # kQuarter of dropout.cuh
PART, ADAMW_CHUNK = 1024, 4096  # kAdamwPart and kAdamwChunk
HYPER = [[1e-2, 0.9, 0.999, 1e-8, 0.1], [3e-3, 0.0, 0.95, 1e-6, 0.0]]  # beta1 = 0 too


@pytest.fixture(autouse=True, scope="module")
def rows() -> None:
    cuda_emulator.register_rows()
    cuda_emulator.loaded()


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)


def shifted(tensor: Tensor) -> Tensor:
    """The same values, beginning in the middle of a 16-byte line."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def check(call: Any, inputs: list[Tensor]) -> None:
    """Outputs and gradients of `call(*inputs, backend=...)`, on aligned inputs, and on others."""
    torch.manual_seed(1)
    dy = torch.randn_like(call(*inputs, backend="eager"))

    def everything(inputs: list[Tensor], backend: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = call(*leaves, backend=backend)
        grad = shifted(dy) if backend == "emulated" else dy
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    oracle, eager = everything([x.double() for x in inputs], "eager"), everything(inputs, "eager")
    for made in (inputs, [shifted(x) for x in inputs]):
        for values in zip(everything(made, "emulated"), eager, oracle, strict=True):
            assert_accurate(*values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu(dtype: torch.dtype, approximate: str) -> None:
    """One element more or less than what a thread, and a block, has."""
    for n in (15, 16, 17, 4095, 4099):
        check(
            lambda x, backend: gelu(x, approximate=approximate, backend=backend), [torch.randn(n).to(dtype)]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (17, 264), (33, 260), (131, 7)])
def test_bias_gelu(dtype: torch.dtype, rows: int, width: int) -> None:
    """Widths of one piece, of two tiles, off the pieces; more rows than a round of all blocks has."""
    check(
        lambda x, b, backend: bias_gelu(x, b, backend=backend),
        [torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)],
    )


def philox(key: int, counter: list[int]) -> list[int]:
    """Philox 4x32-10 as published: Salmon et al., SC 2011."""
    word, c = (1 << 32) - 1, counter
    k0, k1 = key & word, key >> 32 & word
    for _ in range(10):
        high, low = 0xCD9E8D57 * c[2], 0xD2511F53 * c[0]
        c = [high >> 32 ^ c[1] ^ k0, high & word, low >> 32 ^ c[3] ^ k1, low & word]
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c


def scales(n: int, p: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    backward = torch.ops.fastgpt_emulated.dropout_add_backward
    return backward(torch.ones(n, dtype=dtype), torch.tensor([seed]), p, dtype)


@pytest.mark.parametrize("seed", [0, -1, 0x123456789ABCDEF])
def test_dropout_masks_are_the_documented_ones(seed: int) -> None:
    """Element k Q + j of block b takes word k of counter (j, b)."""
    p, n = 0.3, 7 * QUARTER + 5
    kept = scales(n, p, seed) != 0
    words = [[philox(seed % (1 << 64), [j, block, 0, 0]) for j in range(QUARTER)] for block in range(2)]
    documented = torch.tensor(words).mT.flatten()[:n] >= round(p * 2**32)
    assert torch.equal(kept, documented)
    for dtype in DTYPES:
        assert torch.equal(scales(n, p, seed, dtype) != 0, kept)
    assert abs((~kept).double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, DTYPES)))
def test_dropout_of_mixed_dtypes(first: torch.dtype, second: torch.dtype) -> None:
    p, n = 0.3, QUARTER + 13
    x, residual, dy = torch.randn(n).to(first), torch.randn(n).to(second), torch.randn(n)
    for values, added in ((x, residual), (shifted(x), shifted(residual))):
        leaves = [values.detach().requires_grad_(), added.detach().requires_grad_()]
        torch.manual_seed(5)
        y = dropout_add(leaves[0], leaves[1], p=p, backend="emulated")
        dx, _ = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        torch.manual_seed(5)
        z = (dropout_add(torch.ones(n), torch.zeros(n), p=p, backend="emulated") != 0).double() / (1 - p)
        assert (y.dtype, dx.dtype) == (torch.promote_types(first, second), first)
        narrow = z.to(y.dtype)
        assert_accurate(y.detach(), x * narrow + residual, x.double() * z + residual.double())
        assert_accurate(dx, (dy.to(y.dtype) * narrow).to(first), dy.to(y.dtype).double() * z)


def test_dropout_keeps_nan_where_it_drops() -> None:
    x = torch.full((64,), torch.nan)
    assert dropout_add(x, torch.zeros_like(x), p=0.9, backend="emulated").isnan().all()


# Lengths of runs of equal tokens: see the figure in docs/kernels/embedding.md.
RUNS = [
    [1],
    [CHUNK],  # to the very edge of the last chunk
    [CHUNK, CHUNK],  # runs that begin and end at an edge
    [CHUNK - 1, 2],  # one that crosses, by one token either way
    [CHUNK - 1, 2 * CHUNK + 2],  # begins inside, goes over whole chunks, and ends inside
    [2 * CHUNK, 5],  # begins at an edge and goes over a whole chunk
    [5, CHUNK, CHUNK, CHUNK],  # one run leaves each chunk and another enters it
    [1] * 17,  # more tokens than a group, each its own run
    [7, 1, 8, 1, 9],  # runs to the edges of groups, and of what is in flight at a time
    [11 * CHUNK + 9],  # more parts than are in flight at a time
]


@pytest.mark.parametrize("lengths", RUNS, ids=str)
def test_runs_of_tokens(lengths: list[int]) -> None:
    """Sorted, the tokens are runs of these lengths; the batch has them in another order."""
    idx = torch.repeat_interleave(torch.arange(len(lengths)) * 3, torch.tensor(lengths))
    check_embedding(idx[torch.randperm(len(idx))][None], 33, torch.float32, 3 * len(lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 40, 1032])  # scalar accesses; a few pieces; two tiles, one not full
def test_widths_of_embeddings(width: int, dtype: torch.dtype) -> None:
    check_embedding((torch.rand(19, 9).pow(4) * 16).long(), width, dtype, 16)


def check_embedding(idx: Tensor, width: int, dtype: torch.dtype, vocab_size: int) -> None:
    def call(wt: Tensor, wp: Tensor, backend: str) -> Tensor:
        return embedding(idx, wt, wp, start=1, backend=backend)

    check(call, [torch.randn(n, width).to(dtype) for n in (vocab_size, idx.shape[1] + 2)])


def test_a_token_out_of_range_touches_nothing_else() -> None:
    dy = torch.randn(1, 70, 5)
    idx = torch.arange(70)[None] - 2
    idx[0, -1] = 1 << 40
    arguments = (4, 70, 0, torch.float32, torch.float32)
    dwt, dwp = torch.ops.fastgpt_emulated.embedding_backward(dy, idx, *arguments)
    assert torch.equal(dwt, dy[0, 2:6])
    assert torch.equal(dwp, dy[0])


def step(made: dict[str, list[Tensor]], backend: str, **options: Any) -> None:
    groups = [i % 2 for i in range(len(made["params"]))]
    adamw_(*made.values(), torch.tensor(HYPER, dtype=torch.float64), groups, backend=backend, **options)


def made(sizes: list[int], dtype: torch.dtype, grad_dtype: torch.dtype) -> dict[str, list[Tensor]]:
    return {
        "params": [torch.randn(n).to(dtype) for n in sizes],
        "grads": [torch.randn(n).to(grad_dtype) for n in sizes],
        "exp_avgs": [torch.randn(n) for n in sizes],
        "exp_avg_sqs": [torch.randn(n).square() for n in sizes],
        "steps": [torch.full((), float(i % 5)) for i in range(len(sizes))],
    }


@pytest.mark.parametrize(("dtype", "grad_dtype"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("place", [lambda x: x, shifted], ids=["aligned", "shifted"])
def test_chunks_of_tensors(dtype: torch.dtype, grad_dtype: torch.dtype, place: Any) -> None:
    """Sizes at the edges of pieces, parts and chunks, and no elements; steps and groups of their own."""
    sizes = [1, 7, 8, PART - 1, PART + 1, 0, ADAMW_CHUNK, 2 * ADAMW_CHUNK + 33]
    actual = made(sizes, dtype, grad_dtype)
    eager = {name: [t.clone() for t in tensors] for name, tensors in actual.items()}
    exact = {name: [t if name == "steps" else t.double() for t in eager[name]] for name in eager}
    exact["steps"] = [t.clone() for t in eager["steps"]]
    actual = {name: [t if name == "steps" else place(t) for t in tensors] for name, tensors in actual.items()}
    norm = torch.tensor(100.0)
    options: dict[str, Any] = {"grad_norm": norm, "max_grad_norm": 30.0}
    for each, backend in [(exact, "eager"), (eager, "eager"), (actual, "emulated")]:
        step(each, backend, grad_scale=torch.tensor(4.0), **options)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        for values in zip(*(each[name] for each in (actual, eager, exact)), strict=True):
            assert_accurate(*values)
    assert [int(t) for t in actual["steps"]] == [i % 5 + 1 for i in range(len(sizes))]


@pytest.mark.parametrize("copy_dtype", DTYPES, ids=str)
def test_working_copies_and_found_inf(copy_dtype: torch.dtype) -> None:
    sizes = [5, ADAMW_CHUNK + 3]
    for found in (0.0, 1.0):
        tensors = made(sizes, torch.float32, torch.bfloat16)
        before = {name: [t.clone() for t in each] for name, each in tensors.items()}
        copies = [torch.full((n,), torch.nan, dtype=copy_dtype) for n in sizes]
        step(tensors, "emulated", found_inf=torch.tensor([found]), copies=copies)
        for i, copy in enumerate(copies):
            if found:
                assert copy.isnan().all()
                assert all(torch.equal(tensors[name][i], before[name][i]) for name in tensors)
            else:
                assert torch.equal(copy, tensors["params"][i].to(copy_dtype))
                assert int(tensors["steps"][i]) == i + 1


def test_more_tensors_than_a_block_prepares() -> None:
    tensors = made([3] * 130, torch.float32, torch.float32)
    eager = {name: [t.clone() for t in each] for name, each in tensors.items()}
    step(tensors, "emulated")
    step(eager, "eager")
    for name in ("params", "steps"):
        torch.testing.assert_close(tensors[name], eager[name])


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.0 - 2**-9, 1e-3, 2.0])
def test_stochastic_rounding(value: float) -> None:
    """Only the two neighbours in bf16, with the probabilities that give the value as their mean; no two
    halves of a word alike."""
    n = ADAMW_CHUNK + 500
    wanted = torch.tensor(value)
    low = (wanted.view(torch.int32) & -65536).view(torch.float32)  # towards 0
    high = ((wanted.view(torch.int32) & -65536) + 65536).view(torch.float32)
    tensors = made([n], torch.bfloat16, torch.float32)
    tensors["exp_avgs"][0].zero_()
    # From low a step of g / (|g| + 1), without momentum, to the value.
    distance = low - wanted
    tensors["params"] = [low.bfloat16().expand(n).clone()]
    tensors["grads"] = [(distance / (1 - distance.abs())).expand(n).clone()]
    hyper = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    adamw_(*tensors.values(), hyper, [0], stochastic_rounding=True, backend="emulated")
    up = (tensors["params"][0].float() == high).double()
    assert ((tensors["params"][0].float() == low) | (up == 1)).all()
    share = float((wanted - low) / (high - low))
    deviation = (share * (1 - share) / n) ** 0.5
    assert abs(float(up.mean()) - share) <= 5 * deviation + 2**-15
    for apart in (1, 2, 8, PART):  # elements of one Philox, of the next thread, of the next part
        pairs = float((up[apart:] * up[:-apart]).mean())
        assert abs(pairs - share**2) <= 5 * (2 * share**2 * (1 - share**2) / n) ** 0.5 + 2**-14


def test_stochastic_rounding_keeps_nan_and_infinity() -> None:
    tensors = made([3], torch.bfloat16, torch.bfloat16)
    tensors["params"] = [torch.tensor([torch.inf, -torch.inf, torch.nan]).bfloat16()]
    step(tensors, "emulated", stochastic_rounding=True)
    assert str(tensors["params"][0].tolist()) == "[inf, -inf, nan]"
    tensors = made([300], torch.bfloat16, torch.float32)
    tensors["grads"][0].view(torch.int32).fill_(0x7FFFFFFF)  # a GPU's own NaN: adding to it gives -0
    step(tensors, "emulated", stochastic_rounding=True)
    assert tensors["params"][0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype: torch.dtype) -> None:
    grads = [torch.randn(n).to(dtype) for n in (1, 0, 9, PART + 1, ADAMW_CHUNK, 2 * ADAMW_CHUNK + 33)]
    eager = grad_norm(grads, backend="eager")
    exact = grad_norm([g.double() for g in grads], backend="eager")
    norm = grad_norm(grads, backend="emulated")
    assert_accurate(norm, eager, exact)
    assert torch.equal(norm, grad_norm([shifted(g) for g in grads], backend="emulated"))
    assert grad_norm([torch.empty(0)], backend="emulated") == 0


MUTANTS = {
    "csrc/cuda/gelu.cuh": [
        ("db[i] += d[i];", "db[i] = d[i];", "tests/cuda/test_memory_bound.py -k gelu"),
        (
            "for (int i = 0; i < kBiasWarps; ++i) sum +=",
            "for (int i = 1; i < kBiasWarps; ++i) sum +=",
            "tests/cuda/test_memory_bound.py -k gelu",
        ),
    ],
    "csrc/cuda/dropout.cuh": [
        (
            "philox(seed, j + i, blockIdx.x)",
            "philox(seed, j + i, 0)",
            "tests/cuda/test_memory_bound.py -k dropout",
        ),
        (
            "kAdd ? fmaf(z, values[i], added[i]) :",
            "kAdd ? z == 0 ? added[i] : fmaf(z, values[i], added[i]) :",
            "tests/cuda/test_memory_bound.py -k dropout",
        ),
    ],
    "csrc/cuda/embedding.cuh": [
        (
            "(2 * chunk + (at_edge ? 0 : 1)) * width",
            "2 * chunk * width",
            "tests/cuda/test_memory_bound.py -k runs",
        ),
        (
            "first < n && tokens[first] == token ?",
            "first < n && i < 2 && tokens[first] == token ?",
            "tests/cuda/test_memory_bound.py -k runs",
        ),
    ],
    "csrc/cuda/adamw.cuh": [
        (
            "random.words[i / 2] >> i % 2 * 16 & 0xffff",
            "random.words[i / 2] & 0xffff",
            "tests/cuda/test_memory_bound.py -k stochastic",
        ),
        (
            "for (int warp = 1; warp < kRootThreads",
            "for (int warp = 2; warp < kRootThreads",
            "tests/cuda/test_memory_bound.py -k norm",
        ),
    ],
}
