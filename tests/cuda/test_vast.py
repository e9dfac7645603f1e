"""Offsets past 2^31 elements: tensors of which little is touched, and of each launch the last blocks alone.

A kernel with a 32-bit offset would read and write in front of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cuda_emulator
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops

pytestmark = pytest.mark.skipif(cuda_emulator.absent() is not None, reason=str(cuda_emulator.absent()))
BF16 = torch.bfloat16
WIDTH = 1024
ROWS = (1 << 31) // WIDTH + 3
LAST, MOST = 8, 64 * WIDTH  # rows that are looked at, and columns


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    cuda_emulator.register_rows()
    cuda_emulator.loaded()


@pytest.fixture
def last_blocks() -> Iterator[Callable[[int], None]]:
    """Enough of them for the rows at the end: some kernels have several rows a block, or blocks a row."""
    call = cuda_emulator.loaded().emulator_last_blocks
    call(16)
    yield call
    call(0)


def promised(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that the system provides where it is first written."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"this system promises no memory that it may not have: {error}")


def vast(rows: int = ROWS, width: int = WIDTH) -> Tensor:
    """Random numbers at the end of the last rows."""
    tensor = promised(rows, width, dtype=BF16)
    assert tensor.numel() > 1 << 31
    end = tensor[-LAST:, -MOST:]
    end.copy_(torch.randn(end.shape))
    return tensor


def native(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.fastgpt_emulated, name)


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.numel() > 1 << 31
    torch.testing.assert_close(actual[-LAST:], expected)


def test_gelu(last_blocks: None) -> None:
    x, dy, bias = vast(), vast(), torch.randn(WIDTH).to(BF16)
    tail = x[-LAST:].clone().requires_grad_()
    y = ops.gelu(tail, backend="eager")
    (dx,) = torch.autograd.grad(y, tail, dy[-LAST:])
    same(native("gelu_forward")(x, "tanh"), y.detach())
    same(native("gelu_backward")(dy, x, "tanh"), dx)
    wide = ops.bias_gelu(x[-LAST:].float(), bias.float(), backend="eager")
    same(native("bias_gelu_forward")(x, bias, "tanh"), wide.to(BF16))


def test_bias_gelu_backward(last_blocks: None) -> None:
    """Two rows, so that the last blocks have whole columns: of dx, and half as many of their sums."""
    width = (1 << 30) + WIDTH
    x, dy, bias = vast(2, width), vast(2, width), promised(width, dtype=BF16)
    bias[-WIDTH:] = torch.randn(WIDTH)
    tail = (x[:, -WIDTH:] + bias[-WIDTH:].float()).requires_grad_()
    y = ops.gelu(tail, backend="eager")
    (expected,) = torch.autograd.grad(y, tail, dy[:, -WIDTH:].float())
    dx, db = native("bias_gelu_backward")(dy, x, bias, "tanh")
    torch.testing.assert_close(dx[:, -WIDTH:], expected.to(BF16))
    torch.testing.assert_close(db[-WIDTH // 2 :], expected.sum(0)[-WIDTH // 2 :].to(BF16))


def test_backward_of_norm(last_blocks: Callable[[int], None]) -> None:
    """Rows so wide that a block has one of dx, and another a few columns of the weight's gradient."""
    width, rows = 64 * WIDTH, ROWS // 64 + 1
    x, dy = vast(rows, width), vast(rows, width)
    w, mean, rstd = torch.randn(width).to(BF16), torch.randn(rows), torch.rand(rows)
    last_blocks(1)
    dx, dw, db = native("layer_norm_backward")(dy, x, w, mean, rstd, True)
    mean, rstd = mean[-LAST:, None], rstd[-LAST:, None]
    xhat, dout = (x[-LAST:].float() - mean) * rstd, dy[-LAST:].float()
    g = dout * w.float()
    expected = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
    torch.testing.assert_close(dx[-1], expected[-1].to(BF16))
    torch.testing.assert_close(dw[-32:], (dout * xhat).sum(0)[-32:].to(BF16))
    torch.testing.assert_close(db[-32:], dout.sum(0)[-32:].to(BF16))


def test_adamw(last_blocks: None) -> None:
    numel = (1 << 31) + 3 * WIDTH
    dtypes = (BF16, BF16, torch.float32, torch.float32)
    far = [promised(numel, dtype=dtype) for dtype in dtypes]
    near = [torch.rand(WIDTH).to(dtype) for dtype in dtypes]
    for tensor, values in zip(far, near, strict=True):
        tensor[-WIDTH:] = values
    hyper = torch.tensor([[1e-2, 0.9, 0.95, 1e-8, 0.1]], dtype=torch.float64)
    for p, grad, m, v in (far, near):
        tensors = [[p], [grad], [m], [v], [torch.zeros(())], []]
        native("adamw__forward")(*tensors, hyper, [0], None, 0.0, None, None, None)
    for tensor, values in zip(far, near, strict=True):
        assert torch.equal(tensor[-WIDTH:], values)
    native("grad_norm_forward")([far[1]])  # reads where it should: of chunks that do not run it has no sums


def test_dropout_add(last_blocks: None) -> None:
    """So small a p drops nothing."""
    x, residual, seed = vast(), vast(), torch.tensor([3])
    same(native("dropout_add_forward")(x, residual, seed, 1e-12), x[-LAST:] + residual[-LAST:])
    same(native("dropout_add_backward")(x, seed, 1e-12, BF16), x[-LAST:])


def test_norm(last_blocks: None) -> None:
    x, residual, w = vast(), vast(), torch.randn(WIDTH).to(BF16)
    y, summed, mean, _ = native("add_layer_norm_forward")(x, residual, w, None, 1e-5)
    tail = x[-LAST:] + residual[-LAST:]
    same(summed, tail)
    same(y, F.layer_norm(tail, (WIDTH,), w, eps=1e-5))
    torch.testing.assert_close(mean[-LAST:], tail.float().mean(-1))


def test_embedding(last_blocks: None) -> None:
    idx = torch.randint(ROWS - LAST, ROWS, (ROWS, 1))
    table, positions = vast(), torch.randn(1, WIDTH).to(BF16)
    y = native("embedding_forward")(idx, table, positions, 0)
    same(y[:, 0], table[idx[-LAST:, 0]] + positions)


def test_cross_entropy(last_blocks: None) -> None:
    logits, targets = vast(ROWS // 64 + 1, 64 * WIDTH), torch.full((ROWS // 64 + 1,), 7)
    tail = logits[-LAST:].clone().requires_grad_()
    loss = F.cross_entropy(tail, targets[-LAST:], reduction="none")
    (expected,) = torch.autograd.grad(loss.sum(), tail)
    operator = native("cross_entropy_forward")
    losses, _, dlogits = operator(logits, targets, -100, 0.0, 0.0, "none", logits.shape[1], True)
    torch.testing.assert_close(losses[-LAST:], loss.float(), rtol=1e-2, atol=0)
    same(dlogits, expected)


@pytest.mark.parametrize("apart", [0, 1, 2], ids=["batch", "token", "head"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_strides_of_attention(dtype: torch.dtype, apart: int) -> None:
    """q, k and v are read where they are, however far apart batches, tokens or heads lie. All blocks run."""
    shape, width = [2, 3, 2], 16
    strides = [6 * width, 2 * width, width]
    strides[apart] = (1 << 31) // (shape[apart] - 1) + 8
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    storage = promised(last + width, dtype=dtype)
    far = storage.as_strided((*shape, width), (*strides, 1))
    near = torch.randn(*shape, width).to(dtype)
    far.copy_(near)
    seen = []
    for x in (far, near):
        o, lse = native("attention_forward")(x, x, x, None, 0.0, None, None)
        seen.append([o, lse, *native("attention_backward")(o, x, x, x, o, lse, None, 0.0, None, None)])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


MUTANTS = {
    "csrc/cuda/dropout.cuh": [
        ("(static_cast<int64_t>(blockIdx.x) * 4 + k)", "static_cast<int>(blockIdx.x * 4 + k)"),
    ],
    "csrc/cuda/layer_norm.cuh": [
        (
            "const int64_t at = row * p.width;\n  const float mean =",
            "const int at = row * p.width;\n  const float mean =",
        ),
    ],
    "csrc/cuda/adamw.cuh": [
        (
            "const int64_t first = chunk.index * kAdamwChunk + place",
            "const int first = chunk.index * kAdamwChunk + place",
        ),
        (
            "const int64_t first = chunk.index * kAdamwChunk + (part",
            "const int first = chunk.index * kAdamwChunk + (part",
        ),
    ],
    "csrc/cuda/attention_tiles.cuh": [
        (
            "from + static_cast<int64_t>(first + own) * stride",
            "from + (first + own) * static_cast<int>(stride)",
        ),
    ],
}
