"""What makes steps fast and small, without changing what they compute."""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Transfers, assert_same_state, last, logged, start
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import GPT, GPTConfig, runtime
from fastgpt.config import TrainConfig
from fastgpt.data import Prefetcher
from fastgpt.errors import InputError
from fastgpt.ops.library import native_missing
from fastgpt.optim import AdamW
from fastgpt.train import train

MUTANTS = {
    "fastgpt/checkpoint.py": [
        ('optimizer.state.get(p, {}).get("master", p)', "p"),
        ("for full_name, value in {**tensors, **masters}.items()", "for full_name, value in tensors.items()"),
    ],
    "fastgpt/data/prefetch.py": [
        ("if self._ahead is not None and self._ahead[0] == step:", "if self._ahead is not None:"),
        ("self._thread.submit(self._host, step + 1)", "self._thread.submit(self._host, step + 2)"),
    ],
    "fastgpt/model.py": [
        ("draws=dropout > 0", "draws=False"),
        ('self.recompute_blocks = what == "block"', "self.recompute_blocks = False"),
        ('module.recompute = what == "gelu"', "module.recompute = False"),
    ],
    "fastgpt/optim.py": [("max_grad_norm=config.grad_clip or math.inf, **options)", "**options)")],
    "fastgpt/runtime.py": [
        ("    gc.disable()\n", ""),
        (
            "    libc.mallopt(mmap_threshold, 32 << 20)\n    libc.mallopt(trim_threshold, 1 << 30)\n",
            "",
        ),
        ("and cpu and masters ", "and cpu "),
    ],
}

Tiny = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"weights": "bf16", "precision": "auto"},
        {"guard": "skip", "guard_window": 2},
        {"guard": "stop", "weights": "bf16", "precision": "auto"},
    ],
    ids=["fp32", "fp16", "bf16-weights", "guard", "guard-bf16"],
)
def test_a_step_reads_nothing_back_from_the_device(tiny: Tiny, changes: dict[str, Any]) -> None:
    trainer = start(tiny(**changes))
    with Transfers() as transfers:
        for _ in range(3):
            trainer.step()
        assert transfers.count == 0
        trainer.check()
        assert transfers.count == 0  # lists, for all steps at once
        torch.ones(()).item()
    assert transfers.count == 1  # it would have been seen


# -- bf16 weights --------------------------------------------------------------------------------------------


def test_bf16_weights_train_like_fp32_ones(tiny: Tiny, tmp_path: Path) -> None:
    """The network holds bf16, the optimizer and the checkpoint fp32, and the loss falls as with autocast."""
    model = dataclasses.replace(tiny().model, dropout=0.0)
    common = {"model": model, "max_steps": 30, "eval_every": 30}
    train(tiny(out_dir=tmp_path / "fp32", **common))
    trainer = train(tiny(out_dir=tmp_path / "bf16", weights="bf16", precision="auto", **common))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert isinstance(trainer.optimizer, AdamW)
    saved = last(tmp_path / "bf16").model
    for name, weight in trainer.model.state_dict().items():
        assert saved[name].dtype == torch.float32
        assert torch.equal(saved[name].bfloat16(), weight)
        if weight.dim() == 2:
            assert not torch.equal(saved[name], weight.float())  # the masters, not what was rounded
    for a, b in zip(logged(tmp_path / "fp32"), logged(tmp_path / "bf16"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.01)
    assert logged(tmp_path / "bf16")[-1]["val_loss"] < logged(tmp_path / "bf16")[0]["train_loss"] - 0.2


def test_bf16_weights_resume_to_the_bit_and_from_fp32_ones(tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny(out_dir=tmp_path / "whole", weights="bf16", precision="auto", max_steps=8)
    cut = dataclasses.replace(whole, out_dir=tmp_path / "cut")
    train(whole)
    trainer = start(cut)
    for _ in range(5):
        trainer.step()
    trainer.save()
    train(dataclasses.replace(cut, resume=True))
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    longer = dataclasses.replace(whole, resume=True, weights="fp32", precision="fp32", max_steps=10)
    assert train(longer).steps_done == 10
    assert train(dataclasses.replace(longer, weights="bf16", precision="auto", max_steps=12)).steps_done == 12


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bf16_on_a_cpu_that_multiplies_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(runtime, "cpu_multiplies_bf16", lambda: fast)
    by_name = {
        "auto": {},
        "muon": {"optimizer": "muon"},  # which keeps no masters
        "fp32": {"weights": "fp32"},
        "autocast": {"weights": "fp32", "precision": "bf16"},
        "bf16": {"precision": "bf16"},
    }
    found = {}
    for name, changes in by_name.items():
        trainer = start(tiny(**{"precision": "auto", **changes}))
        held = torch.bfloat16 if trainer.precision.weights == "bf16" else torch.float32
        assert {p.dtype for p in trainer.model.parameters()} == {held}
        found[name] = (trainer.precision.name, trainer.precision.weights)
    auto = ("bf16", "bf16") if fast else ("fp32", "fp32")
    fp32 = ("fp32", "fp32")
    assert found == {
        "auto": auto,
        "muon": fp32,
        "fp32": fp32,
        "autocast": ("bf16", "fp32"),
        "bf16": ("bf16", "bf16"),
    }


def test_which_cpus_multiply_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert runtime.cpu_multiplies_bf16() == (
            expected and not native_missing("attention", torch.device("cpu"))
        )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is glibc's")
def test_freed_memory_is_kept() -> None:
    """16 MB that were freed are used again, where otherwise each page comes anew from the system.

    The C library learns from what is freed, and by luck of what lies behind it keeps some too: the
    environment has it return everything, which the switch overrules.
    """
    program = """if True:
        import resource, sys, torch
        from fastgpt.runtime import keep_freed_memory
        if sys.argv[1] == "keep":
            keep_freed_memory()
        for round in range(15):
            if round == 5:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            first, second, third = (torch.ones(1 << 22) for _ in range(3))
            del first, second, third
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    returning = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}

    def new_pages(way: str) -> int:
        command, environment = [sys.executable, "-c", program, way], {**os.environ, **returning}
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    kept, usual = new_pages("keep"), new_pages("usual")
    assert kept < usual / 5


def test_weights_in_bf16_exclude_other_precisions(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="precision = 'fp16': it must be bf16, as weights is"):
        tiny(weights="bf16", precision="fp16")


def test_a_chosen_kernel_updates_fp32_weights_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass that clips as well: the norm reported and the steps taken are PyTorch's."""
    trainer = start(tiny())
    monkeypatch.setattr("fastgpt.optim.reference", None)  # as if the current choice were a kernel
    other = start(tiny())
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert isinstance(other.optimizer, AdamW)
    for _ in range(3):
        torch.manual_seed(0)
        expected = trainer.step()
        torch.manual_seed(0)
        torch.testing.assert_close(other.step(), expected)
    for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# -- prefetching and garbage ---------------------------------------------------------------------------------


def test_the_next_step_is_read_meanwhile_and_each_step_gets_its_own() -> None:
    read: list[tuple[int, bool]] = []
    there = threading.Event()

    def batches(step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        read.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            there.set()
        if step == 6:
            raise InputError("shard 3 is corrupt")
        return [(np.full((2, 3), step), np.array([[step, -100, step]] * 2))]

    prefetch = Prefetcher(batches, torch.device("cpu"))
    for step in (0, 1, 5, 4):  # and after a jump, as resuming makes
        got = prefetch(step)
        ((x, y),) = got.micro_batches
        assert (x == step).all()
        assert y[0].tolist() == [step, -100, step]
        assert got.counted == 4
        assert there.wait(60)
    prefetch(5)
    assert (0, True) in read  # the first, for which nobody asked before
    assert (1, False) in read
    with pytest.raises(InputError, match="shard 3 is corrupt"):
        prefetch(6)


def test_garbage_is_collected_where_the_loop_says_only() -> None:
    collections: list[str] = []
    gc.callbacks.append(lambda phase, _: collections.append(phase))
    try:
        with runtime.no_garbage_collection():
            collections.clear()
            cycles: list[Any] = [[] for _ in range(20_000)]
            for cycle in cycles:
                cycle.append(cycle)
            assert not collections
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.callbacks.pop()


# -- recomputation -------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Of the tensors that operations make: how many bytes are still held, by whomever."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)  # its address is not used again while this lives
                self._made.setdefault(reference.cdata, (reference, storage.nbytes()))
        return outputs

    def held(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def test_recomputing_keeps_less_and_computes_the_same() -> None:
    """The bytes that are held between forward and backward, and gradients equal to the bit."""
    B, T, C, L = 2, 16, 32, 3
    config = GPTConfig(vocab_size=60, block_size=T, n_layer=L, n_head=2, n_embd=C, dropout=0.1)
    torch.manual_seed(0)
    model = GPT(config)
    idx = torch.randint(60, (B, T))
    kept, gradients = {}, {}
    for what in ("none", "gelu", "block"):
        model.recompute(what)
        model.zero_grad()
        torch.manual_seed(1)
        with Allocations() as allocations:
            loss = model(idx, idx, return_logits=False)[1]
            kept[what] = allocations.held()
        loss.backward()
        gradients[what] = [p.grad.clone() for p in model.parameters()]
    activation = B * T * C * 4
    assert kept["none"] - kept["gelu"] == L * 4 * activation  # 4C a token and layer
    assert kept["block"] < kept["none"] - L * 16 * activation
    for what in ("gelu", "block"):
        for expected, gradient in zip(gradients["none"], gradients[what], strict=True):
            assert torch.equal(gradient, expected), what


def test_relu_keeps_nothing_that_could_be_computed_again(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="recompute = 'gelu': it must be none or block, with relu"):
        tiny(recompute="gelu", model=dataclasses.replace(tiny().model, activation="relu"))


def test_a_run_recomputes_as_it_is_told(tiny: Tiny, tmp_path: Path) -> None:
    for what in ("none", "gelu", "block"):
        train(tiny(out_dir=tmp_path / what, recompute=what, max_steps=4))
        assert_same_state(tmp_path / "none", tmp_path / what)
