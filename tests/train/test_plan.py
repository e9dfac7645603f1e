"""What `fastgpt plan` computes, against what runs on a CPU hold and exchange."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import each_rank
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPT, GPTConfig, cli, distributed, ops
from fastgpt.chips import chip
from fastgpt.config import Parallel, TrainConfig, preset
from fastgpt.data import prepared
from fastgpt.optim import AdamW
from fastgpt.plan import (
    RESERVE,
    Setup,
    activations,
    exchange,
    held_between,
    memory,
    micro_batch_that_fits,
    operations,
    step,
)
from fastgpt.train import Trainer, open_data

MUTANTS = {
    "fastgpt/plan.py": [
        ("widths = 2 + 3 + 1 + 4 + 4", "widths = 2 + 3 + 1 + 4"),
        ("+ 4 * c.n_head", ""),
        ('"gelu": 8, "block": 0}[setup.recompute]', '"gelu": 12, "block": 0}[setup.recompute]'),
        ("(c.n_layer - 1) * width * a", "c.n_layer * width * a"),
        ("logits = a * (", "logits = 2 * a * ("),
        ('"none": 6, "gelu": 10', '"none": 20, "gelu": 10'),
        ("math.ceil(p.shape[0] / parts)", "p.shape[0] // parts"),
        ("n_layer * size.block_share", "n_layer * size.block"),
        ("times=setup.micro_batches", "times=1"),
        ("2 * (setup.gpus - 1) / setup.gpus * w", "(setup.gpus - 1) / setup.gpus * w"),
        ("max(forward, ahead) + max(backward, beside)", "forward + backward"),
        ("min(link, setup.gpus_per_node * known", "max(link, setup.gpus_per_node * known"),
    ],
}

Tiny = Callable[..., TrainConfig]
LAYOUTS: tuple[Parallel, ...] = ("ddp", "zero1", "fsdp", "hsdp")
NATIVE = [row for row in ops.table() if row.name == "native" and not row.missing(torch.device("cpu"))]
KERNELS = "native" if NATIVE else "triton"
MODES = [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")]  # weights, precision


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """In the backward pass too, which computes again."""
    with ops.use(KERNELS):
        yield


def a_setup(config: GPTConfig, batch: int, weights: Any, precision: str, recompute: Any) -> Setup:
    return Setup(config, "ddp", 1, 1, 2 * batch, batch, weights, precision, recompute)


def forward(model: GPT, setup: Setup, idx: torch.Tensor) -> torch.Tensor:
    mixed = torch.autocast("cpu", torch.bfloat16) if setup.casts else contextlib.nullcontext()
    with mixed:
        loss = model(idx, idx, reduction="sum", return_logits=False)[1]
    assert loss is not None
    return loss


@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
@pytest.mark.parametrize(("weights", "precision"), MODES)
def test_activations_are_those_that_autograd_saves(weights: str, precision: str, recompute: str) -> None:
    """Each storage once, parameters not counted: equal to the byte but for a scalar or two of the loss."""
    config = GPTConfig(vocab_size=128, block_size=16, n_layer=3, n_head=2, n_embd=32)
    setup = a_setup(config, 2, weights, precision, recompute)
    model = GPT(config)
    if weights == "bf16":
        model.bfloat16()
    model.recompute(setup.recompute)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, setup, torch.randint(128, (2, 16)))
    measured = sum(storage.nbytes() for storage in kept.values())
    assert 0 <= measured - activations(setup) <= 16


@pytest.mark.parametrize("recompute", ["none", "gelu", "block"])
@pytest.mark.parametrize(("weights", "precision"), MODES)
# the worst moment is the last block's backward pass, or the loss
@pytest.mark.parametrize("vocab_size", [128, 2048])
def test_the_peak_is_the_allocators(vocab_size: int, weights: str, precision: str, recompute: str) -> None:
    """All that PyTorch allocates in the second of two micro-batches: -1% and +5% of a rank's memory.

    Without oneDNN, whose products allocate scratch memory, how much depends on the processor.
    """
    config = GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=3, n_head=2, n_embd=64)
    setup = a_setup(config, 4, weights, precision, recompute)
    model = GPT(config)
    if weights == "bf16":
        model.bfloat16()
    model.recompute(setup.recompute)
    idx = torch.randint(vocab_size, (4, 64))
    optimizer = AdamW(model.parameters())
    forward(model, setup, idx).backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *state_of(optimizer)]
    planned = memory(setup)
    resident = sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert resident == planned.weights + planned.gradients + planned.moments
    activities = [torch.profiler.ProfilerActivity.CPU]
    plain = torch.backends.mkldnn.flags(enabled=False)
    with plain, torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        forward(model, setup, idx).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert 0.99 <= planned.peak / (resident + most) <= 1.05


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


# -- several ranks -------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes that a rank of a ring sends for the collectives on gradients and weights; scalars do not count.

    Args:
        copies: ranks that all-reduce with each other.
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies, self.bytes = copies, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "c10d::_allgather_base_":
            self.bytes += args[0].nbytes - args[1].nbytes  # all but its own
        elif name == "c10d::_reduce_scatter_base_":
            self.bytes += args[1].nbytes - args[0].nbytes
        elif name == "c10d::allreduce_" and args[0][0].ndim:
            self.bytes += 2 * (self.copies - 1) / self.copies * args[0][0].nbytes
        return func(*args, **(kwargs or {}))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_ranks_hold_and_send_what_is_planned(tiny: Tiny) -> None:
    """To the byte, in four ranks that are two machines, in every layout: what they hold once gradients are
    there, and what they send in a step of two micro-batches."""
    prepared(tiny().corpus, "char")

    def measure() -> list[tuple[str, Any, Any]]:
        found = []
        with distributed.joined("cpu", 4) as world:
            for layout, weights in [(layout, w) for layout in LAYOUTS for w in ("fp32", "bf16")]:
                model = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=38)  # no multiple of four ranks
                config = tiny(model=model, parallel=layout, weights=weights, precision=weights)
                config = TrainConfig(**{**vars(config), "batch_size": 8, "micro_batch_size": 1})
                data, config = open_data(config, None, world.say)
                trainer = Trainer(config, config.out_dir, data, GPT(config.model), world)
                held: list[int] = []

                def count(optimizer: torch.optim.Optimizer, *_: Any, held: list[int] = held) -> None:
                    parameters = [p for group in optimizer.param_groups for p in group["params"]]
                    masters = [s["master"] for s in optimizer.state.values() if "master" in s]
                    gradients = [p.grad for p in parameters]
                    moments = [v for v in state_of(optimizer) if all(v is not m for m in masters)]
                    for tensors in ([*parameters, *masters], gradients, moments):
                        held.append(sum(local(tensor).nbytes for tensor in tensors))

                trainer.optimizer.register_step_post_hook(count)
                with Sent(4 if layout == "ddp" else 2) as sent:
                    trainer.step()
                setup = Setup(config.model, layout, 4, 2, 8, 1, weights, weights)
                planned = (held_between(setup), exchange(setup).step)
                found.append((f"{layout} {weights}", (tuple(held), sent.bytes), planned))
        return found

    for name, measured, planned in each_rank(4, measure, local_size=2)[0]:
        assert measured == planned, name


# -- time ----------------------------------------------------------------------------------------------------


def xl(layout: Parallel = "fsdp", gpus: int = 64, micro_batch: int = 8, **changes: Any) -> Setup:
    return Setup(preset("gpt2-xl").model, layout, gpus, 8, 512, micro_batch, **changes)


def test_products_are_those_of_the_model() -> None:
    """flops_per_token, less the hidden half of attention, and its scores once more in backward."""
    setup = xl(gpus=1)
    c, tokens = setup.model, 8 * 1024
    flops = sum(cost.flops for back in (False, True) for cost in operations(setup, backward=back))
    with torch.device("meta"):
        counted = tokens * GPT(c).flops_per_token()
    pairs = tokens * c.n_layer * c.n_embd * c.block_size  # 12 flops each in that figure
    assert flops == pytest.approx(counted - (12 - 7) * pairs, rel=0.02)


def test_the_bound_is_of_the_right_size_and_kind() -> None:
    h100 = chip("h100")
    found = step(xl(), h100)
    assert found.total >= 6 * 1.5576e9 * 8192 / 989e12  # its products at the peak
    assert found.total < 1.5 * 6 * 1.5576e9 * 8192 / 989e12
    slow = step(xl(), h100, network=0.1e9)  # 0.8 GB/s a machine: the exchange is all there is
    sent = exchange(xl()).step
    assert slow.exchange == pytest.approx(sent / 0.8e9)
    assert sent / 0.8e9 < slow.total < sent / 0.8e9 + found.total
    assert slow.waiting == pytest.approx(slow.total - found.total + found.waiting)
    assert step(xl(gpus=8), h100, network=0.1e9).total == step(xl(gpus=8), h100).total  # stays in the machine
    again = step(xl(recompute="block"), h100)
    assert again.backward - found.backward == pytest.approx(found.forward, rel=0.1)


def test_the_largest_micro_batch_that_fits() -> None:
    setup = xl("fsdp", gpus=8)
    found = micro_batch_that_fits(setup, (80 << 30) - RESERVE)
    assert found is not None and 64 % found == 0
    larger = min(size for size in range(found + 1, 65) if 64 % size == 0)
    fits, not_fitting = (memory(xl("fsdp", 8, size)).peak for size in (found, larger))
    assert fits <= (80 << 30) - RESERVE < not_fitting
    assert micro_batch_that_fits(xl("ddp", gpus=8), 20 << 30) is None


# -- the command ---------------------------------------------------------------------------------------------


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("plan gpt2-xl --gpus 16 --chip a100-40gb --mfu 0.4 --micro-batch-size 8".split()) == 0
    page = capsys.readouterr().out
    assert page.startswith("COMPUTED: every figure here is computed")
    assert "gpt2-xl: 1,557,611,200 parameters" in page
    rows = {line[:41].strip(): line[41:].split() for line in page.splitlines()}
    assert rows["fits"] == ["NO", "NO", "yes", "yes"]
    assert rows["in all"][0] == "-"  # no time for what does not fit
    parts = [float(rows[name][2]) for name in rows if name in PARTS]
    assert len(parts) == 5
    total = next(float(line.split()[4]) for line in page.splitlines() if line.startswith("  in all"))
    assert sum(parts) == pytest.approx(total, abs=0.03)
    step_ms, duration = float(rows["in all"][2]), rows["10,000,000,000 tokens at least (computed)"]
    assert float(duration[4]) == pytest.approx(math.ceil(10e9 / 2**19) * step_ms / 3.6e6, rel=0.01)
    assert "ddp does not fit with 8 a micro-batch" in page


PARTS = {
    "weights, masters, gathered copies",
    "gradients",
    "AdamW's moments",
    "held for backward",
    "more at the worst moment",
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("gpt2-124m --gpus 12", "gpus = 12: it must be a multiple of gpus_per_node = 8"),
        ("modern", "position = 'rope': only networks like GPT-2, with 'learned', can be planned"),
        ("gpt2-124m --gpus 3", "batch_size = 512: it must be a multiple of gpus = 3"),
        ("gpt2-124m --gpus 0", "gpus = 0: it must be greater than 0"),
        ("gpt2-124m --chip h1000", "no chip 'h1000'"),
        ("gpt2-124m --chip t4 --precision bf16", "precision = 'bf16': t4 has fp32, fp16"),
        ("gpt2-124m --weights bf16 --precision fp32", "precision = 'fp32': it must be bf16, as weights is"),
        ("gpt2-124m --gpus 16 --chip l4", "nothing is known of the network between them: give --network"),
        ("gpt2-124m --gpus 8 --micro-batch-size 65", "micro_batch_size = 65: a rank has only 64 sequences"),
    ],
)
def test_bad_input(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *options.split()]) == 2
    assert message in capsys.readouterr().err
