"""Several processes that train one network: `torchrun --nproc-per-node 8 -m fastgpt train ...`.

All ranks hold the same settings and take the same decisions; what differs is the rows of a batch that a rank
reads, and that rank 0 alone writes files and prints. Gradients and losses are averaged over ranks. Tensors on
GPUs are reduced by NCCL; what the host itself has to know (whether to stop, generator states) goes through
gloo, which does not wait for the device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt import runtime
from fastgpt.errors import InputError, TrainingStopped


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is; by itself a run of one process."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)

    def sum(self, value: Tensor) -> Tensor:
        """`value` added up over the ranks, in place; the host does not wait for it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """`value` averaged over the ranks, in place; the host does not wait for it."""
        if self.size > 1:
            self.sum(value)
            value /= self.size
        return value

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The CPU tensors of all ranks, which have the same shape, by rank."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor)
        return gathered

    def from_main(self, value: Any) -> Any:
        """What rank 0 passes, on all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))  # on the CPU, where dist.barrier would take the GPU

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """The first rank of each machine runs the block before the others, which find its work done."""
        if self.local_rank != 0:
            self.barrier()
        try:
            yield
        finally:
            if self.local_rank == 0:
                self.barrier()


class Vote:
    """Whether any rank says yes: asked in one call and answered in the next, so that no rank waits.

    All ranks call it equally often and so get the same answer in the same step.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked: tuple[Tensor, dist.Work] | None = None

    def __call__(self, mine: bool) -> bool:
        if self._world.size == 1:
            return mine
        yes = self.close()
        flag = torch.tensor([int(mine)])  # on the CPU: reduced while the device computes
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._asked = (flag, work)
        return yes

    def close(self) -> bool:
        """The answer to the last call."""
        if self._asked is None:
            return False
        flag, work = self._asked
        work.wait()
        self._asked = None
        return bool(flag.item())


@contextlib.contextmanager
def joined(device: str, timeout_minutes: float, advice: str = "") -> Iterator[World]:
    """The world that torchrun's environment describes; one process where there is none.

    Args:
        device: `auto`, `cuda` or `cpu`; with several processes each takes the GPU of its LOCAL_RANK.
        timeout_minutes: how long a rank waits for the others before it gives up.
        advice: what to do then, for the message.

    Raises:
        InputError: the device does not exist, or cannot be shared out.
        TrainingStopped: another process died or stopped answering while the block ran.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(runtime.resolve_device(device))
        return
    world = _world(device, size)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        yield world
        world.barrier()
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise TrainingStopped(
            f"rank {world.rank} of {size} lost the others: one of them died, or did not answer within "
            f"{timeout_minutes:g} minutes. What that one printed says why{advice and '; '}{advice}. "
            f"({str(error).splitlines()[0]})"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun started the processes again after one of them failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _world(name: str, size: int) -> World:
    try:
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except (KeyError, ValueError):
        raise InputError(
            f"WORLD_SIZE is {size}, but RANK and LOCAL_RANK are not both set: "
            "start the processes with torchrun"
        ) from None
    device = runtime.resolve_device(name)
    if device.type == "mps" or device.index is not None:
        raise InputError(f"device {name!r} is one for all {size} processes: use --device cuda, cpu or auto")
    if device.type == "cuda":
        device = runtime.resolve_device(f"cuda:{local_rank}")
    return World(device, rank, size, local_rank, local_size)


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether a collective failed: gloo's errors have no class of their own."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "closed by peer")
    )


def replicated(model: nn.Module, world: World) -> nn.Module:
    """A GPT on world.device whose backward pass, outside its `no_sync`, averages gradients over the ranks.

    Every rank gets rank 0's weights.
    """
    if world.size == 1:
        return model
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # After its first backward pass DDP lays the gradients out anew, in the order in which they came, and the
    # place of a gradient decides in which order the ranks' are added. With that done here, on nothing, a
    # resumed run adds in the order of an uninterrupted one.
    generators = runtime.rng_state(world.device)
    idx = torch.zeros((1, 1), dtype=torch.int64, device=world.device)
    network(idx, idx, return_logits=False)[1].backward()
    model.zero_grad(set_to_none=True)
    runtime.set_rng_state(generators, world.device)
    return network
