"""What is special to attention with a length on the device: shares of a cache that is not full, one launch.

tests/ops/test_table.py has the accuracy, repeatability and strides that all operations share.
"""

from __future__ import annotations

from typing import Any

import fake_cuda
import pytest
import torch
from ops.attention_calls import Recorded
from ops.guard import guarded
from ops.helpers import assert_accurate
from torch import Tensor
from weights import sharp

from fastgpt import GPT, GPTConfig, ops
from fastgpt.errors import InputError
from fastgpt.generate import generate
from fastgpt.kernels import attention

device = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy, of rows past the query that are not stored

MUTANTS = {
    "kernels/attention.py": [
        ("Tk = tl.load(length_ptr).to(tl.int32)\n", "Tk = Tk\n"),
        ("Tk = tl.load(length_ptr).to(tl.int32)\n", "Tk = tl.load(length_ptr).to(tl.int32) - 1\n"),
        ("share = triton.cdiv(share, config.step) * config.step\n", "share = SPLIT_KEYS\n"),
    ],
    "fastgpt/ops/decode_attention.py": [
        ("k, v = (x.masked_fill(~seen[:, None], 0) for x in (k, v))", "pass"),
        ("attn_mask=seen[None], ", ""),
        ("torch.is_grad_enabled() and", "False and"),
    ],
}


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def number(value: int) -> Tensor:
    return torch.tensor([value], device=device)


def compare(q: Tensor, cache: Tensor, length: int, **options: Any) -> None:
    """Against attention to a cache of just that length; beyond it is NaN, and outputs are written whole."""
    short = cache[:, :, :length].clone()
    eager = ops.causal_attention(q, *short, **options, backend="eager")
    exact = [x.cpu().double() for x in (q, *short)]
    oracle = ops.causal_attention(*exact, **options, backend="eager")
    cache = cache.clone()
    cache[:, :, length:] = torch.nan
    for backend in ("eager", "triton"):
        with guarded() as guard:
            placed = (guard.place(x) for x in (q, *cache, number(length)))
            first = ops.decode_attention(*placed, **options, backend=backend)
        assert first.is_contiguous()
        assert_accurate(first, eager, oracle)
        again = ops.decode_attention(q, *cache, number(length), **options, backend=backend)
        assert torch.equal(first, again)


# In shares of 64 keys or more: within one, at its end, one key more; of the last all but one, and all.
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 319, 320])
def test_lengths(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT_KEYS", 64)
    compare(randn(1, 1, 1, 64), randn(2, 1, 320, 1, 64), length)


@pytest.mark.parametrize("length", [1, 200, 257])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (16, torch.float16),
        (20, torch.bfloat16),
        (80, torch.bfloat16),
        (64, torch.float32),
        (160, torch.float32),
    ],
    ids=str,
)
def test_widths_and_dtypes(width: int, dtype: torch.dtype, length: int) -> None:
    """A cache of 257 keys is a share of 256 and one of a single key."""
    compare(randn(1, 1, 1, width, dtype=dtype), randn(2, 1, 257, 1, width, dtype=dtype), length)


def test_heads_and_batches() -> None:
    compare(randn(3, 1, 5, 16), randn(2, 3, 40, 5, 16), 33)


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.25])
def test_scale(scale: float) -> None:
    compare(randn(1, 1, 1, 16), randn(2, 1, 20, 1, 16), 7, scale=scale)


def test_a_full_cache_is_attention_bit_for_bit() -> None:
    q, (k, v) = randn(2, 1, 2, 64), randn(2, 2, 300, 2, 64)
    expected = ops.causal_attention(q, k, v, backend="triton")
    assert torch.equal(ops.decode_attention(q, k, v, number(300), backend="triton"), expected)


def test_a_bad_query_spoils_itself_alone() -> None:
    q, (k, v) = randn(2, 1, 1, 16), randn(2, 2, 300, 1, 16)
    q[1] = torch.nan
    o = ops.decode_attention(q, k, v, number(5), backend="triton")
    assert o[0].isfinite().all()
    assert o[1].isnan().all()


@pytest.mark.skipif(device == "cuda", reason="looks into the interpreter")
@pytest.mark.parametrize(("length", "tiles"), [(1, 1), (64, 1), (65, 2), (130, 3), (320, 5)])
def test_shares_past_the_length_read_no_keys(
    length: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = attention.load_tile
    monkeypatch.setattr(attention, "SPLIT_KEYS", 64)
    monkeypatch.setattr(attention, "load_tile", lambda *args: (loads.append(args), load(*args))[1])
    q, (k, v) = randn(1, 1, 1, 64), randn(2, 1, 320, 1, 64)
    ops.decode_attention(q, k, v, number(length), backend="triton")
    shares = 3  # for the interpreter's two SMs four programs, of whole tiles: of 128 keys each
    assert len(loads) == shares + 2 * tiles  # a query for each share, a tile of k and one of v


def test_the_launch_does_not_depend_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it read: nothing around the kernels but allocations and views."""
    launched: list[Any] = []

    def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        numbers = [x for x in args if not isinstance(x, Tensor)]
        launched.append((kernel.__name__, grid, numbers, options))

    monkeypatch.setattr(attention, "launch", launch)
    q, (k, v) = randn(1, 1, 2, 64), randn(2, 1, 1024, 2, 64)
    with Recorded() as inside:
        for length in (1, 700):
            length_tensor = torch.full((1,), length, device=device)
            attention.decode_attention_forward(q, k, v, length_tensor, None)
    assert inside.names <= {"empty", "empty_like", "full", "detach"}
    assert launched[:2] == launched[2:]
    assert [name for name, *_ in launched[:2]] == ["_attention_forward", "_attention_combine"]


def test_a_model_decodes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a captured decode with the kernel is that of PyTorch without one."""
    config = GPTConfig(vocab_size=65, block_size=24, n_layer=2, n_head=2, n_embd=32)
    model = sharp(GPT(config), scale=0.3).to(device)
    prompt = torch.tensor([[3, 1, 4], [1, 5, 9]], device=device)
    plain = torch.stack(list(generate(model, prompt, 12, temperature=0, graph=False)), 1)
    if device == "cpu":
        fake_cuda.install(monkeypatch, "fastgpt.generate")
    with ops.use(decode_attention="triton"):
        graph = torch.stack(list(generate(model, prompt, 12, temperature=0)), 1)
    assert torch.equal(graph, plain)
    assert plain.unique().numel() > 3


def test_bad_input() -> None:
    q, (k, v) = randn(2, 1, 2, 16), randn(2, 2, 9, 2, 16)
    good = number(3)
    for arguments, message in [
        ((randn(2, 2, 2, 16), k, v, good), r"q has shape \(2, 2, 2, 16\): it must be \(2, 1, 2, 16\)"),
        ((q, k[:, :, :1], v, good), r"k has shape .* \(B, S, H, D\) for q"),
        ((q, k, v[:, :8], good), r"v has shape .* the shape of k"),
        ((q, k, v, good.float()), r"length is torch.float32 of shape \(1,\): it must be int32 or int64"),
        ((q, k, v, good.expand(2)), r"length is torch.int64 of shape \(2,\)"),
        ((q, k, v, good.to("meta")), "length is on meta: it must be on"),
        ((q, k.half(), v, good), r"k has dtype torch.float16: it must be torch.bfloat16"),
        ((q.clone().requires_grad_(), k, v, good), r"no gradient: call it under torch.no_grad"),
    ]:
        with pytest.raises(InputError, match=message):
            ops.decode_attention(*arguments, backend="triton")
