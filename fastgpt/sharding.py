"""Weights and optimizer state shared out over the ranks, for networks that leave no room for a copy on each.

`fully_shard` (FSDP2) splits each parameter along its first dimension, with its gradient and its moments, and
gathers a block's weights when it is about to run. Three layouts of it (d = ranks, N = parameters):

    fsdp    weights are dropped after each forward and backward pass and gathered for the next; gradients are
            reduced and split in each micro-batch. Least memory: everything is split.
    zero1   weights are gathered once a step and gradients reduced once a step, as DDP does, so each rank
            holds both whole meanwhile; only what lives between steps (fp32 weights, moments) is split.
    hsdp    fsdp within each machine, whose links are fast, and gradients averaged over machines.

ZeRO-1 is this rather than torch.distributed.optim.ZeroRedundancyOptimizer because that one splits by whole
parameters, of which GPT-2's embedding alone is a third, and its state is saved on the number of ranks that
wrote it only. With bf16 weights the shards are the fp32 masters, and what is gathered is cast.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastgpt.config import Parallel
from fastgpt.distributed import World, replicated
from fastgpt.errors import InputError
from fastgpt.model import GPT


def arranged(model: GPT, world: World, layout: Parallel, weights: str) -> nn.Module:
    """What to call to train a GPT on the ranks of a world.

    Args:
        model: on world.device, in fp32, equal on all ranks; converted and split in place.
        world: the ranks.
        layout: what each of them holds; of no matter to one alone.
        weights: fp32, or bf16 to compute in; split ones are then gathered as bf16, reduced as fp32.

    Raises:
        InputError: hsdp on one machine.
    """
    if world.size > 1 and layout != "ddp":
        return _sharded(model, world, layout, weights)
    if weights == "bf16":
        model.bfloat16()
    return replicated(model, world)


def _sharded(model: GPT, world: World, layout: Parallel, weights: str) -> nn.Module:
    mesh = _mesh(world, layout)
    policy = MixedPrecisionPolicy()
    if weights == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=layout != "zero1")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def _mesh(world: World, layout: Parallel) -> DeviceMesh:
    if layout != "hsdp":
        return init_device_mesh(world.device.type, (world.size,))
    machines, rest = divmod(world.size, world.local_size)
    if machines < 2 or rest:
        raise InputError(
            f"parallel = 'hsdp': {world.size} processes, {world.local_size} on this machine, are not several "
            "equal machines: use fsdp"
        )
    return init_device_mesh(
        world.device.type, (machines, world.local_size), mesh_dim_names=("replicate", "shard")
    )


def accumulating(
    network: nn.Module, layout: Parallel, *, last: bool
) -> contextlib.AbstractContextManager[None]:
    """Around a micro-batch: ranks exchange gradients in the `last` of a step only.

    Under fsdp and hsdp they do so in each, so that none ever holds a whole gradient.
    """
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    if isinstance(network, FSDPModule) and layout == "zero1":
        network.set_requires_gradient_sync(last)
        network.set_reshard_after_backward(last)
    return contextlib.nullcontext()


def is_split(model: nn.Module) -> bool:
    """Whether each rank holds a part of the parameters only."""
    return isinstance(model, FSDPModule)


def split_again(model: nn.Module) -> None:
    """After forward passes without backward, which leave weights gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """All of a tensor that may be split, on the CPU; all ranks take part, and those that `keep` get it."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full.to("cpu", copy=True) if keep else torch.empty(0)


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, split as `parameter` is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor  # whole, or the step count of a split parameter
    here = tensor.to(parameter.device)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_model(model: GPT, world: World, *, everywhere: bool = False) -> GPT:
    """A model that rank 0 can use alone, such as to sample, or each `everywhere`; all ranks take part."""
    if not is_split(model):
        return model
    keep = everywhere or world.main
    weights = {name: whole(value, keep=keep) for name, value in model.state_dict().items()}
    if not keep:
        return model
    with torch.device("meta"):
        copy = GPT(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy.to(world.device)


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, each rank its own parts, as safetensors; all ranks take part."""
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole or split over however many ranks, with what `save_shards` wrote."""
    no_group = not torch.distributed.is_initialized()
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_group)
