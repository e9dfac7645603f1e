"""What GPTConfig can put in the place of GPT-2's parts: each option alone, and all of them together."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from gradients import assert_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from weights import sharp

from fastgpt import GPT, GPTConfig
from fastgpt.config import PRESETS
from fastgpt.errors import InputError
from fastgpt.generate import generate
from fastgpt.model import KVCache, StaticCache
from fastgpt.rotary import BASE, Rotation

MUTANTS = {
    "fastgpt/rotary.py": [
        ("first * self.cos - second * self.sin", "first * self.cos + second * self.sin"),
        ("BASE ** (-channels / head_size)", "BASE ** (-channels / 2 / head_size)"),
        ("positions = start + torch.arange", "positions = torch.arange"),
        (".to(x.dtype)\n", "\n"),
        ("torch.promote_types(like.dtype, torch.float32)", "like.dtype"),
    ],
    "fastgpt/model.py": [
        ("q, k = rotation(q), rotation(k)", "q, k = rotation(q), k"),
        ("q, k = self.q_norm(q), self.k_norm(k)", "q, k = self.q_norm(q), self.q_norm(k)"),
        (
            "F.silu(_linear(self.c_gate, x)) * _linear(self.c_fc, x)",
            "_linear(self.c_gate, x) * F.silu(_linear(self.c_fc, x))",
        ),
        ("h = F.relu(_linear(self.c_fc, x)).square()", "h = F.relu(_linear(self.c_fc, x))"),
        ("else branch + x\n", "else x\n"),
        ("self.weight.to(x.dtype)", "self.weight"),
        ("x = ops.dropout_add(branch, x, p=dropout) if dropout else", "x ="),
        ('if config.position == "learned" else 0\n', "\n"),
    ],
    "fastgpt/config.py": [("8 * self.n_embd / 3", "4 * self.n_embd")],
}

ALL: dict[str, Any] = {
    "position": "rope",
    "norm": "rms_norm",
    "qk_norm": True,
    "bias": False,
    "tied_head": False,
}
OPTIONS: list[dict[str, Any]] = [
    {"position": "rope"},
    {"norm": "rms_norm"},
    {"qk_norm": True},
    {"activation": "relu2"},
    {"activation": "swiglu"},
    ALL | {"activation": "relu2"},
    ALL | {"activation": "swiglu"},
]
options = pytest.mark.parametrize(
    "changes", OPTIONS, ids=lambda changes: "all-" * (len(changes) > 1) + str([*changes.values()][-1])
)
SMALL = GPTConfig(vocab_size=65, block_size=12, n_layer=2, n_head=2, n_embd=24)


def model_with(changes: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> GPT:
    """Every parameter matters: gains are not 1, and attention is not flat."""
    torch.manual_seed(0)
    return sharp(GPT(dataclasses.replace(SMALL, **changes, **more)), scale=0.3).to(dtype)


def tokens(length: int = 12, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, (batch, length), generator=generator)


# -- against another way to write it -------------------------------------------------------------------------


def oracle(model: GPT, idx: Tensor) -> Tensor:
    """The logits in float64: weights by name, attention by its matrix, RoPE by complex numbers."""
    w, c = model.state_dict(), model.config
    T, D = idx.size(1), c.head_size

    def norm(x: Tensor, name: str) -> Tensor:
        if c.norm == "rms_norm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"))

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if c.bias else y

    def turned(x: Tensor) -> Tensor:
        """x (B, H, T, D): multiplied by e^(i t theta)."""
        theta = BASE ** (-torch.arange(D // 2, dtype=torch.float64) * 2 / D)
        turn = torch.exp(1j * torch.arange(T, dtype=torch.float64)[:, None] * theta)
        z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    x = w["transformer.wte.weight"][idx]
    if c.position == "learned":
        x = x + w["transformer.wpe.weight"][:T]
    for layer in range(c.n_layer):
        at = f"transformer.h.{layer}"
        h = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn")
        q, k, v = (part.unflatten(-1, (c.n_head, D)).transpose(1, 2) for part in h.chunk(3, -1))
        if c.qk_norm:
            q, k = (
                part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{at}.attn.{name}.weight"]
                for part, name in ((q, "q_norm"), (k, "k_norm"))
            )
        if c.position == "rope":
            q, k = turned(q), turned(k)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = (q @ k.mT / math.sqrt(D)).masked_fill(hidden, -math.inf).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{at}.attn.c_proj")
        h = norm(x, f"{at}.ln_2")
        up = linear(h, f"{at}.mlp.c_fc")
        if c.activation == "swiglu":
            gate = linear(h, f"{at}.mlp.c_gate")
            up = gate * torch.sigmoid(gate) * up
        elif c.activation == "relu2":
            up = up.clamp(min=0) ** 2
        else:
            up = F.gelu(up, approximate="tanh")
        x = x + linear(up, f"{at}.mlp.c_proj")
    head = w["transformer.wte.weight"] if c.tied_head else w["lm_head.weight"]
    return norm(x, "transformer.ln_f") @ head[: c.vocab_size].T


@options
def test_logits_are_those_of_another_way_to_write_it(changes: dict[str, Any]) -> None:
    model, idx = model_with(changes), tokens()
    torch.testing.assert_close(model(idx)[0], oracle(model, idx), rtol=1e-10, atol=1e-10)


@options
def test_gradients_in_float64(changes: dict[str, Any]) -> None:
    """Every parameter against central differences of the loss, in a random direction."""
    model, x, y = model_with(changes), tokens(), tokens(seed=1)
    assert_gradients(model, lambda: model(x, y, return_logits=False)[1], rtol=1e-5, atol=1e-7)


def test_scores_of_turned_vectors_depend_on_their_distance_alone() -> None:
    """And a turn changes no length."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 40, 1, 16)
    near, far = Rotation(0, 40, 16, like=q), Rotation(500, 40, 16, like=q)
    scores = near(q).squeeze() @ near(k).squeeze().T
    torch.testing.assert_close(far(q).squeeze() @ far(k).squeeze().T, scores)
    for distance in range(-39, 40):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert scores.diagonal(-3)[0] != pytest.approx(scores.diagonal(3)[0].item())
    torch.testing.assert_close(far(q).norm(dim=-1), q.norm(dim=-1))


def test_rotations_are_computed_in_fp32_for_bf16_ones() -> None:
    """Angles rounded to bf16 would confuse positions that follow each other."""
    x = torch.randn(1, 2, 3, 16).bfloat16()
    rotation = Rotation(1000, 2, 16, like=x)
    assert rotation.cos.dtype == rotation.sin.dtype == torch.float32
    assert rotation(x).dtype == torch.bfloat16
    exact = Rotation(1000, 2, 16, like=x.double())(x.double())
    torch.testing.assert_close(rotation(x).double(), exact, rtol=2**-8, atol=2**-8)


# -- every way to run it -------------------------------------------------------------------------------------


@options
def test_a_cache_changes_nothing(changes: dict[str, Any]) -> None:
    """Tokens in pieces of several lengths: logits are those of all at once; text too, past the block size."""
    model, idx = model_with(changes), tokens()
    cache = KVCache(model.config, 2, device=idx.device, dtype=torch.float64)
    with torch.no_grad():
        pieces = [model.logits(model.hidden(piece, cache)) for piece in idx.split([5, 1, 4, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx)[0])
    written = [
        torch.stack(list(generate(model, idx[:, :3], 20, temperature=0, use_cache=use)), 1)
        for use in (True, False)
    ]
    assert torch.equal(*written)
    assert written[0].unique().numel() > 3


@options
def test_decoding_from_the_device_changes_nothing(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token at a time into what a cache has already, to its last place; text in fp32 as a CUDA graph."""
    model, idx = model_with(changes), tokens()
    cache = KVCache(model.config, 2, device=idx.device, dtype=torch.float64)
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
    with torch.no_grad():
        model.hidden(idx[:, :5], cache)
        static = StaticCache(cache)
        for _ in range(2):
            steps = [model.decode(token, static) for token in idx[:, 5:].unbind(1)]
            torch.testing.assert_close(torch.stack(steps, 1), model(idx)[0][:, 5:])
            static.seek(5)
    model.float()
    plain = torch.stack(list(generate(model, idx[:, :3], 20, temperature=0)), 1)
    fake = fake_cuda.install(monkeypatch, "fastgpt.generate")
    graph = torch.stack(list(generate(model, idx[:, :3], 20, temperature=0)), 1)
    assert torch.equal(graph, plain)
    assert graph.unique().numel() > 3
    assert fake.log.count("replay") == 6


@options
def test_recomputing_blocks_changes_nothing(changes: dict[str, Any]) -> None:
    """With dropout, whose random numbers are drawn again."""
    gradients = []
    for what in ("none", "block"):
        model = model_with(changes, torch.float32, dropout=0.2).train()
        model.recompute(what)
        torch.manual_seed(1)
        model(tokens(), tokens(seed=1), return_logits=False)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)


@options
def test_dropout_drops_from_the_branch_alone(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    norm = model_with(changes, torch.float32).transformer.h[1].ln_1
    branch, x = torch.ones(2, 4, 24), torch.full((2, 4, 24), 4.0)
    for p, sums in ((0.5, {4.0, 6.0}), (0.0, {5.0})):
        normed, summed = norm.add(branch, x, p)
        assert set(summed.unique().tolist()) == sums
        assert torch.equal(normed, norm(summed))


def test_compiled_in_one_graph_it_computes_the_same() -> None:
    """With all options, of which MLPs alone differ: a layer of each."""
    x, y = tokens(), tokens(seed=1)
    results = []
    for compiled in (False, True):
        model = model_with(OPTIONS[-1]).train()
        model.transformer.h[1].mlp = model_with(OPTIONS[-2]).transformer.h[1].mlp
        network = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss = network(x, y, return_logits=False)[1]
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_autocast_needs_no_slow_path() -> None:
    """In eager PyTorch a norm of bf16 queries with an fp32 gain is several operations, and a warning."""
    model = model_with(OPTIONS[-1], torch.float32).train()
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
            warnings.simplefilter("error")
            _, loss = model(tokens(), tokens(seed=1), return_logits=False)
    finally:
        torch.set_warn_always(always)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    exact = model.double()(tokens(), tokens(seed=1))[1]
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


# -- sizes ---------------------------------------------------------------------------------------------------


@options
def test_flops_per_token_agree_with_counted_matmuls(changes: dict[str, Any]) -> None:
    config = GPTConfig(vocab_size=128, block_size=16, n_layer=2, n_head=2, n_embd=96)
    config = dataclasses.replace(config, **changes)
    model, x = GPT(config), tokens(16, batch=1)
    with FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    by_operation = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in by_operation.items() if "addmm" in str(op) or str(op).endswith(".mm"))
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    # biases and norms are parameters that take part in no matmul
    assert (model.flops_per_token() - attention) * config.block_size == pytest.approx(matmuls, rel=0.02)


def test_a_rotary_model_has_no_position_embedding_and_can_be_cropped() -> None:
    model, idx = model_with({"position": "rope"}), tokens(8)
    assert not any("wpe" in name for name, _ in model.named_parameters())
    learned = GPT(SMALL).num_params()
    assert model.num_params() == learned - SMALL.block_size * SMALL.n_embd
    assert model.num_params(embeddings=False) == model.num_params()  # none that only looks rows up
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(InputError, match="9 tokens do not fit in block_size = 8"):
        model(tokens(9))
    with pytest.raises(InputError, match="block_size 12 is longer than the model's 8"):
        model.crop_block_size(12)


def test_swiglu_has_as_many_parameters_as_gelu_where_multiples_allow() -> None:
    gelu, swiglu = (GPTConfig(activation=name) for name in ("gelu_tanh", "swiglu"))
    assert (gelu.mlp_size, swiglu.mlp_size) == (3072, 2048)
    assert 2 * gelu.mlp_size == 3 * swiglu.mlp_size
    assert GPTConfig(n_embd=128, n_head=4, activation="swiglu").mlp_size == 384  # 341.3, rounded up


def test_the_modern_presets_are_gpt2s_with_all_options() -> None:
    for name, of in (("modern", "gpt2-124m"), ("modern-cpu", "char-cpu")):
        modern, base = PRESETS[name], PRESETS[of]
        assert modern.model == dataclasses.replace(base.model, **ALL, activation="relu2")
        rate = modern.muon_learning_rate
        assert modern == dataclasses.replace(
            base, model=modern.model, optimizer="muon", muon_learning_rate=rate
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "alibi"}, "position = 'alibi': it must be one of learned, rope"),
        ({"norm": "batch_norm"}, "norm = 'batch_norm': it must be one of layer_norm, rms_norm"),
        ({"position": "rope", "n_head": 8}, "n_embd / n_head = 3: it must be even with rope"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **changes)
