"""Hugging Face's GPT-2 with fastgpt's operations inside: equal to what it was, and undone without a trace."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import Implementation

transformers = pytest.importorskip(
    "transformers", reason="transformers is an extra: pip install 'fastgpt[hf]'"
)

NAMES = ["layer_norm", "add_layer_norm", "linear_gelu", "causal_attention_qkvpacked", "cross_entropy"]
LAYERS = 2
# Before 5.0 blocks have another interface, and a mask is built where there is neither mask nor cache.
SINCE_5 = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(autouse=True)
def same_start() -> Any:
    torch.manual_seed(0)
    with ops.use():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operation was called."""
    counter: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(ops, name)

        def call(*args: Any, **options: Any) -> Any:
            counter[name] += 1
            return function(*args, **options)

        return call

    for name in NAMES:
        monkeypatch.setattr(ops, name, counting(name))
    return counter


def make(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config = {
        "vocab_size": 65,
        "n_positions": 48,
        "n_layer": LAYERS,
        "n_head": 2,
        "n_embd": 32,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "initializer_range": 0.2,  # far from 0: every part has its say in the logits
    }
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(config | changes)))
    return model.to(dtype).eval()


def tokens(batch: int = 3, length: int = 17) -> Tensor:
    return torch.randint(1, 65, (batch, length), generator=torch.Generator().manual_seed(1))


def run(model: Any, **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, loss and gradients, with some labels ignored."""
    idx = tokens()
    labels = idx.clone()
    labels[0, :4] = -100
    out = model(idx, labels=labels, use_cache=False, **options)
    return out.logits, out.loss, list(torch.autograd.grad(out.loss, list(model.parameters())))


def assert_equal(actual: Any, expected: Any) -> None:
    """Up to fp32 rounding: sums of some hundred terms, in another order."""
    for ours, theirs in zip(actual[2], expected[2], strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()
    torch.testing.assert_close(actual[0], expected[0], rtol=2e-6, atol=2e-6 * expected[0].abs().max().item())
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 40},
        {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
        {"n_head": 4, "layer_norm_epsilon": 1e-3},
    ],
    ids=str,
)
def test_equal_in_fp32(changes: dict[str, Any], calls: Counter[str]) -> None:
    model = make(**changes)
    expected = run(model)
    assert not calls
    fastgpt.patch_gpt2(model)
    assert_equal(run(model), expected)
    if SINCE_5:
        assert calls == {
            "layer_norm": LAYERS + 1,  # ln_1 of each block, and ln_f
            "add_layer_norm": LAYERS,
            "linear_gelu": LAYERS,
            "causal_attention_qkvpacked": LAYERS,
            "cross_entropy": 1,
        }


def test_bf16_is_within_twice_the_error_of_the_unpatched_model() -> None:
    model = make(dtype=torch.bfloat16)
    exact = run(copy.deepcopy(model).double())
    theirs = run(model)
    fastgpt.patch_gpt2(model)
    ours = run(model)
    for actual, unpatched, oracle in zip(
        [ours[0], ours[1], *ours[2]],
        [theirs[0], theirs[1], *theirs[2]],
        [exact[0], exact[1], *exact[2]],
        strict=True,
    ):
        for norm in (2, torch.inf):
            error = torch.linalg.vector_norm(actual.double() - oracle, norm)
            bound = 2 * torch.linalg.vector_norm(unpatched.double() - oracle, norm)
            assert error <= bound + torch.finfo(torch.bfloat16).eps * torch.linalg.vector_norm(oracle, norm)


def test_unpatch_leaves_no_trace() -> None:
    model = make()
    expected = run(model)
    before, attributes = (
        dict(model.state_dict(keep_vars=True)),
        {n: set(vars(m)) for n, m in model.named_modules()},
    )
    fastgpt.patch_gpt2(model)
    assert list(model.state_dict()) == list(before)
    assert all(model.state_dict(keep_vars=True)[name] is tensor for name, tensor in before.items())
    fastgpt.unpatch_gpt2(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    after = run(model)
    assert torch.equal(after[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(after[2], expected[2], strict=True))
    fastgpt.patch_gpt2(model)  # and again
    assert_equal(run(model), expected)


def test_copies_and_files_of_a_patched_model_are_patched(calls: Counter[str]) -> None:
    """The copy's modules run on the copy's parameters."""
    model = make()
    expected = run(model)
    fastgpt.patch_gpt2(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        calls.clear()
        assert_equal(run(other), expected)
        assert calls["linear_gelu"] == LAYERS
        fastgpt.unpatch_gpt2(other)


@pytest.mark.parametrize("padding", [None, "left", "right", "ones"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks(padding: str | None, implementation: str, calls: Counter[str]) -> None:
    """Attention with a padding mask is Hugging Face's; a mask of ones is none."""
    model = make(attn_implementation=implementation)
    mask = None
    if padding is not None:
        mask = torch.ones(3, 17, dtype=torch.long)
        mask[1, {"left": slice(0, 5), "right": slice(12, 17), "ones": slice(0, 0)}[padding]] = 0
    expected = run(model, attention_mask=mask)
    fastgpt.patch_gpt2(model)
    assert_equal(run(model, attention_mask=mask), expected)
    ours = implementation == "sdpa" and (padding == "ones" or (padding is None and SINCE_5))
    assert calls["causal_attention_qkvpacked"] == (LAYERS if ours else 0)
    assert calls["linear_gelu"] == LAYERS


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_is_the_same(padded: bool, implementation: str, calls: Counter[str]) -> None:
    """With Hugging Face's cache, without one, and for a batch with left padding."""
    model = make(attn_implementation=implementation)
    mask = torch.ones(3, 17, dtype=torch.long)
    if padded:
        mask[0, :9] = mask[2, :1] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(tokens(), **options)
    fastgpt.patch_gpt2(model)
    assert torch.equal(model.generate(tokens(), **options), expected)
    ours = implementation == "sdpa" and not padded
    assert calls["causal_attention_qkvpacked"] == (LAYERS if ours else 0)  # the prompt
    assert torch.equal(model.generate(tokens(), use_cache=False, **options), expected)
    static = model.generate(tokens(), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


def test_cache_holds_what_it_held() -> None:
    model = make()
    with torch.no_grad():
        expected = model(tokens(), use_cache=True)
        fastgpt.patch_gpt2(model)
        actual = model(tokens(), use_cache=True)
        torch.testing.assert_close(actual.logits, expected.logits)
        for ours, theirs in zip(actual.past_key_values, expected.past_key_values, strict=True):
            torch.testing.assert_close(ours[0], theirs[0])
            torch.testing.assert_close(ours[1], theirs[1])
        more = tokens(length=2)
        more_actual = model(more, past_key_values=actual.past_key_values).logits
        fastgpt.unpatch_gpt2(model)
        more_expected = model(more, past_key_values=expected.past_key_values).logits
    torch.testing.assert_close(more_actual, more_expected)


def test_outputs_on_request() -> None:
    model = make(attn_implementation="eager")
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    expected = model(tokens(), **options)
    fastgpt.patch_gpt2(model)
    actual = model(tokens(), **options)
    assert len(actual.attentions) == LAYERS
    assert len(actual.hidden_states) == LAYERS + 1
    for name in ("attentions", "hidden_states"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs)
    tuples = model(tokens(), labels=tokens(), return_dict=False)
    torch.testing.assert_close(tuples[1], actual.logits)


def test_dropout_is_active_in_training_only() -> None:
    for part in ("resid_pdrop", "attn_pdrop", "embd_pdrop"):
        model = make(**{part: 0.5})
        fastgpt.patch_gpt2(model)
        assert torch.equal(run(model)[0], run(model)[0])
        model.train()
        assert not torch.equal(run(model)[0], run(model)[0]), part
        torch.manual_seed(3)
        first = run(model)
        torch.manual_seed(3)
        assert torch.equal(run(model)[0], first[0])


def test_gradient_checkpointing(calls: Counter[str]) -> None:
    model = make()
    expected = run(model)
    fastgpt.patch_gpt2(model)
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls.clear()
        out = model(tokens(), labels=tokens(), use_cache=False)
        assert calls["linear_gelu"] == LAYERS
        model.zero_grad()
        out.loss.backward()
        assert calls["linear_gelu"] == 2 * LAYERS
    torch.testing.assert_close(out.logits, expected[0])


def test_loss_over_several_micro_batches_and_own_loss(calls: Counter[str]) -> None:
    model = make()
    options = {"labels": tokens(), "use_cache": False, "num_items_in_batch": torch.tensor(100)}
    expected = model(tokens(), **options).loss
    fastgpt.patch_gpt2(model)
    torch.testing.assert_close(model(tokens(), **options).loss, expected)
    assert calls["cross_entropy"] == 1
    fastgpt.unpatch_gpt2(model)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    fastgpt.patch_gpt2(model)
    assert torch.equal(model(tokens(), **options).loss, model(tokens()).logits.sum())
    fastgpt.unpatch_gpt2(model)
    assert torch.equal(model(tokens(), **options).loss, model(tokens()).logits.sum())


def test_what_does_not_fit_stays(calls: Counter[str]) -> None:
    """MLPs without GELU, a product that is not Conv1D's (LoRA), cross-attention."""
    model = make(activation_function="relu")
    expected = run(model)
    fastgpt.patch_gpt2(model)
    assert_equal(run(model), expected)
    assert calls["linear_gelu"] == 0

    model = make()
    expected = run(model)
    for block in model.transformer.h:
        conv, linear = block.mlp.c_fc, torch.nn.Linear(32, 128)
        linear.weight, linear.bias = torch.nn.Parameter(conv.weight.T.contiguous()), conv.bias
        block.mlp.c_fc = linear
    fastgpt.patch_gpt2(model)
    torch.testing.assert_close(model(tokens()).logits, expected[0])
    assert calls["linear_gelu"] == 0

    model = make(add_cross_attention=True)
    states = torch.randn(3, 5, 32)
    expected_logits = model(tokens(), encoder_hidden_states=states).logits
    fastgpt.patch_gpt2(model)
    torch.testing.assert_close(model(tokens(), encoder_hidden_states=states).logits, expected_logits)


def test_autocast() -> None:
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model)
        fastgpt.patch_gpt2(model)
        actual = run(model)
    assert actual[0].dtype == expected[0].dtype
    assert all(grad.dtype == torch.float32 for grad in actual[2])
    torch.testing.assert_close(actual[1], expected[1], rtol=2e-2, atol=0)


def test_embeddings_can_be_resized() -> None:
    model = make()
    fastgpt.patch_gpt2(model)
    model.resize_token_embeddings(80, mean_resizing=False)
    assert run(model)[0].shape == (3, 17, 80)


def runs_here(row: Implementation) -> bool:
    return row.missing(torch.device("cpu")) is None


def test_every_implementation() -> None:
    """Those the table holds for what the model calls: here in the interpreter, on a tiny model."""
    needed = {"layer_norm", "add_layer_norm", "linear_gelu", "attention", "cross_entropy"}
    names = {row.name for row in ops.table() if row.operation in needed and runs_here(row)} - {"eager"}
    model = make(n_embd=32, n_layer=1)
    expected = run(model)
    fastgpt.patch_gpt2(model)
    assert "triton" in names
    for name in names:
        with ops.use(name):
            assert_equal(run(model), expected)


def test_bad_input() -> None:
    model = make()
    with pytest.raises(InputError, match="model is not patched: there is nothing to undo"):
        fastgpt.unpatch_gpt2(model)
    fastgpt.patch_gpt2(model)
    with pytest.raises(InputError, match=r"model is patched already: call unpatch_gpt2\(model\)"):
        fastgpt.patch_gpt2(model)
    for other in (model.transformer, torch.nn.Linear(2, 2), None):
        for function in (fastgpt.patch_gpt2, fastgpt.unpatch_gpt2):
            with pytest.raises(
                InputError, match=f"model is a {type(other).__name__}: it must be a transformers"
            ):
                function(other)
    hooked = make()
    hooked.transformer.h[1].attn.forward = lambda *args: args
    with pytest.raises(InputError, match=r"model.transformer.h.1.attn has a forward of its own"):
        fastgpt.patch_gpt2(hooked)
    assert "forward" not in vars(hooked.transformer.h[0].mlp)  # nothing done by halves


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers: pip install 'fastgpt\[hf\]'"):
        fastgpt.patch_gpt2(torch.nn.Linear(2, 2))


MUTANTS = {
    "fastgpt/patch.py": [
        ("all(options.get(name) is None for name in absent)", "True"),
        ("cache.get_seq_length(self.layer_idx) == 0", "True"),
        ("cache.update(k, v, self.layer_idx)", "pass"),
        ("self.attn_dropout.p if self.training else 0.0", "0.0"),
        ('scale=getattr(self, "scaling", None)', "scale=None"),
        ("eps=ln.eps", "eps=1e-5"),
        ("value=ignore_index)[..., 1:]", "value=ignore_index)[..., :-1]"),
        ("        del module.forward", "        pass"),
        ("        del model._loss_function", "        pass"),
        ("self.gradient_checkpointing and self.training", "False"),
    ]
}
