"""Several processes of one run, forked from the test's own: no import again, and gloo between them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

SECONDS = 240  # of a machine that has much else to do


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _child(pipe: Connection, environment: dict[str, str], function: Callable[[], Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        pipe.send((True, function()))
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def outcomes(size: int, function: Callable[[], Any], local_size: int | None = None) -> list[tuple[bool, Any]]:
    """What `function` gives on each of `size` ranks: (True, value), (False, error), (False, None) if killed.

    `function` finds its rank in the environment, as under torchrun with `local_size` processes a machine.
    """
    fork, port = multiprocessing.get_context("fork"), free_port()
    local_size = local_size or size
    running = []
    for rank in range(size):
        ours, theirs = fork.Pipe()
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % local_size),
            "LOCAL_WORLD_SIZE": str(local_size),
        }
        process = fork.Process(target=_child, args=(theirs, environment, function))
        process.start()
        theirs.close()
        running.append((process, ours))
    results: list[tuple[bool, Any]] = []
    try:
        for _, pipe in running:
            try:
                assert pipe.poll(SECONDS), "a rank did not answer"
                results.append(pipe.recv())
            except EOFError:
                results.append((False, None))
    finally:
        for process, _ in running:
            process.join(0 if len(results) < size else 30)
            process.kill()
            process.join()
    return results


def each_rank(size: int, function: Callable[[], Any], local_size: int | None = None) -> list[Any]:
    """The values of `function` on all ranks; AssertionError with the first traceback where one failed."""
    results = outcomes(size, function, local_size)
    for rank, (succeeded, value) in enumerate(results):
        assert succeeded, f"rank {rank}: {value}"
    return [value for _, value in results]


def pid_of_rank(rank: int, parent: int) -> int:
    """The process of that rank that `parent` started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone since, or not ours to read
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            environment = (folder / "environ").read_bytes().split(b"\0")
            if int(status[1]) == parent and f"RANK={rank}".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")
