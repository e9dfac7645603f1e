"""The command line, as a user types it: what it prints, and one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import checkpoint
from fastgpt.cli import COMMANDS, main, program
from fastgpt.config import PRESETS, TrainConfig
from fastgpt.train import train

SHAPE = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16"
SMALL = [*SHAPE.split(), *"--batch-size 4 --device cpu --precision fp32 --sample-tokens 12".split()]


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run that the tests of other commands look at."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["train", "char-cpu", "--corpus", str(text_file), "--out-dir", str(folder)]
    assert main([*arguments, *SMALL, "--max-steps", "30", "--eval-every", "10"]) == 0
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on standard error, progress bars aside, of a command that must fail as bad input."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip() and "step/s" not in line]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fastgpt")
    return lines[0]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"fastgpt {command}" in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"
    for command in ("prepare", "sample", "eval", "export", "train"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert f"fastgpt {command}" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_explains_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", name, "--help"])
    out = capsys.readouterr().out
    fields = [*dataclasses.fields(TrainConfig), *dataclasses.fields(type(PRESETS[name].model))]
    for field in fields:
        if field.name != "model":
            assert f"--{field.name.replace('_', '-')}" in out


def test_training_ends_with_a_sample_paths_and_what_to_try(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "char-cpu", "--corpus", str(text_file), "--max-steps", "4", *SMALL]) == 0
    out = capsys.readouterr().out
    folder = next((tmp_path / "runs").iterdir())
    assert folder.name.startswith("char-cpu-")
    relative = folder.relative_to(tmp_path)
    assert "val loss" in out
    assert f"best checkpoint: {relative}/checkpoints/step-000004" in out
    assert f"{relative}/loss.png" in out
    assert f"sample {relative} --prompt" in out
    assert (folder / "loss.png").exists()


@pytest.mark.parametrize(
    ("called", "on_path", "expected"),
    [
        (".venv/bin/fastgpt", None, ".venv/bin/fastgpt"),  # by make, with no environment activated
        ("/opt/venv/bin/fastgpt", "/opt/venv/bin/fastgpt", "fastgpt"),
        ("/site-packages/fastgpt/__main__.py", None, "python -m fastgpt"),
    ],
)
def test_what_to_try_can_be_pasted(
    called: str, on_path: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("shutil.which", lambda _: on_path)
    assert program() == expected


def test_sampling(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*options: str) -> str:
        assert main(["sample", str(run), "--max-new-tokens", "40", *options]) == 0
        return capsys.readouterr().out

    greedy = sample("--prompt", "a", "--temperature", "0")
    assert greedy == sample("--prompt", "a", "--temperature", "0", "--no-cache")
    with monkeypatch.context() as patch:  # a capture is an error without a GPU
        patch.setattr("fastgpt.generate.can_capture", lambda device: True)
        assert greedy == sample("--prompt", "a", "--temperature", "0", "--no-graph")
        with pytest.raises(Exception, match="(?i)cuda|nvidia"):
            sample("--prompt", "a", "--temperature", "0")
        capsys.readouterr()
    assert greedy.startswith("a")
    assert len(greedy) == 1 + 40 + 1  # prompt, sample, newline
    assert sample("--seed", "1") == sample("--seed", "1") != sample("--seed", "2")
    several = sample("--num-samples", "3", "--seed", "5", "--top-k", "5", "--top-p", "0.9")
    assert several.count("--- sample") == 3
    alone = sample("--seed", "6", "--top-k", "5", "--top-p", "0.9")
    assert f"--- sample 2 of 3 ---\n{alone}--- sample 3" in several
    assert several == sample("--num-samples", "3", "--seed=5", "--top-k=5", "--top-p=0.9", "--batch-size=2")


def test_sampling_from_a_prompt_file_longer_than_the_block(
    run: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text_file.read_text()[:50])
    assert main(["sample", str(run), "--prompt-file", str(prompt), "--max-new-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(prompt.read_text())
    assert captured.err == "note: the prompt has 50 tokens; the model sees the last 16\n"


def test_eval_agrees_with_the_last_line_of_training(
    run: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    expected = min(
        json.loads(line)["val_loss"] or 99 for line in (run / "metrics.jsonl").read_text().splitlines()
    )
    assert f"loss {expected:.4f}" in out
    assert str(text_file) in out
    assert main(["eval", str(run / "checkpoints" / "step-000030"), "--corpus", str(text_file)]) == 0


def test_prepare_then_train_on_the_shards(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "tokens"
    assert main(["prepare", str(text_file), "--tokenizer", "gpt2", "--out", str(tokens)]) == 0
    assert "50257 in the vocabulary" in capsys.readouterr().out
    arguments = ["train", "char-cpu", "--corpus", str(tokens), "--out-dir", str(tmp_path / "run")]
    assert main([*arguments, *SMALL, "--max-steps", "2"]) == 0
    assert checkpoint.load(checkpoint.find(tmp_path / "run")).config.vocab_size == 50257


def test_yaml_settings_and_options_over_them(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"preset: char-cpu\ncorpus: {text_file}\nout_dir: {tmp_path / 'run'}\nn_layer: 1\nn_embd: 16\n"
        "n_head: 2\nblock_size: 16\nlearning_rate: 1e-3\nmax_steps: 50\ndevice: cpu\nsample_tokens: 0\n"
    )
    assert main(["train", str(path), "--max-steps", "2"]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["max_steps"], saved["learning_rate"], saved["batch_size"]) == (2, 1e-3, 12)
    path.write_text("preset: char-cpu\nlearning_rat: 1\n")
    assert "unknown field 'learning_rat': did you mean 'learning_rate'" in fails(capsys, "train", path)
    path.write_text("a: [")
    assert "is not YAML" in fails(capsys, "train", path)
    path.write_text("just words")
    assert "expected `field: value` lines" in fails(capsys, "train", path)
    assert "No such file" in fails(capsys, "train", tmp_path / "none.yaml")


def test_resume_takes_the_settings_of_the_run(run: Path, tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["train", "char-cpu", "--corpus", str(text_file), "--out-dir", str(folder), *SMALL]
    assert main([*arguments, "--max-steps", "3", "--dropout", "0.1"]) == 0
    assert main(["train", "--resume", "--out-dir", str(folder), "--max-steps", "4"]) == 0
    assert main(["train", f"--out-dir={folder}", "--resume", "--max-steps", "5"]) == 0
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["max_steps"], saved["model"]["dropout"]) == (5, 0.1)
    assert checkpoint.find(folder, "last").name == "step-000005"


def test_unknown_names_suggest_the_closest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "unknown command 'trian': did you mean 'train'" in fails(capsys, "trian")
    assert "unknown preset 'char-cp': did you mean 'char-cpu'" in fails(capsys, "train", "char-cp")
    assert "which preset?" in fails(capsys, "train")
    assert "did you mean 'shakespeare'" in fails(capsys, "train", "char-cpu", "--corpus", "shakespear")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "char-cpu", "--leaning-rate", "1"])
    assert stopped.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "char-cpu", "--n-head", "5"])
    assert "it must be a multiple of n_head = 5" in " ".join(capsys.readouterr().err.split())


def test_bad_training_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def train_on(content: bytes | None, name: str = "text.txt") -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        return fails(capsys, "train", "char-cpu", "--corpus", path, "--out-dir", tmp_path / "run", *SMALL)

    assert "missing.txt" in train_on(None, "missing.txt")
    assert "empty" in train_on(b"")
    assert "shorter than a window" in train_on(b"short")
    message = train_on(b"good text " * 100 + b"\xff\xfe" + b" more" * 100)
    assert "UTF-8" in message
    assert "1000" in message  # where
    assert not (tmp_path / "run").exists()
    assert "needs --out-dir" in fails(capsys, "train", "char-cpu", "--resume")
    assert "holds no run to resume" in fails(capsys, "train", "--resume", "--out-dir", tmp_path / "none")
    assert "no such folder" in fails(capsys, "train", "char-cpu", "--resume", "--out-dir", tmp_path / "none")
    if not torch.cuda.is_available():
        assert "finds no usable CUDA GPU" in fails(capsys, "train", "char-cpu", "--device", "cuda")


def test_corrupt_shards_stop_training(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "tokens"
    assert main(["prepare", str(text_file), "--tokenizer", "char", "--out", str(tokens)]) == 0
    shard = next(tokens.glob("*train*.bin"))
    content = shard.read_bytes()
    arguments = ("train", "char-cpu", "--corpus", tokens, "--out-dir", tmp_path / "run", *SMALL)
    shard.write_bytes(content[:-10])
    assert shard.name in fails(capsys, *arguments)
    shard.write_bytes(b"\x01" + content[1:])
    assert shard.name in fails(capsys, *arguments)
    shard.write_bytes(content[:-2000] + b"\xff\xff" * 1000)  # ids that the vocabulary does not have
    assert shard.name in fails(capsys, *arguments, "--max-steps", "500")


def test_bad_sampling_input(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "'€'" in fails(capsys, "sample", run, "--prompt", "€")
    assert "temperature = -1.0" in fails(capsys, "sample", run, "--temperature", "-1")
    assert "exclude each other" in fails(capsys, "sample", run, "--prompt", "a", "--prompt-file", "b")
    assert "No such file" in fails(capsys, "sample", run, "--prompt-file", tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8 text: byte 3" in fails(capsys, "sample", run, "--prompt-file", tmp_path / "latin.txt")
    assert "must be at least 1" in fails(capsys, "sample", run, "--num-samples", "0")
    assert "must be at least 1" in fails(capsys, "sample", run, "--batch-size", "0")
    assert "expected the folder of a run" in fails(capsys, "sample", tmp_path / "none")


def test_damaged_checkpoints_are_refused_with_another_offered(
    tiny: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = train(tiny(max_steps=8))
    damaged = checkpoint.best(trainer.out_dir)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = fails(capsys, "sample", trainer.out_dir)
    assert str(weights) in message
    assert "is intact" in message
