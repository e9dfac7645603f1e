"""`fastgpt plan`: what a run would need on GPUs that are not here, as a table of computed figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from tyro.conf import Positional

from fastgpt.chips import Chip, chip
from fastgpt.config import Parallel, Recompute, TrainConfig, Weights
from fastgpt.errors import InputError

if TYPE_CHECKING:
    from fastgpt.plan import Exchange, Memory, Setup, Step

# What is planned: of another network, what it keeps for backward is not counted.
PLANNED = {
    "position": ("learned",),
    "norm": ("layer_norm",),
    "qk_norm": (False,),
    "activation": ("gelu_tanh", "gelu_erf"),
}


@dataclass
class PlanArgs:
    """Compute memory, exchange and time of a run on given GPUs. Nothing is measured, and no GPU is needed."""

    preset: Positional[str]
    """A preset, or a YAML file of settings."""
    gpus: int = 8
    """GPUs in all."""
    chip: str = "h100"
    """Which: a name of chips.yaml, an architecture (sm_90), or the driver's name."""
    gpus_per_node: int = 8
    """GPUs of a machine."""
    tokens: float = 10e9
    """How many the run is to train on."""
    batch_size: int | None = None
    """Sequences a step, over all ranks; by default the preset's."""
    micro_batch_size: int | None = None
    """Sequences of a forward pass; by default the most that fit, of those that divide a rank's share."""
    weights: Weights | None = None
    """What the network holds: fp32, cast by autocast, or bf16; by default the preset's."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] | None = None
    """What products are computed in; by default the preset's, auto being bf16 where the chip has it."""
    recompute: Recompute | None = None
    """What backward computes again: none, gelu or block; by default the preset's."""
    network: float | None = None
    """GB/s in each direction from a GPU to other machines; by default that of NVIDIA's own machine."""
    mfu: float | None = None
    """Also the time at this share of the chip's peak, such as 0.4: an assumption of yours."""


@dataclass(frozen=True)
class Column:
    """The plan of one layout. `step` is None where it does not fit."""

    setup: Setup
    memory: Memory
    exchange: Exchange
    step: Step | None


def command(args: Sequence[str]) -> None:
    from fastgpt.cli import load_settings, parse

    given = parse(PlanArgs, args, "plan")
    _check(given)
    config = load_settings(given.preset)
    print(describe(given, config, chip(given.chip)))


def _check(given: PlanArgs) -> None:
    for name in ("gpus", "gpus_per_node", "tokens", "batch_size", "micro_batch_size", "network", "mfu"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} = {value}: it must be greater than 0")
    if given.gpus > given.gpus_per_node and given.gpus % given.gpus_per_node:
        raise InputError(
            f"gpus = {given.gpus}: it must be a multiple of gpus_per_node = {given.gpus_per_node}"
        )


def describe(given: PlanArgs, config: TrainConfig, device: Chip) -> str:
    """The whole page.

    Raises:
        InputError: a batch that the GPUs cannot share, a precision that the chip lacks, an unknown network.
    """
    from fastgpt.plan import RESERVE, on_meta

    columns = plan(given, config, device)
    one, capacity = columns[0].setup, device.memory - RESERVE
    machines = math.ceil(given.gpus / given.gpus_per_node)
    params = f"{on_meta(one.model).num_params():,} parameters"
    lines = [
        "COMPUTED: every figure here is computed from sizes and the chip's data sheet; none is measured.",
        "",
        f"model     {given.preset}: {params}, {one.model.block_size} tokens a sequence",
        f"batch     {one.batch_size} sequences = {one.batch_size * one.model.block_size:,} tokens a step",
        f"GPUs      {given.gpus} x {device.name} in {machines} {'machine' if machines == 1 else 'machines'}: "
        f"{device.memory >> 30} GiB each, of which {RESERVE >> 30} are set aside (assumed)",
        f"computing {one.precision}, weights {one.weights}, recompute {one.recompute}, a kernel for every "
        "operation (FASTGPT_OPS=triton or native)",
        "",
        *_table(columns, given, device),
        "",
    ]
    for column in columns:
        if column.step is None:
            lines.append(_too_large(column, capacity))
    lines.append("What is counted, and what is not: docs/plan.md")
    return "\n".join(lines)


def plan(given: PlanArgs, config: TrainConfig, device: Chip) -> list[Column]:
    """A column for each layout that these GPUs can have.

    Raises:
        InputError: a network or an optimizer whose memory is not known, a batch that the GPUs cannot share.
    """
    from fastgpt import plan as computed

    for name, known in PLANNED.items():
        if (value := getattr(config.model, name)) not in known:
            with_these = " or ".join(map(repr, known))
            raise InputError(
                f"{name} = {value!r}: only networks like GPT-2, with {with_these}, can be planned"
            )
    if config.optimizer != "adamw":
        raise InputError(f"optimizer = {config.optimizer!r}: only runs with adamw can be planned")
    batch = given.batch_size or config.batch_size
    if batch % given.gpus:
        raise InputError(f"batch_size = {batch}: it must be a multiple of gpus = {given.gpus}")
    share = batch // given.gpus
    if given.micro_batch_size is not None and given.micro_batch_size > share:
        raise InputError(
            f"micro_batch_size = {given.micro_batch_size}: a rank has only {share} sequences of a step"
        )
    columns = []
    for layout in get_args(Parallel):
        if layout == "hsdp" and given.gpus <= given.gpus_per_node:
            continue
        if layout != "ddp" and given.gpus == 1:
            continue
        setup = computed.Setup(
            model=config.model,
            layout=layout,
            gpus=given.gpus,
            gpus_per_node=given.gpus_per_node,
            batch_size=batch,
            micro_batch=given.micro_batch_size or 1,
            weights=_weights(given, config),
            precision=_precision(given, config, device),
            recompute=given.recompute or config.recompute,
        )
        capacity = device.memory - computed.RESERVE
        if given.micro_batch_size is None:
            setup = replace(setup, micro_batch=computed.micro_batch_that_fits(setup, capacity) or 1)
        needed = computed.memory(setup)
        network = None if given.network is None else given.network * 1e9
        seconds = computed.step(setup, device, network=network) if needed.peak <= capacity else None
        columns.append(Column(setup, needed, computed.exchange(setup), seconds))
    return columns


def _weights(given: PlanArgs, config: TrainConfig) -> Weights:
    """As resolve_precision has it on a GPU."""
    weights = given.weights or config.weights
    return "fp32" if weights == "auto" else weights


def _precision(given: PlanArgs, config: TrainConfig, device: Chip) -> str:
    """As resolve_precision has it on a GPU.

    Raises:
        InputError: bf16 weights in another precision, or a precision that the chip does not have.
    """
    from fastgpt.plan import known_peak

    weights = _weights(given, config)
    name = given.precision or config.precision
    if name == "auto":
        name = "bf16" if weights == "bf16" or device.peak("bf16") else "fp32"
    if weights == "bf16" and name != "bf16":
        raise InputError(f"precision = {name!r}: it must be bf16, as weights is")
    known_peak(device, name)
    return name


def _table(columns: list[Column], given: PlanArgs, device: Chip) -> list[str]:
    def memory(part: Callable[[Memory], int]) -> list[str]:
        return [f"{part(column.memory) / 2**30:.2f}" for column in columns]

    def time(part: Callable[[Step], str]) -> list[str]:
        return [part(column.step) if column.step else "-" for column in columns]

    def steps(setup: Setup) -> int:
        return math.ceil(given.tokens / (setup.batch_size * setup.model.block_size))

    def until(column: Column, seconds: float | None) -> str:
        return "-" if seconds is None else _duration(steps(column.setup) * seconds)

    rows: list[tuple[str, list[str]]] = [
        ("", [column.setup.layout for column in columns]),
        ("micro-batch, sequences", [str(column.setup.micro_batch) for column in columns]),
        ("micro-batches a step", [str(column.setup.micro_batches) for column in columns]),
        ("memory of a rank, GiB (computed)", []),
        ("  weights, masters, gathered copies", memory(lambda m: m.weights)),
        ("  gradients", memory(lambda m: m.gradients)),
        ("  AdamW's moments", memory(lambda m: m.moments)),
        ("  held for backward", memory(lambda m: m.activations)),
        ("  more at the worst moment", memory(lambda m: m.working)),
        ("  in all", memory(lambda m: m.peak)),
        ("  fits", ["yes" if column.step else "NO" for column in columns]),
        ("sent by a rank in a step, GB (computed)", [f"{c.exchange.step / 1e9:.2f}" for c in columns]),
        ("time of a step at least, ms (computed)", []),
        ("  a forward pass", time(lambda s: f"{1e3 * s.forward:.2f}")),
        ("  a backward pass", time(lambda s: f"{1e3 * s.backward:.2f}")),
        ("  optimizer", time(lambda s: f"{1e3 * s.optimizer:.2f}")),
        ("  exchange", time(lambda s: f"{1e3 * s.exchange:.2f}")),
        ("  exchange that is waited for", time(lambda s: f"{1e3 * s.waiting:.2f}")),
        ("  in all", time(lambda s: f"{1e3 * s.total:.1f}")),
        ("MFU if so (computed)", time(lambda s: f"{s.mfu:.0%}")),
        (
            f"{given.tokens:,.0f} tokens at least (computed)",
            [until(column, column.step.total if column.step else None) for column in columns],
        ),
    ]
    if given.mfu is not None:
        share = given.mfu
        rows.append(
            (
                f"the same at {share:.0%} MFU (assumed)",
                [until(c, c.step.total * c.step.mfu / share if c.step else None) for c in columns],
            )
        )
    wide = max(len(name) for name, _ in rows)
    return [f"{name:<{wide}}" + "".join(f"{cell:>11}" for cell in cells) for name, cells in rows]


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} d"
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _too_large(column: Column, capacity: int) -> str:
    setup = column.setup
    ways = ["a smaller --micro-batch-size"] if setup.micro_batch > 1 else []
    ways += ["--recompute block"] if setup.recompute != "block" else []
    ways += ["another layout"] if setup.layout in ("ddp", "zero1") else ["more GPUs"]
    needed, given = column.memory.peak / 2**30, capacity / 2**30
    return (
        f"{setup.layout} does not fit with {setup.micro_batch} a micro-batch: {needed:.1f} GiB of "
        f"{given:.1f} (computed). Try {' or '.join(ways)}."
    )
