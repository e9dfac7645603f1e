"""HellaSwag, LAMBADA and text: the totals of one-by-one evaluation, in `fastgpt eval` and in training."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from texts import pseudo_text
from weights import gpt, save_run

from fastgpt import GPT
from fastgpt.cli import main
from fastgpt.config import TrainConfig
from fastgpt.data import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from fastgpt.errors import InputError
from fastgpt.metrics import read_metrics
from fastgpt.tasks import HellaSwag, Lambada, Text
from fastgpt.train import train

MUTANTS = {
    "fastgpt/tasks.py": [
        ("s.logprob / s.tokens", "s.logprob"),
        ('f" {ending}"', "ending"),
        ('tokenizer.encode(f" {word}")', "tokenizer.encode(word)"),
        ("end + (block_size if end == 1 else stride)", "end + stride"),
        ("ids[max(0, end - block_size - 1) : start]", "ids[max(0, end - block_size) : start]"),
        ("[] if tokenizer.eot is None else [tokenizer.eot]", "[]"),
    ],
    "fastgpt/train.py": [
        ("self.hellaswag if self._due(self.config.hellaswag_every) else None", "self.hellaswag"),
    ],
}

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    return gpt(vocab_size=256, block_size=64)


@pytest.fixture(scope="module")
def hellaswag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up examples in the published format, with contexts and endings of many lengths."""
    rng = random.Random(0)

    def words(least: int, most: int) -> str:
        return pseudo_text(rng.randint(least, most), seed=rng.randrange(10**6)).strip()

    path = tmp_path_factory.mktemp("hellaswag") / "hellaswag_val.jsonl"
    with path.open("w") as file:
        for ind in range(60):
            endings = [words(2, 24) for _ in range(4)]
            row = {"ind": ind, "activity_label": "Nothing", "ctx": words(3, 50), "split": "val"}
            file.write(json.dumps(row | {"label": rng.randrange(4), "endings": endings}) + "\n")
    return path


def one_by_one(model: GPT, path: Path) -> dict[str, float]:
    """HellaSwag as build-nanogpt's hellaswag.py has it: four rows, a mask, the lowest sum or mean loss."""
    right = {"acc": 0, "acc_norm": 0}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        context = BYTES.encode(row["ctx"]).tolist()
        endings = [BYTES.encode(" " + ending).tolist() for ending in row["endings"]]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, ending in enumerate(endings):
            ids = context + ending
            tokens[i, : len(ids)] = torch.tensor(ids)
            mask[i, len(context) : len(ids)] = 1
        excess = max(0, tokens.size(1) - model.config.block_size - 1)
        tokens, mask = tokens[:, excess:], mask[:, excess:]
        with torch.no_grad():
            logits = model(tokens[:, :-1])[0]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        total = (losses * mask[:, 1:]).sum(1)
        right["acc"] += total.argmin().item() == row["label"]
        right["acc_norm"] += (total / mask[:, 1:].sum(1)).argmin().item() == row["label"]
    return {name: count / len(rows) for name, count in right.items()}


@pytest.fixture(scope="module")
def expected(model: GPT, hellaswag: Path) -> dict[str, float]:
    return one_by_one(model, hellaswag)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_hellaswag_totals_are_those_of_one_by_one(
    model: GPT, hellaswag: Path, expected: dict[str, float], batch_size: int
) -> None:
    assert expected["acc"] != expected["acc_norm"]
    assert HellaSwag.open(hellaswag, BYTES).evaluate(model, batch_size=batch_size) == expected


def test_lambada_counts_whole_last_words(tmp_path: Path) -> None:
    """A model that always says " mat": the logits are 4 for it and 0 for all others."""
    tokenizer = GPT2Tokenizer()
    model = gpt(vocab_size=tokenizer.vocab_size, n_head=2, n_embd=8)
    (mat,) = tokenizer.encode(" mat")
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.wte.weight.zero_()
        model.transformer.wte.weight[int(mat)] = 4 * F.normalize(model.transformer.ln_f.bias, dim=0)
        model.transformer.ln_f.bias.copy_(F.normalize(model.transformer.ln_f.bias, dim=0))
    path = tmp_path / "lambada.jsonl"
    words = {"mat": 1, "dog": 1, "matmat": 2}  # the third begins right, and is wrong
    texts = [f"the cat sat on the {word}" for word in words]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = Lambada.open(path, tokenizer)
    assert [len(query.continuations[0]) for query in task.queries] == list(words.values())
    log_z = math.log(math.exp(4) + tokenizer.vocab_size - 1)
    total = (4 - log_z) + (0 - log_z) + (4 + 0 - 2 * log_z)
    for batch_size in (1, 3):
        result = task.evaluate(model, batch_size=batch_size)
        assert result["acc"] == 1 / 3
        assert result["perplexity"] == pytest.approx(math.exp(-total / 3), rel=1e-3)


@pytest.mark.parametrize("text", ["word", "two words ", 3, None])
def test_passages_without_a_last_word_are_refused(tmp_path: Path, text: object) -> None:
    path = tmp_path / "lambada.jsonl"
    path.write_text(json.dumps({"text": text}))
    with pytest.raises(InputError, match="line 1 is not a LAMBADA passage"):
        Lambada.open(path, BYTES)


@pytest.mark.parametrize("stride", [1, 7, 32, 64, None])
def test_every_token_of_a_text_is_predicted_once_from_what_the_stride_allows(
    model: GPT, tmp_path: Path, stride: int | None
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(pseudo_text(150))
    ids = torch.tensor(BYTES.encode(path.read_text()).tolist())
    step = stride or 32
    total = 0.0
    for target in range(1, len(ids)):
        # the window that predicts it: the first one, or the one `step` tokens of whose end hold it
        end = 65 if target < 65 else min(len(ids), 65 + -(-(target - 64) // step) * step)
        with torch.no_grad():
            logits = model(ids[max(0, end - 65) : target][None])[0][0, -1]
        total -= logits.log_softmax(-1)[ids[target]].item()
    result = Text.open(path, BYTES, 64, stride).evaluate(model, batch_size=3)
    assert result["tokens"] == len(ids) - 1
    assert result["loss"] == pytest.approx(total / result["tokens"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / 150, rel=1e-5)


def test_a_text_starts_after_end_of_text_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Hello world")
    (query,) = Text.open(path, GPT2Tokenizer(), 64).queries
    assert (query.context.tolist(), query.continuations[0].tolist()) == ([50256], [15496, 995])
    path.write_text("H")
    with pytest.raises(InputError, match="1 tokens: there is nothing to predict"):
        Text.open(path, BYTES, 64)
    for stride in (0, 65):
        with pytest.raises(
            InputError, match=f"stride = {stride}: it must be at least 1 and at most block_size"
        ):
            Text.open(path, BYTES, 64, stride)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3: expected an object, got list"),
        ('{"ctx": "a", "endings": ["b", "c"]}', "line 3 is not a HellaSwag example: KeyError\\('label'\\)"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": ""}', "line 3 is not a HellaSwag example"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "line 3: it needs"),
        ('{"ctx": "", "endings": ["b", "c"], "label": 0}', "line 3: it needs"),
    ],
)
def test_bad_examples_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('\n{"ctx": "a", "endings": ["b", "c"], "label": 1}\n' + line)
    with pytest.raises(InputError, match=message):
        HellaSwag.open(path, BYTES)
    assert len(HellaSwag.open(path, BYTES, limit=1).queries) == 1
    path.write_text("\n")
    with pytest.raises(InputError, match="bad.jsonl holds no examples"):
        HellaSwag.open(path, BYTES)


def test_the_hub_is_asked_where_no_file_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        ("Rowan/hellaswag", None, "validation"): [{"ctx": "a", "endings": ["b", "c"], "label": "1"}],
        ("EleutherAI/lambada_openai", "default", "test"): [{"text": "a b c"}],
    }
    datasets = SimpleNamespace(
        load_dataset=lambda name, configuration, split: rows[name, configuration, split]
    )
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    assert HellaSwag.open(None, BYTES).labels == [1]
    assert Lambada.open(None, BYTES).queries[0].context.tolist() == list(b"a b")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        InputError, match="Rowan/hellaswag from the .* no route to host; or pass a local file"
    ):
        HellaSwag.open(None, BYTES)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'fastgpt\[data\]', or pass a local file"):
        Lambada.open(None, BYTES)


# -- the command ---------------------------------------------------------------------------------------------


def test_eval_prints_each_task(
    model: GPT,
    hellaswag: Path,
    expected: dict[str, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(save_run(tmp_path / "run", model, BYTES))

    def evaluate(*options: object) -> str:
        assert main(["eval", run, "--device", "cpu", *map(str, options)]) == 0
        return capsys.readouterr().out

    out = evaluate("--task", "hellaswag", "--data", hellaswag)
    assert (
        f"HellaSwag acc {expected['acc']:.4f}, acc_norm {expected['acc_norm']:.4f}, over 60 examples" in out
    )
    assert "over 3 examples" in evaluate("--task", "hellaswag", "--data", hellaswag, "--limit", "3")
    passages = tmp_path / "lambada.jsonl"
    passages.write_text('{"text": "the cat sat on the mat"}\n')
    assert "LAMBADA acc 0.0000, perplexity " in evaluate("--task", "lambada", "--data", passages)
    text = tmp_path / "text.txt"
    text.write_text(pseudo_text(700))
    assert "bits a byte, over 699 tokens of" in evaluate("--task", "text", "--data", text, "--stride", "64")
    assert "over 1 windows of 64 tokens" in evaluate("--corpus", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stride 3", "--stride is for --task text, not val"),
        ("--task text --data x --limit 3", "--limit is for --task hellaswag or lambada, not text"),
        ("--task lambada --corpus x", "--corpus is for --task val, not lambada"),
        ("--task text", "--task text needs --data FILE"),
        ("--batch-size 0", "batch_size = 0: it must be at least 1"),
        ("--task text --data no-such-file", "No such file"),
    ],
)
def test_bad_eval_options(
    model: GPT, tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", model, BYTES)
    assert main(["eval", str(run), *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# -- during training -----------------------------------------------------------------------------------------


def test_hellaswag_during_training_changes_nothing_else(
    tiny: Callable[..., TrainConfig], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled without graph breaks, evaluated every third step and at the end: the same run otherwise."""
    compiled = []
    compile = torch.compile

    def without_breaks(model: Any) -> Any:
        compiled.append(model)
        return compile(model, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", without_breaks)
    vocab = CharTokenizer.from_texts([text_file.read_text()]).vocab
    path = tmp_path / "hellaswag.jsonl"
    row = {"ctx": vocab[2:8], "endings": [vocab[3:5], vocab[5:9]], "label": 1}
    path.write_text(json.dumps(row))
    graphs = {}
    for name, options in {"without": {}, "with": {"hellaswag": path, "hellaswag_every": 3}}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(tiny(out_dir=tmp_path / name, compile=True, max_steps=8, **options))
        graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(compiled) == 2
    assert graphs["with"] == graphs["without"] > 0
    plain, with_task = ({row["step"]: row for row in read_metrics(tmp_path / name)} for name in graphs)
    assert {step for step, row in with_task.items() if row["hellaswag_acc"] is not None} == {3, 6, 8}
    assert all(row["hellaswag_acc"] in (0.0, 1.0, None) for row in with_task.values())
    for step, row in plain.items():
        assert row["hellaswag_acc"] is row["hellaswag_acc_norm"] is None
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert row[key] == with_task[step][key]


def test_a_bad_hellaswag_file_stops_training_before_it_starts(
    tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="No such file"):
        train(tiny(hellaswag=tmp_path / "none.jsonl"))
    assert not (tmp_path / "run").exists()
