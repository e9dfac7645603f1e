"""The lecture's ladder: each rung is what it says, and they come in the lecture's order."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig, ladder
from fastgpt.cli import main
from fastgpt.data import CharTokenizer, GPT2Tokenizer, TokenDataset, prepared
from fastgpt.data.corpora import SHAKESPEARE_SHA256
from fastgpt.errors import InputError
from fastgpt.ladder import LECTURE, REDUCED, RUNGS, Settings
from fastgpt.ladder_command import LadderArgs, Trained, climb, heads_of_both_kinds, outputs_and_gradients

MUTANTS = {
    "fastgpt/ladder.py": [
        ("x[b, : t + 1].mean(0)", "x[b, :t].mean(0)"),
        ("wei = wei / wei.sum(1, keepdim=True)", "wei = wei / wei.sum(0, keepdim=True)"),
        ("device=scores.device).tril()", "device=scores.device).tril(1)"),
        ("x = self.token_embedding_table(idx) + self", "x = 0 * self.token_embedding_table(idx) + self"),
        ("return windows[:, :-1], windows[:, 1:]", "return windows[:, :-1], windows[:, :-1]"),
        ("torch.randint(len(tokens) - T,", "torch.randint(len(tokens) - T - 1,"),
        ("torch.randint(len(tokens) - T,", "torch.randint(len(tokens) - T + 1,"),
        ("idx[:, -self.block_size :]", "idx"),
        ("torch.multinomial(logits.softmax(-1), num_samples=1)", "logits.argmax(-1, keepdim=True)"),
        ("    model.eval()\n", ""),
        ("    model.train()\n", ""),
        ("return self.dropout(wei) @ v", "return wei @ v"),
        ("return self.dropout(self.proj(super().forward(x)))", "return self.dropout(super().forward(x))"),
        ("        x = x + self.sa(x)\n", "        x = self.sa(x)\n"),
        ("        x = x + self.sa(self.ln1(x))\n", "        x = x + self.sa(x)\n"),
        ("body = nn.Sequential(*blocks, nn.LayerNorm(settings.n_embd))", "body = nn.Sequential(*blocks)"),
        (".view(B, T, 3, self.n_head, C // self.n_head)", ".view(B, T, 3, C // self.n_head, self.n_head).mT"),
        (".transpose(1, 2).reshape(B, T, C)", ".reshape(B, T, C)"),
        ('for name in ("query", "key", "value") for head', 'for name in ("key", "query", "value") for head'),
        ("if len(tokens) <= block_size:", "if len(tokens) < block_size:"),
        ("if tokens.max() >= vocab_size:", "if tokens.max() > vocab_size:"),
    ],
}

TRAINED = [name for name, rung in RUNGS.items() if rung.model is not None]
CPU = torch.device("cpu")
V = 65  # of tiny Shakespeare
# The body of each rung is the same at every size: small ones are enough for what is not about losses.
SMALL = Settings(block_size=8, batch_size=4, n_embd=16, n_head=4, n_layer=2)


def network(name: str, settings: Settings | None = None, vocab_size: int = V) -> ladder.LanguageModel:
    make = RUNGS[name].model
    assert make is not None
    torch.manual_seed(0)
    return make(vocab_size, RUNGS[name].settings if settings is None else settings)


@pytest.fixture(scope="module")
def dataset(text_file: Path) -> TokenDataset:
    return TokenDataset.open(prepared(text_file, "char"))


# -- the rungs -----------------------------------------------------------------------------------------------


def test_averages_are_equal_and_are_those_of_the_past() -> None:
    x = torch.randn(4, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x.cumsum(1) / torch.arange(1, 9)[:, None]  # (B, T, C)
    ways = (ladder.average_by_loops, ladder.average_by_matrix_product, ladder.average_by_softmax)
    for way in ways:
        torch.testing.assert_close(way(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TRAINED)
def test_the_future_is_not_seen_and_the_past_is(name: str) -> None:
    model = network(name, SMALL).eval()
    idx = torch.randint(V, (2, 8), generator=torch.Generator().manual_seed(1))
    before, _ = model(idx)
    assert before.shape == (2, 8, V)
    for t in range(8):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % V
        changed = (model(other)[0] != before).any(-1).any(0)  # (T,)
        assert not changed[:t].any()
        assert changed[t]
        assert changed[t + 1 :].all() if name != "bigram" else not changed[t + 1 :].any()


def test_parameters() -> None:
    C, T, H = 32, 8, 4
    embeddings, head = V * C + T * C, C * V + V
    separate = 3 * C * C  # query, key and value of one head, or of four of a fourth of its size
    thin, wide, norm = C * C + C, 8 * C * C + 5 * C, 2 * C
    projection = C * C + C
    expected = {
        "bigram": V * V,
        "attention": embeddings + separate + head,
        "multi-head": embeddings + separate + head,
        "feed-forward": embeddings + separate + thin + head,
        "blocks": embeddings + 3 * (separate + thin) + head,
        "residual": embeddings + 3 * (separate + projection + wide) + head,
        "layer-norm": embeddings + 3 * (separate + projection + wide + 2 * norm) + norm + head,
        "scaled": 10_788_929,  # what the lecture's script prints
    }
    assert {name: sum(p.numel() for p in network(name).parameters()) for name in TRAINED} == expected
    assert H * (C // H) == C


@pytest.mark.parametrize("name", ["residual", "layer-norm", "scaled"])
def test_a_block_adds_to_the_residual_stream(name: str) -> None:
    """With projections of zero a block is the identity."""
    model = network(name, SMALL)
    assert isinstance(model, ladder.Transformer)
    block = model.body[0]  # type: ignore[index]
    for linear in (block.sa.proj, block.ffwd.net[2]):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    x = torch.randn(2, 8, 16)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_the_last_rung_computes_what_gpt_does() -> None:
    """With the same weights, and undone what GPT chooses otherwise: GELU, biases of q, k, v, a tied head."""
    settings = dataclasses.replace(SMALL, block_size=12)
    ours = network("scaled", settings).double()
    config = GPTConfig(
        vocab_size=V,
        block_size=12,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        activation="relu",
        tied_head=False,
    )
    gpt = GPT(config).double()
    copy_weights(ours, gpt)
    idx = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(2))
    logits, _ = gpt(idx)
    torch.testing.assert_close(ours.logits(idx), logits + ours.lm_head.bias, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def copy_weights(ours: ladder.LanguageModel, gpt: GPT) -> None:
    assert isinstance(ours, ladder.Transformer)
    to = gpt.transformer
    to.wte.weight[:V] = ours.token_embedding_table.weight
    to.wpe.weight.copy_(ours.position_embedding_table.weight)
    gpt.lm_head.weight[:V] = ours.lm_head.weight
    *blocks, norm = ours.body  # type: ignore[misc]
    to.ln_f.load_state_dict(norm.state_dict())
    for block, other in zip(blocks, to.h, strict=True):
        other.ln_1.load_state_dict(block.ln1.state_dict())
        other.ln_2.load_state_dict(block.ln2.state_dict())
        other.attn.c_attn.weight.copy_(torch.cat(ladder.qkv_weights(block.sa)))
        nn.init.zeros_(other.attn.c_attn.bias)
        other.attn.c_proj.load_state_dict(block.sa.proj.state_dict())
        other.mlp.c_fc.load_state_dict(block.ffwd.net[0].state_dict())
        other.mlp.c_proj.load_state_dict(block.ffwd.net[2].state_dict())


@pytest.mark.parametrize(("n_head", "block_size"), [(1, 8), (4, 8), (4, 1), (2, 33)])
def test_batched_heads_equal_separate_ones(n_head: int, block_size: int) -> None:
    settings = dataclasses.replace(SMALL, n_head=n_head, block_size=block_size)
    torch.manual_seed(0)
    separate, batched = heads_of_both_kinds(settings)
    x, dy = torch.randn(2, 4, block_size, 16, dtype=torch.float64)
    expected = outputs_and_gradients(separate, x, dy)
    for ours, theirs in zip(outputs_and_gradients(batched, x, dy), expected, strict=True):
        assert theirs.abs().max() > 1e-3 or block_size == 1  # of one place, the softmax is 1 whatever q and k
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_is_for_training_alone() -> None:
    settings = dataclasses.replace(SMALL, dropout=0.5)
    x = torch.randn(2, 8, 16)
    for make in (
        lambda: ladder.Head(settings, 4),
        lambda: ladder.ProjectedHeads(settings),
        lambda: ladder.WideFeedForward(settings),
        lambda: ladder.BatchedHeads(settings),
    ):
        module: nn.Module = make()
        assert not torch.equal(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))


# -- batches, losses, text -----------------------------------------------------------------------------------


def test_batches_are_windows_and_what_follows_from_everywhere() -> None:
    tokens = torch.arange(12)
    torch.manual_seed(0)
    x, y = ladder.get_batch(tokens, dataclasses.replace(SMALL, batch_size=200), CPU)
    assert x.shape == y.shape == (200, 8)
    assert torch.equal(y, x + 1)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3}  # up to the window that ends with the text


def test_the_loss_of_no_knowledge_is_log_v_and_of_all_of_it_0() -> None:
    model = network("bigram", SMALL, vocab_size=8)
    table = model.token_embedding_table.weight.detach()
    tokens = torch.arange(100) % 8
    nn.init.zeros_(table)
    assert ladder.estimate_loss(model, tokens, SMALL, CPU, 3) == pytest.approx(math.log(8), rel=1e-5)
    table.copy_(100 * torch.eye(8).roll(1, dims=1))
    assert ladder.estimate_loss(model, tokens, SMALL, CPU, 3) == pytest.approx(0, abs=1e-6)
    idx, targets = tokens[:8].view(1, 8), tokens[1:9].view(1, 8)
    assert model(idx)[1] is None
    assert model(idx, targets)[1].item() == pytest.approx(0, abs=1e-6)


def test_losses_are_estimated_without_dropout_and_training_has_it() -> None:
    settings = dataclasses.replace(SMALL, dropout=0.5, steps=1)
    model, tokens = network("scaled", settings), torch.randint(V, (100,))
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    ladder.estimate_loss(model, tokens, settings, CPU, 1)
    ladder.train(model, tokens, settings, CPU)
    assert modes == [False, True]


def test_text_goes_on_beyond_the_block() -> None:
    model = network("layer-norm", SMALL)
    start = torch.tensor([[3, 1]])
    torch.manual_seed(0)
    text = model.generate(start, 30)
    assert text.shape == (1, 32)
    assert torch.equal(text[:, :2], start)
    assert not torch.equal(text, model.generate(start, 30))  # drawn, not the most likely


# -- the command ---------------------------------------------------------------------------------------------

QUICK = "--steps 3 --eval-batches 2 --sample-tokens 20 --device cpu".split()


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} " in out and rung.adds in out for name, rung in RUNGS.items())
    assert "1.48" in out
    assert ladder.__file__ in out


def test_all_of_it(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastgpt.ladder_command.BUDGET_S", 0.0)
    out = tmp_path / "out"
    assert main(["ladder", "--all", "--corpus", str(text_file), "--out", str(out), *QUICK]) == 0
    printed = capsys.readouterr().out
    written = (out / "ladder.md").read_text()
    found = json.loads((out / "ladder.json").read_text())
    rungs = {rung["name"]: rung for rung in found["rungs"]}
    assert list(rungs) == list(RUNGS)
    assert (found["corpus"], found["seed"], found["eval_batches"]) == (str(text_file), 1337, 2)
    for name, rung in rungs.items():
        assert f"## {name}\n" in written
        if name in TRAINED:
            row = f"{rung['parameters']:,} "
            loss = f"{rung['val_loss']:.3f} "
            assert any(row in line and loss in line for line in printed.splitlines())
            assert len(rung["sample"]) == 20
            assert rung["sample"].strip() in printed
            assert rung["sample"].strip() in written
            assert rung["settings"]["steps"] == 3
            assert rung["lecture"] == RUNGS[name].lecture
    assert rungs["scaled"]["settings"]["n_embd"] == REDUCED.n_embd
    assert [line for line in printed.splitlines() if "1.48, larger" in line]
    ways = rungs["averaging"]["ways"] + rungs["batched-heads"]["ways"]
    assert [way["name"] for way in ways] == [
        *("loops", "matrix product", "softmax"),
        *(2 * ("separate heads", "one tensor")),
    ]
    assert all(way["apart"] < 1e-12 and way["ms"] > 0 for way in ways)
    table = next(line for line in printed.splitlines() if line.startswith("| rung "))
    assert table in written


def test_a_rung_alone_gives_what_it_gives_among_others(text_file: Path, tmp_path: Path) -> None:
    def climbed(*names: str, seed: int = 1) -> Trained:
        given = LadderArgs(
            corpus=str(text_file),
            steps=3,
            eval_batches=2,
            sample_tokens=20,
            device="cpu",
            seed=seed,
            out=tmp_path,
        )
        last = climb(given, names)[-1]
        assert isinstance(last, Trained)
        return dataclasses.replace(last, seconds=0, cpu_seconds=0)

    alone = climbed("multi-head")
    assert alone == climbed("bigram", "multi-head")
    assert alone != climbed("multi-head", seed=2)


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt.ladder_command import settings_of

    cuda = torch.device("cuda")
    assert settings_of("scaled", LadderArgs(), CPU) == REDUCED
    assert settings_of("scaled", LadderArgs(), cuda) == LECTURE
    assert settings_of("scaled", LadderArgs(size="lecture"), CPU) == LECTURE
    assert settings_of("scaled", LadderArgs(size="reduced", steps=7), cuda) == dataclasses.replace(
        REDUCED, steps=7
    )
    assert settings_of("attention", LadderArgs(), cuda) == Settings()


def test_bad_input(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main(["ladder", *map(str, arguments)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    assert "no rung 'atention': did you mean 'attention'?" in fails("--rung", "atention")
    assert "The rungs are bigram, averaging," in fails("--rung", "bigram", "xyz")
    assert "exclude each other" in fails("--all", "--rung", "bigram")
    for option in ("steps", "eval-batches", "sample-tokens"):
        assert f"{option.replace('-', '_')} = 0: it must be at least 1" in fails("--all", f"--{option}", "0")
    assert "seed = -1" in fails("--all", "--seed", "-1")
    assert "did you mean 'shakespeare'" in fails("--all", "--corpus", "shakespear")
    short = tmp_path / "short.txt"
    short.write_text("ab" * 300)  # 60 characters for validation
    assert "the val split has 60 characters, fewer than a window" in fails(
        "--rung", "scaled", "--corpus", short
    )
    if not torch.cuda.is_available():
        assert "finds no usable CUDA GPU" in fails("--rung", "bigram", "--device", "cuda")


def test_tokens_that_are_no_characters(dataset: TokenDataset) -> None:
    words = dataclasses.replace(dataset, tokenizer=GPT2Tokenizer())
    with pytest.raises(InputError, match="a vocabulary of 50257"):
        ladder.splits(words, 8)
    known = dataset.tokenizer.decode(range(dataset.tokenizer.vocab_size - 1))  # all but one
    other = dataclasses.replace(dataset, tokenizer=CharTokenizer(known))
    with pytest.raises(InputError, match=f"outside the vocabulary of {len(known)}"):
        ladder.splits(other, 8)
    exact = dataclasses.replace(dataset, train=[np.arange(4, dtype=np.uint16)], val=[np.zeros(9, np.uint16)])
    with pytest.raises(InputError, match="the train split has 4 characters"):
        ladder.splits(exact, 8)
    exact = dataclasses.replace(exact, train=exact.val)
    assert len(ladder.splits(exact, 8)["val"]) == 9
    with pytest.raises(InputError, match="fewer than a window of block_size \\+ 1 = 10"):
        ladder.splits(exact, 9)


# -- the losses, and their order -----------------------------------------------------------------------------


def trained_loss(name: str, splits: dict[str, Tensor], vocab_size: int, steps: int, seed: int) -> float:
    settings = dataclasses.replace(RUNGS[name].settings, steps=steps)
    if name == "scaled":
        settings = dataclasses.replace(REDUCED, block_size=32, n_embd=64, n_layer=2, steps=steps)
    make = RUNGS[name].model
    assert make is not None
    torch.manual_seed(seed)
    model = make(vocab_size, settings)
    ladder.train(model, splits["train"], settings, CPU)
    return ladder.estimate_loss(model, splits["val"], settings, CPU, 100)


def test_the_lectures_order(dataset: TokenDataset) -> None:
    """On words that are easier than Shakespeare, after a tenth of the lecture's steps or less.

    Rungs that lie as close here as two seeds do are not compared: they are in the test on Shakespeare.
    """
    splits = ladder.splits(dataset, 32)
    vocab_size = dataset.tokenizer.vocab_size
    loss = {name: trained_loss(name, splits, vocab_size, 300, seed=0) for name in TRAINED}
    assert loss["bigram"] > loss["attention"] > loss["feed-forward"], loss
    assert loss["bigram"] > loss["multi-head"] > loss["feed-forward"], loss
    assert loss["blocks"] > loss["feed-forward"], loss  # depth alone does not help
    assert loss["feed-forward"] > max(loss["residual"], loss["layer-norm"]) + 0.2, loss
    assert min(loss["residual"], loss["layer-norm"]) > loss["scaled"] + 0.1, loss


@pytest.mark.slow
def test_the_small_rungs_reach_the_lectures_losses(tmp_path: Path) -> None:
    """FASTGPT_SHAKESPEARE=path/to/input.txt; minutes.

    The lecture says 2.5 and 2.4, rounded by up to 0.05, and for the others two decimals of one run with other
    random numbers. Seeds 1337 and 1 were up to 0.023 apart here, and no further from the lecture. Each rung
    is better than the one before by more than that, but for LayerNorm (0.019 and 0.003).
    """
    path = os.environ.get("FASTGPT_SHAKESPEARE")
    if not path:
        pytest.skip("set FASTGPT_SHAKESPEARE to a copy of tiny Shakespeare")
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == SHAKESPEARE_SHA256
    names = [name for name in TRAINED if name != "scaled"]
    results = climb(LadderArgs(corpus=path, device="cpu", out=tmp_path), names)
    loss = {result.name: result.val_loss for result in results if isinstance(result, Trained)}
    for name in names:
        if (lecture := RUNGS[name].lecture) is not None:
            tolerance = 0.05 + 0.02 if lecture > 2.3 else 2 * 0.023
            assert loss[name] == pytest.approx(lecture, abs=tolerance), (name, loss)
    order = ("bigram", "attention", "multi-head", "feed-forward", "residual", "layer-norm")
    for before, after in itertools.pairwise(order):
        assert loss[after] < loss[before] + (0.02 if after == "layer-norm" else 0), (after, loss)
    assert loss["blocks"] > loss["feed-forward"], loss
