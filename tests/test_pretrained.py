"""Weights from Hugging Face folders: the same network, and errors for those that are not GPT-2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.config import TrainConfig
from fastgpt.errors import InputError
from fastgpt.pretrained import model_from, read_pretrained
from fastgpt.train import train

transformers = pytest.importorskip("transformers")


MUTANTS = {
    "fastgpt/pretrained.py": [
        (
            "if name.endswith(_CONV1D) else tensor",
            "if name.endswith(_CONV1D) and tensor.size(0) != tensor.size(1) else tensor",
        )
    ],
}


def save_hugging_face(folder: Path, *, sharp: bool = True, **changes: Any) -> Any:
    """A randomly initialised GPT-2 in Hugging Face's format; `sharp` weights make differences visible."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_positions": 32, "n_layer": 2, "n_head": 5, "n_embd": 40}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(shape | changes))).eval()
    if sharp:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_logits_and_loss_agree_with_transformers(tmp_path: Path, activation: str) -> None:
    theirs = save_hugging_face(tmp_path, activation_function=activation)
    ours = model_from(read_pretrained(str(tmp_path)))
    idx = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
        logits, _ = ours(idx)
        loss = ours(idx[:, :-1], idx[:, 1:])[1]
    assert expected.logits.std() > 0.5
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert ours.num_params() == theirs.num_parameters()


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "llama"), ("layer_norm_epsilon", 1e-6), ("n_inner", 77), ("activation_function", "silu")],
)
def test_networks_that_are_not_gpt2_are_refused(tmp_path: Path, field: str, value: object) -> None:
    save_hugging_face(tmp_path, sharp=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=f"config.json: {field} = "):
        read_pretrained(str(tmp_path))


def test_an_untied_head_is_refused(tmp_path: Path) -> None:
    save_hugging_face(tmp_path, tie_word_embeddings=False)
    with pytest.raises(InputError, match="lm_head is not tied"):
        read_pretrained(str(tmp_path))


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the folder of a run.* or one of gpt2, gpt2-medium"):
        read_pretrained("gpt3")
    with pytest.raises(InputError, match="no complete checkpoint"):
        read_pretrained(str(tmp_path))


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="could not download gpt2-xl.*no route to host"):
        read_pretrained("gpt2-xl")


def test_finetuning_starts_from_the_weights(tmp_path: Path, tiny: Callable[..., TrainConfig]) -> None:
    save_hugging_face(tmp_path / "hf", vocab_size=50257, n_positions=16, n_head=2, n_embd=32)
    config = tiny(tokenizer="gpt2", init_from=str(tmp_path / "hf"), max_steps=1, learning_rate=1e-9)
    trainer = train(config)
    start = model_from(read_pretrained(str(tmp_path / "hf")))
    for name, p in trainer.model.state_dict().items():
        torch.testing.assert_close(p, start.state_dict()[name], rtol=0, atol=1e-6)
    assert trainer.data.tokenizer.name == "gpt2"
