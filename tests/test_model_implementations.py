"""The whole model on every implementation in the table: the same training, one graph for torch.compile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import cuda_emulator
import pytest
import torch
from ops.helpers import assert_accurate
from torch import Tensor

from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops import registry

cuda_emulator.register_rows()

STEPS = 20
# Two heads and layers, a vocabulary that is padded, and a context that is no multiple of a tile.
TINY = GPTConfig(vocab_size=65, block_size=12, n_layer=2, n_head=2, n_embd=32)
# Norms of queries and keys that are views, and attention on q, k and v that are not packed.
MODERN: dict[str, Any] = {"position": "rope", "norm": "rms_norm", "qk_norm": True, "activation": "swiglu"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = sorted({row.name for row in ops.table() if row.missing(DEVICE) is None})
implementations = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    if "emulated" in request.node.name:
        cuda_emulator.loaded()
    with ops.use():
        yield


def model(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(dataclasses.replace(TINY, dropout=dropout, **changes)).to(DEVICE, dtype)


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens to learn: each is the one before plus the sequence's stride. Some targets are ignored."""
    generator = torch.Generator().manual_seed(step)
    start, stride = torch.randint(65, (2, 2, 1), generator=generator)
    text = (start + stride * torch.arange(TINY.block_size + 1)) % 65
    x, y = text[:, :-1].clone(), text[:, 1:].clone()
    y[0, :2] = -100
    return x.to(DEVICE), y.to(DEVICE)


def train(gpt: GPT, steps: int = STEPS) -> Tensor:
    """The losses of steps that alternate between the loss with logits and the one that never holds them."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    torch.manual_seed(1)
    for step in range(steps):
        loss = gpt(*batch(step % 4), return_logits=step % 2 == 0)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double().cpu())
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["triton", "native", "emulated"])
def test_every_operation_has_a_kernel(name: str) -> None:
    """`use("triton")` leaves an operation without such a row at its old choice, unnoticed."""
    rows = {row.operation for row in ops.table() if row.name == name}
    # Products are cuBLAS's; a CUDA graph of decoding has Triton's attention or PyTorch's.
    without = {"linear"} if name == "triton" else {"decode_attention"}
    assert rows == {row.operation for row in ops.table() if row.name == "eager"} - without


@implementations
def test_same_losses(name: str) -> None:
    """As far from the float64 run as eager fp32 is, up to a factor of two; the floor is an ulp a step."""
    with ops.use("eager"):
        oracle, eager = train(model(dtype=torch.float64)), train(model())
    with ops.use(name):
        actual = train(model())
        again = train(model(), steps=3)
    assert torch.equal(actual[:3], again)
    assert_same_losses(actual, eager, oracle)


def assert_same_losses(actual: Tensor, eager: Tensor, oracle: Tensor) -> None:
    assert actual[-4:].mean() < actual[:4].mean() - 0.5
    for norm in (2, torch.inf):
        error, theirs, size = (
            torch.linalg.vector_norm(x, norm) for x in (actual - oracle, eager - oracle, oracle)
        )
        assert error <= 2 * theirs + STEPS * torch.finfo(torch.float32).eps * size


@implementations
@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
def test_same_gradients(name: str, changes: dict[str, Any]) -> None:
    """Loss and the gradient of every parameter, forward and backward on this implementation alone."""

    def everything(backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        gpt = model(dtype=dtype, **changes)
        with ops.use(backend):
            loss = gpt(*batch(), return_logits=False)[1]
            return [loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))]

    oracle, eager = everything("eager", torch.float64), everything("eager")
    for actual, theirs, exact in zip(everything(name), eager, oracle, strict=True):
        assert_accurate(actual, theirs, exact.cpu())


@implementations
def test_same_losses_with_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where eager and its oracle drop what kernels do; it repeats, and differs from no dropout."""
    with ops.use(name):
        actual = train(model(dropout=0.1))
        assert torch.equal(train(model(dropout=0.1), steps=3), actual[:3])
        assert train(model(), steps=1) != actual[:1]
    with ops.use("eager"):
        if name != "eager":
            drop_as("native" if "native" in NAMES else name, monkeypatch)
        oracle, eager = train(model(0.1, torch.float64)), train(model(0.1))
    assert_same_losses(actual, eager, oracle)


def drop_as(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `eager` the equations with the factors z of the kernels `name`: one seed drops the same in all."""

    def dropout_add(x: Tensor, residual: Tensor, *, p: float, training: bool = True) -> Tensor:
        ones = torch.ones_like(x, dtype=torch.float32)
        kept = ops.dropout_add(ones, torch.zeros_like(ones), p=p, backend=name) != 0
        return kept.to(x) / (1 - p) * x + residual

    def attention(qkv: Tensor, *_: None, dropout_p: float, **options: Any) -> Tensor:
        # Equal weights and one-hot values: o is z over the number of keys seen.
        batch, length, _, heads, width = qkv.shape
        equal = qkv.new_zeros(batch, length, heads, length, dtype=torch.float32)
        one_hot = torch.eye(length, device=qkv.device)[None, :, None].expand(equal.shape)
        kept = ops.causal_attention(equal, equal, one_hot, dropout_p=dropout_p, backend=name) > 0
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D)
        hidden = torch.ones(length, length, dtype=torch.bool, device=qkv.device).triu(1)
        weights = (q @ k.mT / math.sqrt(width)).masked_fill(hidden, -math.inf).softmax(-1)
        z = kept.transpose(1, 2).to(qkv) / (1 - dropout_p)  # (B, H, T, T)
        return (z * weights @ v).transpose(1, 2).contiguous()  # (B, T, H, D)

    for function in (dropout_add, attention):
        operation = function.__name__
        row = dataclasses.replace(registry._table[operation]["eager"], function=function)
        monkeypatch.setitem(registry._table[operation], "eager", row)


@pytest.mark.parametrize("return_logits", [True, False], ids=["logits", "loss-only"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@implementations
def test_one_graph(name: str, dropout: float, return_logits: bool) -> None:
    """fullgraph=True raises at a graph break; forward and backward give what they give uncompiled."""
    gpt = model(dropout)
    torch._dynamo.reset()
    with ops.use(name):
        compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager")
        results = []
        for call in (gpt, compiled):
            torch.manual_seed(2)
            loss = call(*batch(), return_logits=return_logits)[1]
            results.append([loss.detach(), *torch.autograd.grad(loss, list(gpt.parameters()))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
