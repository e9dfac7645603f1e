"""Settings from YAML and JSON: every field, the right types, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.config import PRESETS, GPTConfig, TrainConfig, config_fields, override, preset
from fastgpt.errors import InputError
from fastgpt.model import GPT


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_yaml(name: str) -> None:
    config = dataclasses.replace(preset(name), out_dir=Path("runs/x"), eval_tokens=None)
    saved = json.loads(config.to_json())
    assert override(TrainConfig(), saved, source="json") == config
    assert override(TrainConfig(), yaml.safe_load(yaml.safe_dump(saved)), source="yaml") == config


def test_model_fields_stand_flat_among_the_others() -> None:
    config = override(preset("char-cpu"), {"n_layer": 3, "dropout": 0.25, "seed": 7}, source="x.yaml")
    assert (config.model.n_layer, config.model.dropout, config.seed) == (3, 0.25, 7)
    assert config.model.n_head == preset("char-cpu").model.n_head


def test_fields_of_the_two_never_share_a_name() -> None:
    assert len(set(config_fields())) == len(config_fields())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"leaning_rate": 1}, "x.yaml: unknown field 'leaning_rate': did you mean 'learning_rate'"),
        ({"zzzz": 1}, "x.yaml: unknown field 'zzzz': the fields are corpus,"),
        ({"max_steps": "many"}, "x.yaml: max_steps = 'many': it must be of type int"),
        ({"max_steps": True}, "x.yaml: max_steps = True: it must be of type int"),
        ({"max_steps": 1.5}, "x.yaml: max_steps = 1.5: it must be of type int"),
        ({"learning_rate": "fast"}, "x.yaml: learning_rate = 'fast': it must be of type float"),
        ({"betas": 0.9}, "x.yaml: betas = 0.9: it must be a list of two numbers"),
        ({"corpus": None}, "x.yaml: corpus = None: it must be of type str"),
        ({"max_steps": 0}, "max_steps = 0: it must be at least 1"),
        ({"precision": "fp8"}, "precision = 'fp8': it must be one of auto, fp32, tf32, bf16, fp16"),
        ({"schedule": "step"}, "schedule = 'step': it must be one of"),
        ({"tokenizer": "bpe"}, "tokenizer = 'bpe': it must be one of char, byte, gpt2"),
        ({"block_size": 0}, "block_size = 0: it must be at least 1"),
        ({"n_embd": 130}, "n_embd = 130: it must be a multiple of n_head = 4"),
        ({"betas": [0.9, 1.0]}, "betas = .*each at least 0, less than 1"),
        ({"learning_rate": 0}, "learning_rate = 0: it must be greater than 0"),
        ({"val_fraction": 1.5}, "val_fraction = 1.5: it must be between 0 and 1"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(preset("char-cpu"), values, source="x.yaml")


def test_numbers_that_yaml_reads_as_text() -> None:
    values = yaml.safe_load("learning_rate: 1e-3\neps: 1.0e-8\nbetas: [0.9, 0.99]\ngrad_clip: 1")
    assert values["learning_rate"] == "1e-3"
    config = override(TrainConfig(), values, source="x.yaml")
    assert config.learning_rate == 1e-3
    assert config.grad_clip == 1


@given(st.integers(1, 10**6))
def test_padding_is_the_next_multiple(vocab_size: int) -> None:
    padded = GPTConfig(vocab_size=vocab_size).padded_vocab_size
    assert padded % 128 == 0
    assert 0 <= padded - vocab_size < 128


def test_unknown_presets_name_the_closest() -> None:
    with pytest.raises(InputError, match="unknown preset 'gpt2-larg': did you mean 'gpt2-large'"):
        preset("gpt2-larg")


@pytest.mark.parametrize(
    ("name", "millions", "learning_rate", "micro_batch_size"),
    [
        ("gpt2-124m", 124.4, 6e-4, 64),
        ("gpt2-350m", 354.8, 3e-4, 32),
        ("gpt2-774m", 774.0, 2.5e-4, 16),
        ("gpt2-1.5b", 1557.6, 2e-4, 8),
    ],
)
def test_reproduction_presets(
    name: str, millions: float, learning_rate: float, micro_batch_size: int
) -> None:
    """Their sizes (published: 124M, 355M, 774M, 1558M), GPT-3's settings, and 10B tokens in 2^19 a step."""
    config = preset(name)
    with torch.device("meta"):
        assert GPT(config.model).num_params() / 1e6 == pytest.approx(millions, abs=0.05)
    assert config.batch_size * config.model.block_size == 524_288
    assert config.max_steps * 524_288 == pytest.approx(10e9, rel=1e-4)
    assert (config.learning_rate, config.min_lr_fraction, config.warmup_steps) == (learning_rate, 0.1, 715)
    assert (config.schedule, config.weight_decay, config.betas, config.grad_clip) == (
        *("cosine", 0.1),
        *((0.9, 0.95), 1.0),
    )
    assert config.micro_batch_size == micro_batch_size
    for ranks in (1, 2, 4, 8):  # whole micro-batches on each
        assert config.batch_size % (ranks * micro_batch_size) == 0
