"""Generation: contenders say what a float64 model says, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from torch import Tensor

from fastgpt import GPTConfig, config, graphs
from fastgpt.benchmarks import generate, results
from fastgpt.benchmarks.generate import (
    CACHE,
    GRAPH,
    NO_CACHE,
    GenerateArgs,
    Oracle,
    Writer,
    kinds,
    run_generate,
    talkative,
)
from fastgpt.config import TrainConfig
from fastgpt.errors import InputError
from fastgpt.generate import generate as generate_tokens
from fastgpt.model import GPT, StaticCache
from fastgpt.ops import attention, registry

MUTANTS = {
    "fastgpt/benchmarks/generate.py": [
        ("self.cache.length = self.prompt.size(1)", "pass"),
        ("self.static.seek(self.prompt.size(1))", "pass"),
        ("text.size(1) > self.prompt.size(1):", "False:"),
        ("1 if writer.static is None else 1 + WARM_UP", "1"),
        ("can_capture(device) and implementation in rows", "can_capture(device)"),
        ("gap > 4 * self.error", "gap > 4 * self.error + 100"),
        ("p.add_(torch.randn", "0 * (torch.randn"),
    ]
}

TINY = GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32)
PROMPT = 6


@pytest.fixture(scope="module")
def model() -> GPT:
    return talkative(TINY)


@pytest.fixture
def text() -> Tensor:
    return torch.randint(65, (3, 16), generator=torch.Generator().manual_seed(0))


def test_writers_say_what_generate_says(model: GPT, text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = text[:, :PROMPT]
    wanted = torch.stack(list(generate_tokens(model, prompt, 10, temperature=0)), dim=1)
    assert wanted.unique().numel() > 5
    fake = fake_cuda.install(monkeypatch)
    for kind in (CACHE, GRAPH, NO_CACHE):
        writer = Writer(model, "eager", kind, prompt, 10)
        assert writer.name == "eager" + kind
        first = writer.prefill()
        for _ in range(2):  # again, as the timing does
            assert torch.equal(torch.cat([first[:, None], writer.decode(first)], 1), wanted)
        assert torch.equal(writer.follow(torch.cat([prompt, wanted], 1)), wanted)
        assert torch.equal(torch.cat([first[:, None], writer.decode(first)], 1), wanted)
    assert fake.log.count("replay") == 4 * 9 - graphs.WARM_UP  # every step but of a captured one's warm-up
    assert fake.log.count("capture") == 1


def test_graphs_are_for_a_gpu_and_for_what_has_such_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert kinds("triton", cpu) == [CACHE, NO_CACHE]
    fake_cuda.install(monkeypatch, "fastgpt.benchmarks.generate")
    assert kinds("triton", cpu) == kinds("eager", cpu) == [CACHE, GRAPH, NO_CACHE]
    assert kinds("native", cpu) == [CACHE, NO_CACHE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [CACHE, GRAPH, NO_CACHE])
def test_the_oracle_accepts_eager_in_its_dtype(
    text: Tensor, dtype: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.install(monkeypatch)
    mine = talkative(TINY).to(dtype)
    oracle = Oracle(mine, text, PROMPT)
    assert oracle.verdict(Writer(mine, "eager", kind, text[:, :PROMPT], 10).follow(text)) is None


def test_a_tie_is_right_and_a_smaller_logit_is_not(model: GPT, text: Tensor) -> None:
    oracle = Oracle(model, text, PROMPT)
    said = oracle.logits.argmax(-1)
    second = oracle.logits.topk(2).indices[0, 0, 1]
    said[0, 0] = second
    assert "1 of 30 greedy tokens are wrong, first in sequence 0 at place 0" in (oracle.verdict(said) or "")
    oracle.logits[0, 0, second] = oracle.logits[0, 0].max() - 3 * oracle.error
    assert oracle.verdict(said) is None


def run(folder: Path, **options: Any) -> list[results.Row]:
    given = GenerateArgs("tiny", (2,), device="cpu", threads=1, budget=0.0, out=folder, **options)
    return results.read(run_generate(given))


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.PRESETS, "tiny", TrainConfig(model=TINY, tokenizer="char"))


def test_rows(tmp_path: Path, tiny_preset: None) -> None:
    rows = run(tmp_path, implementations=("eager",))
    assert [(r.direction, r.contender, r.status) for r in rows] == [
        (direction, name, "ok")
        for direction in ("prefill", "decode")
        for name in ("eager", "eager-without-cache")
    ]
    assert {r.shape for r in rows} == {"B=2 P=8 N=4"}
    for row, tokens in zip(rows, (16, 16, 6, 6), strict=True):
        assert row.tokens_per_s == pytest.approx(tokens / row.median_us * 1e6)
        assert row.baseline == "eager"


@pytest.mark.parametrize("right", [True, False])
def test_a_graph_is_a_contender_if_its_replays_are_right(
    tmp_path: Path, tiny_preset: None, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    """Three tokens after the prompt's: as many as the steps that warm up. A position that the host counts
    would stand still."""
    fake_cuda.install(monkeypatch, "fastgpt.benchmarks.generate")
    if not right:
        seek = StaticCache.seek

        def counted(self: Any, length: int) -> None:
            self.count = length
            seek(self, length)

        monkeypatch.setattr(StaticCache, "seek", counted)
        monkeypatch.setattr(StaticCache, "advance", lambda self: counted(self, self.count + 1))
    status = {row.contender: row.status for row in run(tmp_path, implementations=("eager",))}
    graph = "ok" if right else "wrong"
    assert status == {"eager": "ok", "eager-graph": graph, "eager-without-cache": "ok"}


def test_a_wrong_contender_is_not_timed(
    tmp_path: Path, tiny_preset: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(*qkv: Tensor, **options: Any) -> Tensor:
        return attention.reference(*qkv, **{**options, "window": 3})

    # Attention that sees three keys: what a cache that lost the others would give.
    planted = registry.Implementation("attention", "planted", function, registry.runs_everywhere)
    monkeypatch.setitem(registry._table["attention"], "planted", planted)
    monkeypatch.setattr(generate, "IMPLEMENTATIONS", ("eager", "planted"))
    rows = run(tmp_path, implementations=("eager", "planted"))
    for row in rows:
        wrong = row.contender.startswith("planted")
        assert row.status == ("wrong" if wrong else "ok"), row.contender
        assert (row.median_us is None) == wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype = 'float64'"),
        ({"implementations": ("cuda",)}, "implementations has 'cuda'"),
        ({"prompt": 10, "new_tokens": 7}, "at most 16 together"),
        ({"new_tokens": 1}, "at least 1 and 2"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path, tiny_preset: None) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, **options)
