"""The machine a run finds itself on: device, precision, seeds, and a record of the environment."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt import __version__
from fastgpt.chips import peak_flops
from fastgpt.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda, else mps, else cpu.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}: choose auto, cuda, cuda:N, mps or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device {name!r}: PyTorch {torch.__version__} finds no usable CUDA GPU here (`nvidia-smi` shows "
            "whether the driver does); use --device cpu or auto"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA GPU(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device {name!r}: no Apple GPU here; use --device cpu or auto")
    if device.type not in ("cuda", "mps", "cpu"):
        raise InputError(f"device {name!r}: fastgpt runs on cuda, mps and cpu")
    return device


@dataclass(frozen=True)
class Precision:
    """How a training step computes. `name` is fp32, tf32, bf16 or fp16, `weights` fp32 or bf16."""

    name: str
    device: torch.device
    weights: str = "fp32"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What casts fp32 weights and activations in each step."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        if dtype is None or self.weights == "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    def scaler(self, *, shared: bool = False) -> torch.amp.GradScaler:
        """fp16 gradients underflow, so the loss is scaled up; elsewhere this does nothing.

        Of a `shared` one all ranks skip the step in which a gradient of any of them overflowed.
        """
        if shared:
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

            return ShardedGradScaler(self.device.type, enabled=self.name == "fp16")
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")

    def peak_flops(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return peak_flops(torch.cuda.get_device_name(self.device), self.name)


def resolve_precision(
    name: str, device: torch.device, weights: str = "auto", *, masters: bool = True
) -> Precision:
    """The precision of that name on `device`, with the TF32 switch set to match.

    Args:
        name: `auto` is the dtype of bf16 `weights`, else bf16 on a GPU that has it and on a CPU that
            multiplies it, if weights may be bf16, and fp32 elsewhere.
        device: to compute on.
        weights: `auto` is bf16 on a CPU that computes in bf16, and fp32 elsewhere.
        masters: whether the optimizer keeps fp32 masters of bf16 weights.

    Raises:
        InputError: the device does not have it.
    """
    cpu, cuda = device.type == "cpu", device.type == "cuda"
    has_bf16 = cpu or (cuda and torch.cuda.is_bf16_supported())
    follow = weights == "auto" and cpu and masters  # weights are then what is computed in
    if name == "auto":
        fast = (cuda and has_bf16) or (follow and cpu_multiplies_bf16())
        name = "bf16" if weights == "bf16" or fast else "fp32"
    if weights == "auto":
        weights = "bf16" if follow and name == "bf16" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise InputError("precision tf32 needs an NVIDIA GPU: use fp32 or bf16")
    if name == "bf16" and not has_bf16:
        raise InputError(f"precision bf16 is not supported on this {device.type} device: use fp16 or fp32")
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return Precision(name, device, weights)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 and the native kernels for all around them."""
    from fastgpt.ops.library import native_missing

    ask: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # which may not be there
    has = ask()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16")) and not native_missing(
        "attention", torch.device("cpu")
    )


def keep_freed_memory() -> None:
    """Have the C library keep what the process frees, for it to use again.

    Otherwise activations go back to the system in each step, and come again as pages to be zeroed, one by
    one: a quarter of a small model's step (docs/cpu.md). Blocks of 32 MB and more are given back all the
    same. Only glibc has such a switch; elsewhere nothing changes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators that dropout draws from, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def rank_seed(seed: int, rank: int) -> int:
    """A seed for what ranks draw each for itself, such as dropout; for rank 0 `seed` itself."""
    return seed + (rank << 32)


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo whatever was drawn since `rng_state`; a state of another device type is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C or SIGTERM came; the second Ctrl-C stops at once."""
    received: list[int] = []

    def note(signum: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python collects cycles only where the block calls `gc.collect()`, and never what was there before.

    A collection at a moment of its own choosing would hold up one rank, and with it all the others.
    """
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def git_revision() -> str | None:
    """The commit of the source tree fastgpt runs from, with `-dirty` if it was changed; None outside git."""
    source = Path(__file__).parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    """The processor as the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """What the device is: the GPU's name as its driver reports it, or the processor's as the system does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader of the results needs to know about the machine and the software."""
    return {
        "fastgpt": __version__,
        "git": git_revision(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "triton": _triton_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
