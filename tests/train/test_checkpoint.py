"""Checkpoints survive kills, full disks and flipped bits, or say what is damaged."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgpt import GPTConfig, checkpoint
from fastgpt.data import CharTokenizer
from fastgpt.errors import InputError

MUTANTS = {
    "fastgpt/checkpoint.py": [
        ("        unfinished.rename(final)\n", "        shutil.copytree(unfinished, final)\n"),
        ("keep = {best(run), *every[-_KEEP_LAST:]}", "keep = {*every[-_KEEP_LAST:]}"),
        ("if sha256_of(file) != expected[name]:", "if False:"),
    ],
}

CONFIG = GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=8)
FILES = ("config.json", "model.safetensors", "state.json", "tokenizer.json", "training.safetensors")


def save(run: Path, step: int, val_loss: float | None = None, numbers: int = 1000) -> Path:
    return checkpoint.save(
        run,
        config=CONFIG,
        tokenizer=CharTokenizer("abc"),
        state={"step": step, "val_loss": val_loss},
        model={"weight": torch.full((numbers,), float(step))},
        training={"weight:exp_avg": torch.full((numbers,), -float(step))},
    )


def test_round_trip(tmp_path: Path) -> None:
    loaded = checkpoint.load(save(tmp_path, 7, val_loss=1.5))
    assert loaded.config == CONFIG
    assert loaded.tokenizer == CharTokenizer("abc")
    assert loaded.state == {"step": 7, "val_loss": 1.5}
    assert torch.equal(loaded.model["weight"], torch.full((1000,), 7.0))
    assert torch.equal(loaded.training()["weight:exp_avg"], torch.full((1000,), -7.0))


def test_sums_are_those_of_the_common_tool(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    lines = (path / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == list(FILES)
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


def test_keeps_the_best_and_the_last_two(tmp_path: Path) -> None:
    for step, val_loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)]:
        save(tmp_path, step, val_loss)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-000002",
        "step-000004",
        "step-000005",
    ]
    assert checkpoint.find(tmp_path, "best").name == "step-000002"
    assert checkpoint.find(tmp_path, "last").name == "step-000005"
    assert checkpoint.find(tmp_path / "checkpoints" / "step-000004").name == "step-000004"


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    assert checkpoint.find(tmp_path, "last").name == "step-1000000"


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_flipped_bit_is_named_and_an_intact_checkpoint_offered(tmp_path: Path, name: str) -> None:
    intact, damaged = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 0x10
    (damaged / name).write_bytes(content)
    with pytest.raises(checkpoint.DamagedCheckpoint) as caught:
        checkpoint.load(damaged)
    assert str(damaged) in str(caught.value)
    assert f"{intact} is intact" in str(caught.value)
    if name != "SHA256SUMS":
        assert str(damaged / name) in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_truncated_and_missing_files_are_named(tmp_path: Path, name: str, how: str) -> None:
    path = save(tmp_path, 1)
    if how == "truncated":
        os.truncate(path / name, (path / name).stat().st_size - 1)
    else:
        (path / name).unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match=name) as caught:
        checkpoint.load(path)
    assert "no other intact checkpoint" in str(caught.value)


def test_missing_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no complete checkpoint"):
        checkpoint.find(tmp_path)


def _save_forever(run: Path) -> None:
    torch.set_num_threads(1)
    step = max((int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(run)), default=0)
    while True:
        step += 1
        save(run, step, val_loss=float(step % 5), numbers=100_000)


def test_a_process_killed_while_writing_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """SIGKILL at random moments; whatever is called step-N must verify and hold step N's numbers."""
    rng = random.Random(0)
    fork = multiprocessing.get_context("fork")
    save(tmp_path, 1)
    last, unfinished, kills = 1, 0, 0
    deadline = time.monotonic() + 120
    while kills < 20 or last < 10 or unfinished < 3:  # the writers did write, and were killed in the middle
        kills += 1
        assert time.monotonic() < deadline, (kills, last, unfinished)
        writer = fork.Process(target=_save_forever, args=(tmp_path,))
        writer.start()
        time.sleep(rng.uniform(0.02, 0.2))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        unfinished += len(list((tmp_path / "checkpoints").glob(".writing-*")))
        for path in checkpoint.checkpoints(tmp_path):
            loaded = checkpoint.load(path)
            step = loaded.state["step"]
            assert path.name == f"step-{step:06d}"
            assert (loaded.model["weight"] == step).all()
        newest = checkpoint.load(checkpoint.find(tmp_path, "last")).state["step"]
        assert newest >= last
        last = newest
    save(tmp_path, last + 1)
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))
    assert len(checkpoint.checkpoints(tmp_path)) <= 3


def _save_and_die(run: Path, operation: int) -> None:
    """Save step 4, and die by SIGKILL just before the given file operation of it."""
    torch.set_num_threads(1)
    count = 0

    def audit(event: str, _: object) -> None:
        nonlocal count
        if event in ("open", "shutil.rmtree") or event.startswith("os."):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    save(run, 4, val_loss=0.5)


def test_a_process_killed_before_any_file_operation_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """Where the random kills above may miss a short moment: every operation that Python makes, in turn.

    Step 1 is neither the best nor one of the last two, so that saving step 4 also deletes a checkpoint.
    """
    fork = multiprocessing.get_context("fork")
    operation, killed = 0, True
    while killed:
        operation += 1
        run = tmp_path / str(operation)
        for step, val_loss in [(1, 3.0), (2, 2.0), (3, 1.0)]:
            save(run, step, val_loss)
        writer = fork.Process(target=_save_and_die, args=(run, operation))
        writer.start()
        writer.join()
        killed = writer.exitcode == -signal.SIGKILL
        steps = [checkpoint.load(path).state["step"] for path in checkpoint.checkpoints(run)]
        assert steps in ([2, 3], [2, 3, 4], [3, 4]), (operation, steps)
    assert steps == [3, 4]
    assert operation > 20


def test_a_full_disk_is_one_clear_error_and_the_old_checkpoint_survives(tmp_path: Path) -> None:
    """A limit on the size of files makes the real write fail half way, as a full disk does."""
    save(tmp_path, 1)

    def limited(pipe: multiprocessing.connection.Connection) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            save(tmp_path, 2, numbers=100_000)
        except InputError as error:
            pipe.send(str(error))
        else:
            pipe.send("no error")

    ours, theirs = multiprocessing.Pipe()
    writer = multiprocessing.get_context("fork").Process(target=limited, args=(theirs,))
    writer.start()
    message = ours.recv() if ours.poll(60) else "no answer"
    writer.join(60)
    assert "could not write the checkpoint" in message
    assert "step-000002" in message
    assert "step-000001 is intact" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoint.load(checkpoint.find(tmp_path)).state["step"] == 1


def test_sha256sum_itself_agrees(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    try:
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no sha256sum on this system")
    assert done.returncode == 0
