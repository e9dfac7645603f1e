"""Weights from elsewhere: the network of the library that wrote them, and errors for what is not GPT-2."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from weights import assert_logits_agree, random_ids, sharp

from fastgpt import GPT
from fastgpt.config import TrainConfig
from fastgpt.data import CharTokenizer, GPT2Tokenizer
from fastgpt.errors import InputError
from fastgpt.pretrained import model_from, read_pretrained, tokenizer_of
from fastgpt.train import train

MUTANTS = {
    "fastgpt/formats/hugging_face.py": [
        (
            ".contiguous() if name.endswith(_CONV1D)",
            ".contiguous() if name.endswith(_CONV1D) and tensor.size(0) != tensor.size(1)",
        ),
        ('"scale_attn_by_inverse_layer_idx": False,', ""),
        ('tied_head=settings.get("tie_word_embeddings", True)', "tied_head=True"),
    ],
    "fastgpt/formats/nanogpt.py": [('activation="gelu_erf"', 'activation="gelu_tanh"')],
    "fastgpt/formats/llmc.py": [("if path.stat().st_size != expected", "if path.stat().st_size > expected")],
}

SHAPES = {"gpt2": (12, 48), "gpt2-medium": (16, 64), "gpt2-large": (20, 80), "gpt2-xl": (25, 100)}


def save_hugging_face(
    folder: Path, *, vocab_size: int | None = None, shards: bool = False, **changes: Any
) -> Any:
    """A randomly initialised GPT-2 in Hugging Face's format, its vocabulary resized, in several files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_positions": 32, "n_layer": 2, "n_head": 5, "n_embd": 40}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(shape | ends | changes))).eval()
    if vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    sharp(model).save_pretrained(folder, max_shard_size="30KB" if shards else "5GB")
    return model


# -- Hugging Face --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_logits_agree_with_transformers_in_all_four_shapes(tmp_path: Path, name: str) -> None:
    n_head, n_embd = SHAPES[name]
    theirs = save_hugging_face(tmp_path, n_head=n_head, n_embd=n_embd)
    ours = GPT.from_pretrained(tmp_path)
    assert_logits_agree(ours, theirs)
    assert ours.num_params() == theirs.num_parameters()


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"tie_word_embeddings": False},
        {"vocab_size": 384},  # no padding
        {"vocab_size": 307},
        {"vocab_size": 307, "tie_word_embeddings": False},
        {"shards": True},
        {"shards": True, "vocab_size": 50258, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_logits_agree_with_transformers_in_its_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = save_hugging_face(tmp_path, **changes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == changes.get("shards", False)
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config.tied_head == changes.get("tie_word_embeddings", True)
    assert_logits_agree(ours, theirs)
    idx = random_ids(ours.config.vocab_size)
    with torch.no_grad():
        expected = theirs(idx, labels=idx).loss
        torch.testing.assert_close(ours(idx[:, :-1], idx[:, 1:])[1], expected, rtol=1e-5, atol=1e-5)
    assert ours.num_params() == theirs.num_parameters()


def test_openais_own_file_has_no_prefix_and_a_mask(tmp_path: Path) -> None:
    theirs = save_hugging_face(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors")
    assert_logits_agree(GPT.from_pretrained(tmp_path), theirs)


def test_reading_needs_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hugging_face(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it is an error now
    assert GPT.from_pretrained(tmp_path).config.n_head == 5


def test_a_shorter_context_and_another_dropout(tmp_path: Path) -> None:
    save_hugging_face(tmp_path)
    whole, short = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path, block_size=8, dropout=0.5)
    idx = random_ids(300, 8)
    assert torch.equal(short(idx)[0], whole(idx)[0])  # in evaluation mode there is no dropout
    assert not torch.equal(short.train()(idx)[0], whole(idx)[0])
    with pytest.raises(InputError, match="9 tokens do not fit in block_size = 8"):
        short(random_ids(300, 9))
    with pytest.raises(InputError, match="block_size = 32, but this run has block_size = 33"):
        GPT.from_pretrained(tmp_path, block_size=33)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 77),
        ("activation_function", "silu"),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_networks_that_are_not_gpt2_are_refused(tmp_path: Path, field: str, value: object) -> None:
    save_hugging_face(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=f"config.json: {field} = "):
        read_pretrained(str(tmp_path))


def test_a_head_that_contradicts_its_config_is_refused(tmp_path: Path) -> None:
    save_hugging_face(tmp_path, tie_word_embeddings=False)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(InputError, match="lm_head is not tied.* as config.json says"):
        read_pretrained(str(tmp_path))


def test_incomplete_and_damaged_folders_are_one_clear_error(tmp_path: Path) -> None:
    save_hugging_face(tmp_path, shards=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        GPT.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}.*incomplete"):
        GPT.from_pretrained(tmp_path)
    shard.write_bytes(content)
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, shard)
    with pytest.raises(InputError, match=f"lacks {gone}"):
        GPT.from_pretrained(tmp_path)


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
        GPT.from_pretrained("gpt2-xl")


def test_a_vocabulary_of_no_known_tokenizer_reads_no_text(tmp_path: Path) -> None:
    save_hugging_face(tmp_path)
    source = read_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="a vocabulary of 300 tokens, of a tokenizer that fastgpt does not"):
        tokenizer_of(source)


def test_finetuning_starts_from_the_weights(tmp_path: Path, tiny: Callable[..., TrainConfig]) -> None:
    save_hugging_face(tmp_path / "hf", vocab_size=50257, n_positions=16, n_head=2, n_embd=32)
    config = tiny(tokenizer="gpt2", init_from=str(tmp_path / "hf"), max_steps=1, learning_rate=1e-9)
    trainer = train(config)
    start = model_from(read_pretrained(str(tmp_path / "hf")))
    for name, p in trainer.model.state_dict().items():
        torch.testing.assert_close(p, start.state_dict()[name], rtol=0, atol=1e-6)
    assert trainer.data.tokenizer.name == "gpt2"


# -- nanoGPT -------------------------------------------------------------------------------------------------


def nanogpt_weights(vocab_size: int, width: int, *, bias: bool) -> dict[str, torch.Tensor]:
    """One layer under nanoGPT's names."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"wte": (vocab_size, width), "wpe": (16, width), "ln_f": (width,)}
    shapes |= {"h.0.ln_1": (width,), "h.0.ln_2": (width,), "h.0.attn.c_attn": (3 * width, width)}
    shapes |= {"h.0.attn.c_proj": (width, width), "h.0.mlp.c_fc": (4 * width, width)}
    shapes |= {"h.0.mlp.c_proj": (width, 4 * width)}
    weights = {}
    for name, shape in shapes.items():
        weights[f"transformer.{name}.weight"] = torch.randn(shape, generator=generator)
        if bias and name not in ("wte", "wpe"):
            weights[f"transformer.{name}.bias"] = torch.randn(shape[0], generator=generator)
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def nanogpt_logits(w: dict[str, torch.Tensor], idx: torch.Tensor, n_head: int) -> torch.Tensor:
    """What nanoGPT's network computes from them."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[f"transformer.{name}.weight"], w.get(f"transformer.{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = w[f"transformer.{name}.weight"], w.get(f"transformer.{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: idx.size(1)]
    qkv = linear(norm(x, "h.0.ln_1"), "h.0.attn.c_attn").chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (n_head, -1)).transpose(1, 2) for part in qkv)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    x = x + linear(y, "h.0.attn.c_proj")
    x = x + linear(F.gelu(linear(norm(x, "h.0.ln_2"), "h.0.mlp.c_fc")), "h.0.mlp.c_proj")
    return F.linear(norm(x, "ln_f"), w["lm_head.weight"])


def save_nanogpt(path: Path, vocab_size: int, *, bias: bool = False, compiled: bool = True) -> dict[str, Any]:
    weights = nanogpt_weights(vocab_size, 24, bias=bias)
    shape = {"n_layer": 1, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": vocab_size}
    path.parent.mkdir(exist_ok=True)
    saved = {
        "model": {("_orig_mod." if compiled else "") + name: tensor for name, tensor in weights.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": shape | {"bias": bias, "dropout": 0.1},
        "iter_num": 10,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "openwebtext", "compile": True},
    }
    torch.save(saved, path)
    return weights


@pytest.mark.parametrize(("bias", "compiled"), [(False, True), (True, False)])
def test_nanogpt_checkpoints(tmp_path: Path, bias: bool, compiled: bool) -> None:
    weights = save_nanogpt(tmp_path / "ckpt.pt", 65, bias=bias, compiled=compiled)
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert (ours.config.bias, ours.config.dropout, ours.config.vocab_size) == (bias, 0.1, 65)
    idx = random_ids(65, 16)
    expected = nanogpt_logits(weights, idx, n_head=3)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(idx)[0], expected, rtol=1e-4, atol=1e-4)


def test_nanogpts_rounded_vocabulary_is_gpt2s(tmp_path: Path) -> None:
    weights = save_nanogpt(tmp_path / "out" / "ckpt.pt", 50304)
    source = read_pretrained(str(tmp_path / "out"))  # the folder, as for a run
    assert isinstance(source.tokenizer, GPT2Tokenizer)
    idx = random_ids(50257, 16)
    logits = model_from(source)(idx)[0]
    assert logits.shape == (2, 16, 50257)
    torch.testing.assert_close(logits, nanogpt_logits(weights, idx, 3)[..., :50257], rtol=1e-4, atol=1e-4)


def test_nanogpts_characters_come_from_meta_pkl(tmp_path: Path) -> None:
    save_nanogpt(tmp_path / "ckpt.pt", 3)
    with pytest.raises(InputError, match="a vocabulary of 3 tokens"):
        tokenizer_of(read_pretrained(str(tmp_path)))
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(pickle.dumps({"vocab_size": 3, "stoi": {"\n": 0, "a": 1, "b": 2}}))
    assert read_pretrained(str(tmp_path)).tokenizer == CharTokenizer("\nab")
    meta.write_bytes(pickle.dumps({"stoi": {"b": 0, "a": 1, "\n": 2}}))
    with pytest.raises(InputError, match="not numbered in sorted order"):
        read_pretrained(str(tmp_path))


def test_an_incomplete_nanogpt_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_nanogpt(path, 3, compiled=False)
    saved = torch.load(path, weights_only=True)
    del saved["model"]["transformer.wte.weight"]
    torch.save(saved, tmp_path / "part.pt")
    with pytest.raises(InputError, match=r"part.pt lacks transformer.wte.weight \(1 such tensors\)"):
        GPT.from_pretrained(tmp_path / "part.pt")


class _RunsCode:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("was-run",)


def test_code_in_a_nanogpt_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "model_args": _RunsCode()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="evil.pt is not a checkpoint of nanoGPT"):
        read_pretrained("evil.pt")
    save_nanogpt(tmp_path / "ckpt.pt", 3)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": _RunsCode()}))
    with pytest.raises(InputError, match="meta.pkl"):
        read_pretrained("ckpt.pt")
    assert not (tmp_path / "was-run").exists()
    (tmp_path / "other.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="other.pt is not a checkpoint of nanoGPT"):
        read_pretrained("other.pt")


# -- llm.c ---------------------------------------------------------------------------------------------------


def save_llmc(path: Path, model: Any, dtype: torch.dtype) -> None:
    """transformers' GPT-2 as llm.c's train_gpt2.py writes it: every kind of tensor for all layers."""
    w, config = model.state_dict(), model.config
    rows = -(-config.vocab_size // 128) * 128
    version = {torch.float32: 3, torch.bfloat16: 5}[dtype]
    shape = (config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    content = [struct.pack("<256i", 20240326, version, *shape, rows, *[0] * 248)]

    def add(tensor: torch.Tensor) -> None:
        content.append(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())

    add(F.pad(w["transformer.wte.weight"], (0, 0, 0, rows - config.vocab_size)))
    add(w["transformer.wpe.weight"])
    for kind in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for part in ("weight", "bias"):
            for layer in range(config.n_layer):
                tensor = w[f"transformer.h.{layer}.{kind}.{part}"]
                add(tensor.t() if tensor.dim() == 2 else tensor)
    add(w["transformer.ln_f.weight"])
    add(w["transformer.ln_f.bias"])
    path.write_bytes(b"".join(content))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llmc_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = save_hugging_face(tmp_path / "hf")
    save_llmc(tmp_path / "model.bin", theirs, dtype)
    assert_logits_agree(GPT.from_pretrained(tmp_path / "model.bin"), theirs.to(dtype).float())


def test_damaged_llmc_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    save_llmc(path, save_hugging_face(tmp_path / "hf"), torch.float32)
    content = path.read_bytes()

    def message(changed: bytes) -> str:
        path.write_bytes(changed)
        with pytest.raises(InputError) as raised:
            read_pretrained(str(path))
        return str(raised.value)

    assert "cut short or damaged" in message(content[:-1])
    assert "cut short or damaged" in message(content + b"\0")
    assert "it must start with 20240326" in message(b"\0" + content)
    assert "it must start with 20240326" in message(content[:100])
    assert "has version 1: fastgpt reads 3 (fp32) and 5 (bf16)" in message(
        content[:4] + struct.pack("<i", 1) + content[8:]
    )
    assert "n_layer = 0" in message(content[:16] + struct.pack("<i", 0) + content[20:])
    assert "299 rows cannot hold a vocabulary of 300" in message(
        content[:28] + struct.pack("<i", 299) + content[32:]
    )
