"""What `fastgpt export` writes: transformers loads it, and reading it back gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import assert_logits_agree, gpt, random_ids, save_run

from fastgpt import GPT
from fastgpt.cli import main
from fastgpt.data import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from fastgpt.generate import generate
from fastgpt.pretrained import read_pretrained

MUTANTS = {
    "fastgpt/formats/hugging_face.py": [
        ("return tensor[: config.vocab_size]", "return tensor"),
        ('"tie_word_embeddings": config.tied_head,', ""),
        ("names[config.activation]", '"gelu_new"'),
    ],
    "fastgpt/formats/weights.py": [
        ("weight.new_zeros(weight.size(0))", "weight.new_ones(weight.size(0))"),
        ("weights[name][: config.vocab_size]", "weights[name]"),
    ],
    "fastgpt/formats/llmc.py": [
        (
            "for name, shape in block.items()\n            for i in range(config.n_layer)",
            "for i in range(config.n_layer)\n            for name, shape in block.items()",
            "tests/test_pretrained.py",
        ),
    ],
    "fastgpt/formats/hf_tokenizer.py": [
        ('"add_prefix_space": False, "trim_offsets"', '"add_prefix_space": True, "trim_offsets"'),
    ],
}

CHARS = CharTokenizer("\n .abcdé€")


def export(run: Path, out: Path, *options: str) -> Path:
    assert main(["export", str(run), "--out", str(out), *options]) == 0
    return out


def load(folder: Path) -> Any:
    """transformers' model of the folder, which it must load without a complaint."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_head": 25, "n_embd": 100},
    {"tied_head": False},
    {"bias": False},
    {"activation": "gelu_erf"},
    {"activation": "relu", "dropout": 0.1},
    {"activation": "relu2", "bias": False},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_transformers_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = gpt(vocab_size=CHARS.vocab_size, **changes)
    theirs = load(export(save_run(tmp_path / "run", model, CHARS), tmp_path / "hf", "--to", "hf"))
    assert_logits_agree(model, theirs)
    assert theirs.get_input_embeddings().weight.shape == (CHARS.vocab_size, model.config.n_embd)
    assert theirs.config.attn_pdrop == theirs.config.resid_pdrop == model.config.dropout


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    model = gpt(vocab_size=50257)
    folder = export(save_run(tmp_path / "run", model, GPT2Tokenizer()), tmp_path / "hf", "--to", "hf")
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Hello, I'm a language model,", return_tensors="pt").input_ids
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False)
    ours = torch.stack(list(generate(model, prompt, 20, temperature=0)), dim=1)
    assert ours[0].tolist() == expected[0, prompt.size(1) :].tolist()
    assert ours.unique().numel() > 3
    assert theirs.generation_config.eos_token_id == theirs.config.bos_token_id == 50256


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (GPT2Tokenizer(), " Hello  world's é€\n\n<|endoftext|>tail "),
        (CHARS, " ab c\n  dé€. .a\n"),
        (ByteTokenizer(), "ab  é€ don't 1234\n\n\x00."),
    ],
    ids=["gpt2", "char", "byte"],
)
def test_tokenizers_agree_with_transformers(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = gpt(vocab_size=tokenizer.vocab_size, n_head=2, n_embd=4)
    folder = export(save_run(tmp_path / "run", model, tokenizer), tmp_path / "hf", "--to", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs(text)["input_ids"]
    assert ids == tokenizer.encode(text, allow_special=True).tolist()
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eot
    assert theirs.model_max_length == 32
    assert read_pretrained(str(folder)).tokenizer == tokenizer


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("to", "changes"),
    [
        ("hf", {}),
        ("hf", {"tied_head": False, "activation": "gelu_erf"}),
        ("hf", {"vocab_size": 50257, "n_head": 2, "n_embd": 4}),
        ("llmc", {}),
        ("llmc", {"vocab_size": 50257, "n_head": 2, "n_embd": 4}),
    ],
    ids=str,
)
def test_round_trips_are_bit_exact(tmp_path: Path, to: str, changes: dict[str, Any], dtype: str) -> None:
    model = gpt(**changes)
    vocab_size = model.config.vocab_size
    tokenizer = (
        GPT2Tokenizer() if vocab_size == 50257 else CharTokenizer("".join(map(chr, range(vocab_size))))
    )
    options = ("--to", to, "--dtype", dtype)
    first = export(save_run(tmp_path / "run", model, tokenizer), tmp_path / "first", *options)
    written = first / "model.bin" if to == "llmc" else first
    source = read_pretrained(str(written))
    assert source.config == model.config
    assert source.model.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        read = source.model[name]
        assert read.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        if name in ("transformer.wte.weight", "lm_head.weight"):
            assert not read[vocab_size:].any()  # nothing is kept in the padding, which was not zero
            read, weight = read[:vocab_size], weight[:vocab_size]
        assert torch.equal(read, weight.to(read.dtype)), name
    again = export(written, tmp_path / "again", *options)
    for path in again.iterdir():
        assert path.read_bytes() == (first / path.name).read_bytes(), path.name


def test_missing_biases_are_written_as_zeros(tmp_path: Path) -> None:
    model = gpt(vocab_size=CHARS.vocab_size, bias=False)
    run = save_run(tmp_path / "run", model, CHARS)
    idx = random_ids(CHARS.vocab_size)
    for to in ("hf", "llmc"):
        out = export(run, tmp_path / to, "--to", to)
        with_biases = GPT.from_pretrained(out / "model.bin" if to == "llmc" else out)
        assert with_biases.config.bias
        torch.testing.assert_close(with_biases(idx)[0], model(idx)[0])


def test_what_cannot_be_exported_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: Path, *options: str) -> str:
        assert main(["export", str(run), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    run = save_run(tmp_path / "run", gpt(vocab_size=8, activation="gelu_erf"), CHARS)
    assert f"{tmp_path} exists" in fails(run, "--to", "hf", "--out", str(tmp_path))
    out = str(tmp_path / "out")
    assert "activation = gelu_erf, and llm.c's only activation = gelu_tanh: --to hf" in fails(
        run, "--to", "llmc", "--out", out
    )
    untied = save_run(tmp_path / "untied", gpt(vocab_size=8, tied_head=False), CHARS)
    assert "tied_head = False, and llm.c's only tied_head = True" in fails(
        untied, "--to", "llmc", "--out", out
    )
    changes = {"position": "rope", "norm": "rms_norm", "qk_norm": True, "activation": "swiglu"}
    modern = save_run(tmp_path / "modern", gpt(vocab_size=8, **changes), CHARS)
    for to in ("hf", "llmc"):
        message = fails(modern, "--to", to, "--out", out)
        assert "position = rope, norm = rms_norm, qk_norm = True, activation = swiglu, and" in message
    export(save_run(tmp_path / "tied", gpt(vocab_size=8), CHARS), tmp_path / "llmc", "--to", "llmc")
    message = fails(tmp_path / "llmc" / "model.bin", "--to", "hf", "--out", out)
    assert "a vocabulary of 8 tokens, of a tokenizer that fastgpt does not have" in message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_configuration_is_that_of_the_hub(tmp_path: Path) -> None:
    model = gpt(vocab_size=50257, n_head=2, n_embd=4)
    out = export(save_run(tmp_path / "run", model, GPT2Tokenizer()), tmp_path / "hf", "--to", "hf")
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("vocab.json", "merges.txt", "tokenizer_config.json"),
    }
    config = json.loads((out / "config.json").read_text())
    hub = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
    hub |= {"layer_norm_epsilon": 1e-5, "vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256}
    assert hub.items() <= config.items()
