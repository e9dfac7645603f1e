"""Where and when rows were measured: the last fields of `results.Row`."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import torch

from fastgpt.benchmarks.results import machine_name
from fastgpt.runtime import device_name, environment


def new_run() -> str:
    """A name for this invocation: "20261124-181503"."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def where(device: torch.device, *, run: str, threads: int | None = None) -> dict[str, Any]:
    """The fields of a Row that say where and when, for rows made now; `threads` are those of the CPU."""
    found = environment(device)
    name = device_name(device)
    if threads is None and device.type == "cpu":
        threads = torch.get_num_threads()
    return {
        "run": run,
        "time": now(),
        "machine": machine_name(name, threads or 0),
        "device": device.type,
        "device_name": name,
        "threads": threads,
        "driver": query_gpu(device, "driver_version"),
        "versions": versions(found),
        "git": found["git"] or "",
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def versions(found: dict[str, Any]) -> str:
    """Those of `fastgpt.runtime.environment` in one line."""
    names = ("python", "torch", "cuda", "triton", "fastgpt")
    return ", ".join(f"{name} {found[name]}" for name in names if found[name])


def query_gpu(device: torch.device, fields: str) -> str:
    """What nvidia-smi says of the GPU: "580.95.05"; "" on a CPU, or where there is no nvidia-smi."""
    if device.type != "cuda":
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(_nvidia_smi(device, fields), capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def _nvidia_smi(device: torch.device, fields: str) -> list[str]:
    # By its UUID: CUDA_VISIBLE_DEVICES renumbers the devices that PyTorch sees.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return ["nvidia-smi", f"--id={uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]


class Clocks:
    """A GPU's clocks inside a block, read while it works; `text` is "" on a CPU.

    >>> with clocks_during(device) as clocks:
    ...     timings = measure(...)
    >>> clocks.text
    'sm 1980 MHz, memory 2619 MHz'
    """

    text = ""


@contextlib.contextmanager
def clocks_during(device: torch.device) -> Iterator[Clocks]:
    clocks = Clocks()
    process = None
    if device.type == "cuda":
        with contextlib.suppress(OSError):
            command = _nvidia_smi(device, "clocks.sm,clocks.mem")
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield clocks
    finally:
        if process is not None:
            values = process.communicate()[0].strip().split(", ")
            if process.returncode == 0 and len(values) == 2:
                clocks.text = f"sm {values[0]} MHz, memory {values[1]} MHz"
