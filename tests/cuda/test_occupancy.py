"""What GPT-2's shapes launch fits the chips that it is compiled for, and fills them well enough.

Which kernel runs with how many threads and bytes of shared memory is seen in the emulator; registers and
static shared memory are the compiler's (resources.json).
"""

from __future__ import annotations

import json

import cuda_emulator
import pytest
import torch
from cuda_resources import CHIPS, TABLE, occupancy

from fastgpt import ops
from fastgpt.inspect.build import demangled

pytestmark = pytest.mark.skipif(cuda_emulator.absent() is not None, reason=str(cuda_emulator.absent()))

# The least share of a chip's warps that may be resident, by the beginning of a kernel's name. Kernels that
# wait for memory want many warps. One that keeps a row in registers or in shared memory trades warps for
# reading it once, and has 16 bytes a thread in flight; those of attention keep a tile of the result in
# registers; those of the embedding have blocks of three warps, which share four quarters of an SM badly.
FLOORS = {
    "attention": 1 / 8,
    "norm_backward": 3 / 16,
    "cross_entropy_kernel": 1 / 4,
    "embedding": 9 / 32,
    "": 5 / 16,
}


def train_step() -> None:
    """Every kernel at GPT-2's widths, few rows: a launch's block does not depend on their number."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)

    idx = torch.randint(50257, (1, 64))
    x, w, b = leaf(1, 64, 768), leaf(768), leaf(768)
    outs = [
        ops.embedding(idx, leaf(50304, 768), leaf(1024, 768)),
        ops.layer_norm(x, w, b),
        *ops.add_layer_norm(x, x, w, b),
        ops.rms_norm(x, w),
        ops.causal_attention_qkvpacked(leaf(1, 64, 3, 12, 64)),
        ops.gelu(leaf(64, 3072)),
        ops.bias_gelu(leaf(64, 3072), leaf(3072)),
        ops.dropout_add(x, x, p=0.1),
        ops.cross_entropy(leaf(4, 50304), idx[0, :4], vocab_size=50257),
    ]
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    p, g = torch.randn(768, 64), torch.randn(768, 64)
    hyper = torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]], dtype=torch.float64)
    moments = [torch.zeros_like(p)], [torch.zeros_like(p)]
    ops.adamw_([p], [g], *moments, [torch.zeros(())], hyper, [0], grad_norm=ops.grad_norm([g]))


@pytest.fixture(scope="module")
def launches() -> list[tuple[str, int, int]]:
    cuda_emulator.register_rows()
    cuda_emulator.launches(clear=True)
    with ops.use("emulated"):
        train_step()
    found = cuda_emulator.launches()
    names = demangled([name for name, *_ in found])
    return [(name, threads, shared) for name, (_, threads, shared) in zip(names, found, strict=True)]


@pytest.mark.parametrize("chip", CHIPS)
def test_occupancy(chip: str, launches: list[tuple[str, int, int]]) -> None:
    known = {
        kernel: used
        for chips in json.loads(TABLE.read_text())["kernels"].values()
        for kernel, used in chips[chip].items()
    }
    assert len(launches) >= 15
    for kernel, threads, dynamic in launches:
        registers, static = known[kernel]
        share = occupancy(chip, threads, registers, static + dynamic)
        floor = next(least for name, least in FLOORS.items() if kernel.startswith(name))
        print(f"{kernel}: {threads} threads, {registers} registers, {static + dynamic} bytes: {share:.0%}")
        assert share >= floor, f"{kernel}: {share:.0%} of the warps of {chip}"
