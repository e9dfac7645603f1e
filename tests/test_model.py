"""The network: names, shapes, initial weights, padding, causality, gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gradients import assert_gradients
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import GPT, GPTConfig
from fastgpt.config import PRESETS
from fastgpt.errors import InputError

MUTANTS = {
    "fastgpt/model.py": [
        ("[..., : self.config.vocab_size]", ""),
        ("reduction=reduction, vocab_size=self.config.vocab_size", "reduction=reduction"),
        ("INIT_STD / math.sqrt(2 * self.config.n_layer)", "INIT_STD"),
        ("self.token_embedding if self.config.tied_head else self.lm_head.weight", "self.token_embedding"),
        ("total - positions - untied", "total - positions"),
    ],
}

TINY = GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32)


def tokens(config: GPTConfig, batch: int = 3, length: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.block_size), generator=generator)


def test_parameter_names_are_those_of_hugging_face_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=65, n_positions=16, n_layer=2, n_head=2, n_embd=32)
    )
    expected = {name for name, _ in theirs.named_parameters()} - {"lm_head.weight"}
    assert {name for name, _ in GPT(TINY).named_parameters()} == expected


@pytest.mark.parametrize(
    ("name", "parameters"),  # the sizes of the models that OpenAI released
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT(PRESETS[name].model)
    assert model.num_params() == parameters
    assert model.num_params(embeddings=False) == parameters - 1024 * model.config.n_embd


@pytest.mark.parametrize("vocab_size", [65, 50257])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_at_init_is_that_of_a_uniform_guess(vocab_size: int, activation: str, bias: bool) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, vocab_size=vocab_size, activation=activation, bias=bias, n_embd=128)
    x = tokens(config, batch=32)
    _, loss = GPT(config)(x, tokens(config, batch=32, seed=1))
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=0.05)


def test_initial_weights_are_gpt2s() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, n_embd=256, n_layer=8)
    for name, p in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("return_logits", [True, False])
def test_padded_rows_change_nothing_and_get_no_gradient(return_logits: bool, tied_head: bool) -> None:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, tied_head=tied_head))
    x, y = tokens(TINY), tokens(TINY, seed=1)
    before = model(x, y, return_logits=return_logits)
    with torch.no_grad():
        model.classifier[TINY.vocab_size :] = 100.0
    logits, loss = model(x, y, return_logits=return_logits)
    assert torch.equal(loss, before[1])
    if logits is not None:
        assert logits.shape == (3, 16, 65)
    loss.backward()
    padding = model.classifier.grad[TINY.vocab_size :]
    assert padding.shape == (63, 32)
    assert (padding == 0).all()


def test_loss_is_the_same_with_and_without_logits() -> None:
    model = GPT(TINY)
    x, y = tokens(TINY), tokens(TINY, seed=1)
    y[0, :5] = -100
    for reduction in ("mean", "sum", "none"):
        with_logits = model(x, y, reduction=reduction)[1]
        without = model(x, y, reduction=reduction, return_logits=False)[1]
        torch.testing.assert_close(with_logits, without)
    expected = torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    torch.testing.assert_close(model(x, y)[1], expected)


def test_tokens_see_only_the_past() -> None:
    model = GPT(TINY).eval()
    x = tokens(TINY)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % TINY.vocab_size
    before, after = model(x)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_the_whole_model_in_float64(activation: str, bias: bool) -> None:
    """Every parameter against central differences of the loss, in a random direction."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "tied_head": bias}
    config = GPTConfig(11, 6, activation=activation, bias=bias, **shape)
    model = GPT(config).double()
    with torch.no_grad():
        for p in model.parameters():  # initial weights are too small for each path to matter
            p.add_(torch.randn_like(p) * 0.3)
    x, y = tokens(config), tokens(config, seed=1)

    assert_gradients(model, lambda: model(x, y, return_logits=False)[1], rtol=1e-6, atol=1e-8)


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model = GPT(TINY)
    x = tokens(TINY, batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        _, loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_dropout_is_random_in_training_and_off_in_evaluation() -> None:
    model = GPT(dataclasses.replace(TINY, dropout=0.5))
    x = tokens(TINY)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("tied_head", [True, False])
def test_flops_per_token_agree_with_counted_matmuls(tied_head: bool) -> None:
    config = dataclasses.replace(TINY, vocab_size=128, n_embd=64, tied_head=tied_head)
    model = GPT(config)
    x = tokens(config, batch=1)
    with FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    by_operation = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in by_operation.items() if "addmm" in str(op) or str(op).endswith(".mm"))
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    # biases and LayerNorms are parameters that take part in no matmul: under 3% at this width
    assert (model.flops_per_token() - attention) * config.block_size == pytest.approx(matmuls, rel=0.03)


def test_crop_block_size() -> None:
    model = GPT(TINY).eval()
    x = tokens(TINY, length=8)
    before = model(x)[0]
    model.crop_block_size(8)
    assert model.config.block_size == 8
    assert torch.equal(model(x)[0], before)
    with pytest.raises(InputError, match="9 tokens do not fit in block_size = 8"):
        model(tokens(TINY, length=9))
    with pytest.raises(InputError, match="cannot be|not added|can be cut off"):
        model.crop_block_size(16)


def test_compiles_without_graph_breaks() -> None:
    model = GPT(dataclasses.replace(TINY, dropout=0.1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, y = tokens(TINY), tokens(TINY, seed=1)
    compiled(x, y, return_logits=False)[1].backward()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], model(x)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size = 0: it must be at least 1"),
        ({"n_head": 5}, "n_embd = 32: it must be a multiple of n_head = 5"),
        ({"dropout": 1.0}, "dropout = 1.0: it must be at least 0 and less than 1"),
        ({"activation": "swish"}, "activation = 'swish': it must be one of gelu_tanh, gelu_erf, relu"),
        ({"vocab_size": 0}, "vocab_size = 0: it must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **changes)
