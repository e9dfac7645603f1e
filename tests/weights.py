"""Small models whose every parameter matters, and their logits in two libraries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastgpt import GPT, GPTConfig, checkpoint
from fastgpt.data import Tokenizer


def sharp(model: Any, scale: float = 0.1) -> Any:
    """The model with noise on every parameter, biases and LayerNorms too, so that each one matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)
    return model.eval()


def gpt(**changes: Any) -> GPT:
    """A fastgpt model that is not symmetric in anything."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=300, block_size=32, n_layer=2, n_head=5, n_embd=40)
    return sharp(GPT(dataclasses.replace(config, **changes)))


def save_run(folder: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """A run with one checkpoint of the model, as training leaves it."""
    state = {"step": 1, "val_loss": None}
    checkpoint.save(
        folder,
        config=model.config,
        tokenizer=tokenizer,
        state=state,
        model=model.state_dict(),
        training={"rng:cpu": torch.get_rng_state()},
    )
    return folder


def random_ids(vocab_size: int, length: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def assert_logits_agree(ours: GPT, theirs: Any) -> None:
    """Each within fp32 rounding: no further from the float64 logits than twice the other library is."""
    idx = random_ids(ours.config.vocab_size, ours.config.block_size)
    with torch.no_grad():
        logits, expected = ours(idx)[0], theirs(idx).logits
        oracle = theirs.double()(idx).logits
        theirs.float()
    assert oracle.std() > 0.2
    error, allowed = (logits - oracle).abs().max(), (expected - oracle).abs().max()
    assert error <= 2 * allowed + 1e-6, (error, allowed)
