"""What a run would need on given GPUs, computed before any is rented: memory, exchange, time.

Nothing here is measured. Memory is counted from what the code keeps: parameters and their copies, gradients,
moments, and the tensors that each operation's `save` holds for backward (fastgpt/ops/*.py, with kernels). The
largest of four moments of a micro-batch decides: the loss, the classifier's gradient, the first block's
backward pass, and the embedding's. A step takes at least as long as its operations at the chip's peaks, each
bound by its products or by its bytes, and as what is exchanged and cannot go on beside them.

Notation: N parameters, d ranks, m micro-batches a step, M = B T tokens of a micro-batch, C channels, L
layers, V rows of the padded vocabulary.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastgpt.chips import PRECISIONS, Chip
from fastgpt.config import GPTConfig, Parallel, Recompute, Weights
from fastgpt.errors import InputError
from fastgpt.model import GPT
from fastgpt.ops.adamw import cost as adamw_cost
from fastgpt.ops.adamw import norm_cost
from fastgpt.ops.attention import cost as attention_cost
from fastgpt.ops.embedding import cost as embedding_cost
from fastgpt.ops.gelu import linear_cost as linear_gelu_cost
from fastgpt.ops.layer_norm import add_cost
from fastgpt.ops.linear import cost as linear_cost
from fastgpt.ops.linear_cross_entropy import cost as loss_cost
from fastgpt.ops.registry import Cost

CHUNK_ROWS = 4096  # of linear_cross_entropy
# Of a GPU's memory, what no tensor gets: CUDA's context, NCCL's buffers, and what the allocator cannot use
# between blocks. An assumption, not a measurement.
RESERVE = 2 << 30
# C values a token beside what is kept, while the MLP's backward pass runs: the gradients of the residual
# stream (1), of GELU's output (4), of its input (4) and of the MLP's (1), less GELU's output (4), which is no
# longer needed. Where that alone is computed again, it is not there to be freed; with the whole block the
# MLP's output (1) is there again too.
_BACKWARD_WIDTHS = {"none": 6, "gelu": 10, "block": 7}


@dataclass(frozen=True)
class Setup:
    """A run to plan: what of its settings decides memory and time, and where it is to run.

    `precision` is what products are computed in: fp32, tf32, bf16 or fp16; `weights` what the network holds.
    """

    model: GPTConfig
    layout: Parallel
    gpus: int
    gpus_per_node: int
    batch_size: int  # sequences a step, over all ranks
    micro_batch: int  # sequences of a rank's forward pass
    weights: Weights = "fp32"
    precision: str = "bf16"
    recompute: Recompute = "none"

    @property
    def micro_batches(self) -> int:
        """Of a rank in a step."""
        return math.ceil(self.batch_size / self.gpus / self.micro_batch)

    @property
    def shards(self) -> int:
        """Ranks that share a parameter out among them."""
        if self.layout == "ddp":
            return 1
        return self.gpus_per_node if self.layout == "hsdp" else self.gpus

    @property
    def weight_bytes(self) -> int:
        return 2 if self.weights == "bf16" else 4

    @property
    def activation_bytes(self) -> int:
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def casts(self) -> bool:
        """Whether autocast makes a copy of each matrix in each micro-batch."""
        return self.weight_bytes != self.activation_bytes


@dataclass(frozen=True)
class Sizes:
    """Elements of parameters: all of them, a block's, those outside blocks, and a rank's share of each."""

    total: int
    block: int
    root: int
    share: int
    block_share: int
    tensors: int  # how many there are


def sizes(setup: Setup) -> Sizes:
    """Padded vocabulary rows count: they take memory as any other."""
    return _sizes(setup.model, setup.shards)


@functools.cache
def _sizes(config: GPTConfig, parts: int) -> Sizes:
    model = on_meta(config)

    def share(module: nn.Module) -> int:
        """Of the first rank; the last one gets what rows are left."""
        return sum(math.ceil(p.shape[0] / parts) * math.prod(p.shape[1:]) for p in module.parameters())

    first = model.transformer.h[0]
    total, block = (sum(p.numel() for p in part.parameters()) for part in (model, first))
    return Sizes(
        total=total,
        block=block,
        root=total - config.n_layer * block,
        share=share(model),
        block_share=share(first),
        tensors=len(list(model.parameters())),
    )


def on_meta(config: GPTConfig) -> GPT:
    """The network without the memory of its weights."""
    with torch.device("meta"):
        return GPT(config)


# -- memory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. `peak` is all of it at the worst moment, without RESERVE."""

    weights: int  # with fp32 masters, and whole copies where they are gathered
    gradients: int
    moments: int
    activations: int  # held from forward to backward
    working: int  # more than those at the worst moment

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations + self.working


def block_activations(setup: Setup) -> int:
    """Bytes that a block keeps for its backward pass where nothing is computed again.

    LayerNorms keep the stream that they normalise and their statistics, the linear layers their inputs,
    attention q, k, v, its output (which the projection's input is) and lse, GELU its input.
    """
    c = setup.model
    tokens, a = setup.micro_batch * c.block_size, setup.activation_bytes
    stream = max(a, setup.weight_bytes)  # under autocast the residual stream stays fp32
    widths = 2 + 3 + 1 + 4 + 4  # inputs of c_attn and c_fc, qkv, o, GELU's input and output
    statistics = 2 * 2 * 4 + 4 * c.n_head  # mean and rstd of two LayerNorms, lse
    return tokens * (c.n_embd * (2 * stream + widths * a) + statistics)


def activations(setup: Setup) -> int:
    """Bytes held between the forward and the backward pass of a micro-batch, the loss's gradients included.

    Exact for kernels (`native`, `triton`) without dropout, up to a scalar or two.
    """
    c = setup.model
    tokens, a = setup.micro_batch * c.block_size, setup.activation_bytes
    stream = max(a, setup.weight_bytes)
    width = tokens * c.n_embd
    kept = c.n_layer * block_activations(setup)
    if setup.recompute == "gelu":
        kept -= c.n_layer * 4 * width * a
    elif setup.recompute == "block":  # x, and the branch not yet added to it, but before the first block
        kept = c.n_layer * width * stream + (c.n_layer - 1) * width * a
    embedding = 8 * tokens + (width if c.dropout else 0)  # indices, and the dropout's mask of bytes
    final = width * stream + 8 * tokens  # ln_f
    return kept + embedding + final + _cast_matrices(setup) + width * a + _classifier_gradient(c)


def _cast_matrices(setup: Setup, *, forward: bool = False) -> int:
    """Bytes of autocast's copies of the blocks' matrices that backward reads, or until `forward` ends too.

    Of C^2 elements a block has c_attn 3, c_proj 1, c_fc 4 and the MLP's c_proj 4. What is computed again is
    cast again; autocast's cache keeps what torch.nn.Linear was given until forward ends.
    """
    kept = {"none": 12, "gelu": 8, "block": 0}[setup.recompute]
    cached = {"none": 12, "gelu": 12, "block": 8}[setup.recompute]
    c = setup.model
    squares = (cached if forward else kept) * setup.casts
    return squares * setup.activation_bytes * c.n_layer * c.n_embd**2


def _classifier_gradient(c: GPTConfig) -> int:
    """Of the classifier's weights: fp32, made with the loss."""
    return 4 * c.padded_vocab_size * c.n_embd


def memory(setup: Setup) -> Memory:
    """What a rank holds at the worst moment of a step."""
    c, size = setup.model, sizes(setup)
    tokens, a, w = setup.micro_batch * c.block_size, setup.activation_bytes, setup.weight_bytes
    vocabulary, width = c.padded_vocab_size * c.n_embd, tokens * c.n_embd
    split = setup.layout != "ddp"
    weights, gradients, moments = held_between(setup)
    exchange = 0
    if setup.layout == "zero1":
        weights += w * size.total
        gradients += (4 if setup.micro_batches > 1 else w) * size.total
        exchange = 4 * size.block  # laid out to be reduced
    elif split:
        weights += w * (size.root + 2 * size.block)  # a block, and the next one on its way
        exchange = (w + 4) * size.block  # its whole gradient, and that laid out to be reduced
    kept = activations(setup)
    again = block_activations(setup) if setup.recompute == "block" else 0
    chunk = math.ceil(tokens / math.ceil(tokens / CHUNK_ROWS))
    logits = a * (c.padded_vocab_size * chunk + vocabulary)  # and the weights padded, or a product for dW
    cast = _cast_matrices(setup, forward=True) - _cast_matrices(setup)
    cast += setup.casts * (a * vocabulary + 4 * width)  # the classifier, and its input as ln_f made it
    backward = a * _BACKWARD_WIDTHS[setup.recompute] * width
    waiting = w * vocabulary if c.tied_head else 0  # the classifier's gradient, for the embedding's
    phases = {
        "loss": kept + logits + cast + width * a,
        "classifier": kept + w * vocabulary + width * a,
        "last block": kept - _classifier_gradient(c) + again + backward + waiting + exchange,
        "embedding": w * vocabulary + waiting + 2 * width * a + (4 * size.root if split else 0),
    }
    worst = max(phases.values())
    return Memory(weights, gradients, moments, kept, max(worst - kept, 0))


def held_between(setup: Setup) -> tuple[int, int, int]:
    """(weights and masters, gradients, moments) of a rank when a step's gradients are there; exact."""
    size, w = sizes(setup), setup.weight_bytes
    counters = 4 * size.tensors  # AdamW's step of each parameter
    if setup.layout == "ddp":
        masters = 4 if setup.weights == "bf16" else 0
        return (w + masters) * size.total, w * size.total, 8 * size.total + counters
    return 4 * size.share, 4 * size.share, 8 * size.share + counters


def micro_batch_that_fits(setup: Setup, capacity: int) -> int | None:
    """The most sequences, of those that divide a rank's, whose peak is within `capacity` bytes."""
    rows = setup.batch_size // setup.gpus
    divisors = (size for size in range(rows, 0, -1) if rows % size == 0)
    return next(
        (size for size in divisors if memory(replace(setup, micro_batch=size)).peak <= capacity), None
    )


# -- what ranks exchange -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """Bytes that a rank sends, by ring algorithms, and what can go on beside each."""

    gathered_forward: float = 0.0  # weights, of a micro-batch
    gathered_backward: float = 0.0
    reduced: float = 0.0  # gradients of a micro-batch, within a machine where the layout is hsdp
    reduced_across: float = 0.0  # machines
    times: int = 1  # a step: 1, or each micro-batch

    @property
    def step(self) -> float:
        """Bytes of a step."""
        once = self.gathered_forward + self.gathered_backward + self.reduced + self.reduced_across
        return self.times * once


def exchange(setup: Setup) -> Exchange:
    """Per rank. A ring sends (d-1)/d of what is gathered or reduced, twice that of what is all-reduced."""
    size, w, d = sizes(setup), setup.weight_bytes, setup.shards
    if setup.layout == "ddp":
        return Exchange(reduced=2 * (setup.gpus - 1) / setup.gpus * w * size.total)
    others = d - 1  # each rank's share, padded to that of the first, goes round the ring
    if setup.layout == "zero1":
        return Exchange(gathered_forward=others * w * size.share, reduced=others * 4 * size.share)
    machines = setup.gpus // d
    return Exchange(
        gathered_forward=others * w * size.share,
        gathered_backward=others * w * setup.model.n_layer * size.block_share,
        reduced=others * 4 * size.share,
        reduced_across=2 * (machines - 1) / machines * 4 * size.share,
        times=setup.micro_batches,
    )


def ring_bandwidth(setup: Setup, link: float, network: float | None, ranks: int) -> float:
    """Bytes/s at which a rank takes part in a ring over `ranks`, of which a machine's are neighbours.

    Across machines there is a ring for each GPU's network card, so that a machine's cards work together, and
    what a rank sends passes its links as well.

    Raises:
        InputError: several machines, and `network` is None.
    """
    if ranks <= setup.gpus_per_node:
        return link
    return min(link, setup.gpus_per_node * known_network(setup, network))


def known_network(setup: Setup, network: float | None) -> float:
    """`network`. Raises InputError where it is None."""
    if network is None:
        raise InputError(
            f"{setup.gpus} GPUs are {setup.gpus // setup.gpus_per_node} machines, and nothing is known of "
            "the network between them: give --network, the GB/s of a GPU in each direction (400 Gb/s are 50)"
        )
    return network


# -- time ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Seconds that a step takes at least, and what they are made of."""

    forward: float  # of a micro-batch
    backward: float
    optimizer: float
    exchange: float  # of a step, whatever goes on beside it
    waiting: float  # of a step, for that part of it that nothing goes on beside
    total: float
    mfu: float  # model flops of a step over its time at the peak, as `fastgpt train` reports it


def operations(setup: Setup, *, backward: bool) -> list[Cost]:
    """The operations of a micro-batch's forward or backward pass, each by its least work."""
    c, a = setup.model, setup.activation_bytes
    rows, width, length = setup.micro_batch * c.block_size, c.n_embd, c.block_size
    dtype = torch.bfloat16 if a == 2 else torch.float32
    stream = torch.bfloat16 if max(a, setup.weight_bytes) == 2 else torch.float32
    heads = (setup.micro_batch, length, length, c.n_head, c.head_size, dtype)
    norm = add_cost(rows, width, stream, backward=backward)
    block = [
        norm,
        linear_cost(rows, width, 3 * width, dtype, backward=backward),
        attention_cost(*heads, backward=backward),
        linear_cost(rows, width, width, dtype, backward=backward),
        norm,
        linear_gelu_cost(rows, width, 4 * width, dtype, backward=backward),
        linear_cost(rows, 4 * width, width, dtype, backward=backward),
    ]
    ends = [
        embedding_cost(
            setup.micro_batch, length, width, stream,
            vocab_size=c.padded_vocab_size, block_size=length, backward=backward,
        ),
        norm,
        loss_cost(rows, width, c.padded_vocab_size, dtype, backward=backward),
    ]  # fmt: skip
    return c.n_layer * block + ends


def _seconds(costs: list[Cost], chip: Chip, peak: float) -> float:
    """Each bound by its products or by its bytes."""
    return sum(max(cost.flops / peak, cost.bytes / chip.bandwidth) for cost in costs)


def step(setup: Setup, chip: Chip, *, network: float | None = None) -> Step:
    """The least time of a step.

    Args:
        setup: the run.
        chip: one of its GPUs.
        network: bytes/s in each direction from a GPU to other machines; by default the chip's.

    Weights are gathered beside the pass that needs them and gradients reduced beside the backward pass that
    makes them; the rest is waited for.

    Raises:
        InputError: the chip cannot compute in the precision, or nothing is known of the network.
    """
    peak = known_peak(chip, setup.precision)
    network = chip.network if network is None else network
    forward = _seconds(operations(setup, backward=False), chip, peak)
    backward = _seconds(operations(setup, backward=True), chip, peak)
    if setup.recompute == "block":  # all but the embedding, the last LayerNorm and the loss
        backward += _seconds(operations(setup, backward=False)[:-3], chip, peak)
    optimizer = _optimizer(setup, chip)
    sent, m = exchange(setup), setup.micro_batches
    ring = ring_bandwidth(setup, chip.link, network, setup.shards if setup.layout != "ddp" else setup.gpus)
    ahead = sent.gathered_forward / ring
    beside = (sent.gathered_backward + sent.reduced) / ring
    if sent.reduced_across:  # ranks of the same place in each machine, each ring over cards of its own
        beside += sent.reduced_across / known_network(setup, network)
    exchanging = max(forward, ahead) + max(backward, beside)  # of a micro-batch with an exchange
    total = sent.times * exchanging + (m - sent.times) * (forward + backward) + optimizer
    flops = on_meta(setup.model).flops_per_token()
    tokens = setup.batch_size * setup.model.block_size
    return Step(
        forward=forward,
        backward=backward,
        optimizer=optimizer,
        exchange=sent.times * (ahead + beside),
        waiting=sent.times * (max(ahead - forward, 0.0) + max(beside - backward, 0.0)),
        total=total,
        mfu=flops * tokens / (total * setup.gpus * peak),
    )


def known_peak(chip: Chip, precision: str) -> float:
    """Operations a second. Raises InputError where the chip cannot compute in the precision."""
    peak = chip.peak(precision)
    if peak is None:
        able = ", ".join(name for name in PRECISIONS if chip.peak(name))
        raise InputError(f"precision = {precision!r}: {chip.name} has {able}")
    return peak


def _optimizer(setup: Setup, chip: Chip) -> float:
    """AdamW and the norm of the gradients: bytes alone."""
    elements, masters = sizes(setup).share, setup.layout == "ddp" and setup.weights == "bf16"
    gradient, copy = (torch.bfloat16, torch.bfloat16) if masters else (torch.float32, None)
    update = adamw_cost(elements, torch.float32, gradient, copy=copy)
    return (update.bytes + norm_cost(elements, gradient).bytes) / chip.bandwidth
