"""AdamW is torch.optim.AdamW: same results, same state, same manners; and what it has besides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.optim import AdamW

MUTANTS = {
    "fastgpt/optim.py": [
        ("(param.device, param.dtype, grad.dtype)", "(param.device,)"),
        ("if written != rows:", "if not written:"),  # a rate of long ago
        ("elif self._versions.get(param) != param._version:", "elif False:"),
        ("                batch.groups.append(number)", "                batch.groups.append(0)"),
        ('names.append("master")', "pass"),
        ("norm if grad_scale is None else norm / grad_scale", "norm"),
        ("found_inf=_on(device, found_inf)", "found_inf=None"),
        ("state[name].copy_(saved[name])", "state[name].copy_(saved[name].to(param.dtype))"),
        ('options = ("max_grad_norm", ', "options = ("),
    ],
    "fastgpt/ops/adamw.py": [
        ("        torch.autograd.graph.increment_version([*params, *copies])", "        pass"),
        ("(bits + torch.randint_like(bits, 1 << 16))", "bits"),
    ],
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    row.name for row in ops.table() if row.operation == "adamw_" and not row.missing(torch.device(DEVICE))
]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    with ops.use(adamw_=request.param, grad_norm=request.param):
        yield request.param


# Sizes: a scalar, none, off every vector width, and more than the chunk of 4096 that a program takes.
SHAPES: list[tuple[int, ...]] = [(), (0, 3), (3, 7), (5, 1000)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in SHAPES]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "weight_decay": 0.0, "eps": 1e-6},
        {"params": params[2:], "lr": 3e-3, "betas": (0.8, 0.95)},
    ]


def set_gradients(*lists: list[nn.Parameter], size: float = 1.0) -> None:
    for ps in zip(*lists, strict=True):
        grad = torch.randn(ps[0].shape, device=DEVICE) * size
        for p in ps:
            p.grad = grad.to(p.dtype, copy=True)


def assert_close(actual: Any, expected: Any, ulps: float = 4) -> None:
    """Within a few fp32 roundings of the value near 1: each step adds less than one of them."""
    torch.testing.assert_close(actual, expected, rtol=ulps * 2**-23, atol=ulps * 2**-24)


def test_equals_torch_over_many_steps() -> None:
    ours, theirs = (ps := parameters()), twins(ps)
    exact = [nn.Parameter(p.detach().double()) for p in ours]
    optimizers = [
        AdamW(groups(ours), lr=1e-2),
        torch.optim.AdamW(groups(theirs), lr=1e-2),
        torch.optim.AdamW(groups(exact), lr=1e-2),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 30) for o in optimizers]
    for _ in range(20):
        set_gradients(ours, theirs, exact)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        optimizers[0].zero_grad(set_to_none=True)
    for p, q, oracle in zip(ours, theirs, exact, strict=True):
        if p.numel() == 0:
            continue
        bound = 2 * (q - oracle).abs().max() + 2**-23 * oracle.abs().max()
        assert (p - oracle).abs().max() <= bound
        for name in ("exp_avg", "exp_avg_sq", "step"):
            mine, other = (o.state[x][name] for o, x in zip(optimizers, (p, q), strict=False))
            assert_close(mine.cpu(), other.cpu(), ulps=8)


def test_repeats_to_the_bit() -> None:
    first, second = (ps := parameters(torch.bfloat16)), twins(ps)
    for params in (first, second):
        torch.manual_seed(1)
        optimizer = AdamW(params, lr=0.1, max_grad_norm=1.0, master_weights=False, stochastic_rounding=True)
        for _ in range(3):
            set_gradients(params)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e3])  # one that clips and one that does not
def test_clips_as_torch_does(max_grad_norm: float) -> None:
    ours, theirs = (ps := parameters()), twins(ps)
    optimizer = AdamW(ours, lr=1e-2, max_grad_norm=max_grad_norm)
    other = torch.optim.AdamW(theirs, lr=1e-2)
    for _ in range(3):
        set_gradients(ours, theirs)
        before = [p.grad.clone() for p in ours if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        optimizer.step()
        other.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True) if p.grad is not None)
        assert optimizer.grad_norm is not None
        assert_close(optimizer.grad_norm, norm)
    assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_bad_gradients_reach_the_norm_and_the_parameters(bad: float) -> None:
    """Without a GradScaler a run must see that something went wrong, as with torch."""
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=1.0)
    set_gradients(params)
    assert params[2].grad is not None
    params[2].grad[0, 0] = bad
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert not optimizer.grad_norm.isfinite()
    assert params[2].isnan().any()


def trained(cls: type[torch.optim.Optimizer], dtype: torch.dtype) -> tuple[list[nn.Parameter], Any]:
    """Parameters after three steps, and their optimizer."""
    torch.manual_seed(2)
    params = [nn.Parameter(torch.randn(3, 7, device=DEVICE).to(dtype)) for _ in range(2)]
    optimizer = cls(params, lr=1e-2, weight_decay=0.2)
    for _ in range(3):
        set_gradients(params)
        optimizer.step()
    return params, optimizer


def test_state_goes_both_ways() -> None:
    """Train with either class, load into either, go on: all four ways end in the same place."""
    ends = []
    for source in (AdamW, torch.optim.AdamW):
        for target in (AdamW, torch.optim.AdamW):
            params, before = trained(source, torch.float32)
            optimizer = target(params, lr=1.0)
            optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
            assert optimizer.param_groups[0]["lr"] == 1e-2
            torch.manual_seed(3)
            for _ in range(3):
                set_gradients(params)
                optimizer.step()
            assert optimizer.state[params[0]]["step"] == 6
            ends.append(params)
    for params in ends[1:]:
        assert_close(params, ends[0], ulps=8)


@pytest.mark.parametrize("source", [AdamW, torch.optim.AdamW])
def test_bf16_state_goes_both_ways(source: type[torch.optim.Optimizer]) -> None:
    """torch keeps moments in the dtype of the parameters: what it has is taken as it is, or as it rounds."""
    params, before = trained(source, torch.bfloat16)
    target, dtype = (torch.optim.AdamW, torch.bfloat16) if source is AdamW else (AdamW, torch.float32)
    optimizer = target(params)
    optimizer.load_state_dict(before.state_dict())
    for p in params:
        assert optimizer.state[p]["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][name].dtype == dtype
            assert torch.equal(optimizer.state[p][name], before.state[p][name].to(dtype))
    set_gradients(params)
    optimizer.step()


def test_own_state_is_exact() -> None:
    """Master weights and fp32 moments of bf16 parameters survive a checkpoint to the bit."""
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, lr=1e-3)
    set_gradients(params)
    optimizer.step()
    resumed = twins(params)
    other = AdamW(resumed, lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        set_gradients(params, resumed)
        optimizer.step()
        other.step()
    for p, q in zip(params, resumed, strict=True):
        assert torch.equal(p, q)
        for name in ("master", "exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][name].dtype == torch.float32
            assert torch.equal(optimizer.state[p][name], other.state[q][name])
            if p.numel():  # nothing is shared: training on leaves the loaded state alone
                assert optimizer.state[p][name].data_ptr() != other.state[q][name].data_ptr()


def test_master_weights() -> None:
    """bf16 parameters are the rounded master weights, which follow fp32 training; without, they stall."""
    params = [nn.Parameter(torch.ones(40, device=DEVICE, dtype=torch.bfloat16))]
    wide = [nn.Parameter(torch.ones(40, device=DEVICE))]
    lossy = twins(params)
    optimizers = [
        AdamW(params, lr=1e-4, weight_decay=0.0),
        torch.optim.AdamW(wide, lr=1e-4, weight_decay=0.0),
        AdamW(lossy, lr=1e-4, weight_decay=0.0, master_weights=False),
    ]
    for _ in range(10):
        for p in (params[0], wide[0], lossy[0]):
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
    master = optimizers[0].state[params[0]]["master"]
    assert_close(master, wide[0].detach())
    assert torch.equal(params[0], master.bfloat16())
    assert (lossy[0] == 1).all()  # a step of 1e-4 is lost beside 1, where bf16 has steps of 4e-3


def test_stochastic_rounding_moves_on_average() -> None:
    """The mean follows the fp32 trajectory: 10 steps of 1e-4 down from 1, by a bf16 grid of 2^-8 below 1."""
    n = 16_000
    params = [nn.Parameter(torch.ones(n, device=DEVICE, dtype=torch.bfloat16))]
    optimizer = AdamW(params, lr=1e-4, weight_decay=0.0, master_weights=False, stochastic_rounding=True)
    for _ in range(10):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    values = params[0].detach().float()
    # Each element went down a grid step with probability 10 * 1e-4 / 2^-8 in all: a binomial of mean 1e-3 and
    # standard deviation about sqrt(1e-3 * 2^-8 / n); allow five.
    assert abs(values.mean().item() - (1 - 1e-3)) < 5 * (1e-3 * 2**-8 / n) ** 0.5
    assert set(values.unique().tolist()) <= {1.0, 1 - 2**-8, 1 - 2**-7, 1 - 3 * 2**-8, 1 - 2**-6}
    # Neighbours, elements 1024 apart (parts of a chunk) and steps are independent: were they not, the shares
    # of pairs that moved together would be that of single elements, ten times as large.
    moved = values < 1
    share = moved.float().mean().item()
    for distance in (1, 2, 4, 1024, 4096):
        together = (moved[distance:] & moved[:-distance]).float().mean().item()
        assert abs(together - share**2) < 5 * (2 * share**2 / n) ** 0.5


def test_parameters_written_from_outside_are_taken_over() -> None:
    params = [nn.Parameter(torch.ones(40, device=DEVICE, dtype=torch.bfloat16))]
    optimizer = AdamW(params, lr=1e-4, weight_decay=0.0)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    with torch.no_grad():
        params[0][:20] = 3.0
    params[0].grad.zero_()
    optimizer.step()
    master = optimizer.state[params[0]]["master"]
    assert (master[:20] > 2.99).all()
    assert (master[20:] < 1).all()  # the others keep what bf16 cannot hold
    assert (master[20:] > 0.999).all()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_grad_scaler(unscale: bool, max_grad_norm: float | None) -> None:
    """With found_inf nothing changes, the step neither; otherwise the scale makes no difference."""
    ours, theirs = (ps := parameters()), twins(ps)
    optimizer = AdamW(ours, lr=1e-2, max_grad_norm=max_grad_norm)
    other = torch.optim.AdamW(theirs, lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.zeros((), device=DEVICE))  # which makes the scale
    for step in range(4):
        set_gradients(ours, theirs)
        for p in ours:
            assert p.grad is not None
            p.grad *= scaler.get_scale()
        if step == 1:
            assert ours[2].grad is not None
            ours[2].grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        before = [p.detach().clone() for p in ours]
        steps = [float(s["step"]) for s in optimizer.state.values()]
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
            assert [float(s["step"]) for s in optimizer.state.values()] == steps
            continue
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm or torch.inf)
        if max_grad_norm:
            assert optimizer.grad_norm is not None
            assert_close(optimizer.grad_norm, norm)
        other.step()
    assert scaler.get_scale() == 512.0
    assert_close(ours, theirs, ulps=8)


def test_groups_may_change() -> None:
    """New rates, new groups and parameters without a gradient, each step another set of them."""
    ours, theirs = (ps := parameters()), twins(ps)
    optimizers = [AdamW(ours[:3], lr=1e-2), torch.optim.AdamW(theirs[:3], lr=1e-2)]
    for step in range(4):
        set_gradients(ours, theirs)
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            if step == 1:
                optimizer.add_param_group({"params": params[3:], "lr": 1e-3})
            if step == 2:
                optimizer.param_groups[0].update(lr=2e-2, betas=(0.5, 0.9), weight_decay=0.3)
            params[step].grad = None
            optimizer.step()
    assert_close(ours, theirs)
    assert [s["step"] for s in optimizers[0].state.values()] == [3, 3, 3, 2]


def test_lr_may_be_a_tensor() -> None:
    ours, theirs = (ps := parameters()), twins(ps)
    lr = torch.tensor(1e-2, device=DEVICE)
    optimizer, other = AdamW(ours, lr=lr), torch.optim.AdamW(theirs, lr=1e-2)
    for rate in (1e-2, 1e-3):
        lr.fill_(rate)
        other.param_groups[0]["lr"] = rate
        set_gradients(ours, theirs)
        optimizer.step()
        other.step()
    assert_close(ours, theirs)


def test_closure() -> None:
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = AdamW([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (param < 1).all()


def test_memory_orders() -> None:
    """Transposed parameters and gradients of another order, as tied and transposed weights give."""
    start, grad = torch.randn(6, 5, device=DEVICE), torch.randn(6, 5, device=DEVICE)
    ours, theirs = (nn.Parameter(start.clone().t()) for _ in range(2))
    assert not ours.is_contiguous()
    for param, cls in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        param.grad = grad.t().contiguous()
        cls([param], lr=0.1).step()
    assert_close(ours, theirs)


def test_addresses_without_alignment() -> None:
    """Views that begin anywhere, such as slices of one flat buffer."""
    buffer = torch.randn(5000, device=DEVICE)
    ours, theirs = nn.Parameter(buffer[1:4800].clone()[1:]), nn.Parameter(buffer[2:4800].clone())
    set_gradients([ours], [theirs])
    for param, cls in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        cls([param], lr=0.1).step()
    assert_close(ours, theirs)


def test_dtypes_mixed() -> None:
    """fp32, bf16 and fp16 parameters, one norm over all of their gradients."""
    params = [nn.Parameter(torch.ones(9, device=DEVICE, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    params.append(nn.Parameter(torch.ones(9, device=DEVICE, dtype=torch.float16)))
    optimizer = AdamW(params, lr=0.1, weight_decay=0.0, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert_close(optimizer.grad_norm.cpu(), torch.tensor(27**0.5 * 2))
    for p in params:
        torch.testing.assert_close(p.float(), torch.full((9,), 0.9, device=DEVICE), rtol=2**-8, atol=0)


def test_copies_and_pickles() -> None:
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, max_grad_norm=0.5)
    set_gradients(params)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    copied = [p for group in twin.param_groups for p in group["params"]]
    set_gradients(params, copied)
    optimizer.step()
    twin.step()
    assert twin.max_grad_norm == 0.5
    assert all(torch.equal(p, q) for p, q in zip(params, copied, strict=True))


def test_a_backward_after_the_step_notices() -> None:
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (param**2).sum()
    param.grad = torch.ones_like(param)
    AdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def sparse() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    AdamW(table.parameters()).step()


P = [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (sparse, r"a parameter of shape \(3, 2\) has a gradient of layout torch.sparse_coo"),
        (lambda: AdamW(P, lr=-1.0), r"lr is -1.0: it must be at least 0"),
        (lambda: AdamW(P, eps=-1.0), r"eps is -1.0: it must be at least 0"),
        (lambda: AdamW(P, weight_decay=-1.0), r"weight_decay is -1.0: it must be at least 0"),
        (lambda: AdamW(P, betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\): it must be two numbers"),
        (lambda: AdamW(P, max_grad_norm=0.0), r"max_grad_norm is 0.0: it must be greater than 0"),
        (lambda: AdamW(P, stochastic_rounding=True), r"stochastic_rounding .* master_weights=False"),
        (lambda: AdamW([{"params": P, "amsgrad": True}]), r"amsgrad is True: .* has False only"),
        (
            lambda: AdamW(P).load_state_dict(torch.optim.AdamW(P, maximize=True).state_dict()),
            r"maximize is True",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph() -> None:
    """Steps replayed are steps taken, at the rate that the table holds by then."""
    ours, theirs = (ps := parameters()), twins(ps)
    optimizer, other = AdamW(ours, lr=1e-2, max_grad_norm=1.0), AdamW(theirs, lr=1e-2, max_grad_norm=1.0)
    set_gradients(ours, theirs)
    optimizer.step()
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for rate in (1e-2, 1e-3):
        for o in (optimizer, other):
            o.param_groups[0]["lr"] = rate
        optimizer.write_hyperparameters()
        graph.replay()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
