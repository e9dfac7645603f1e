"""Muon against its formula in float64 and against PyTorch's, and as one optimizer with AdamW."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig
from fastgpt.config import TrainConfig
from fastgpt.errors import InputError
from fastgpt.muon import Joined, Muon, muon, optimizer_for, orthogonal
from fastgpt.optim import AdamW, update

MUTANTS = {
    "fastgpt/muon.py": [
        ('1 - group["momentum"])', "1.0)"),
        ('p.grad.lerp(average, group["momentum"])', "average"),
        (".unflatten(0, (parts, -1))", ".unflatten(0, (1, -1))"),
        ("0.2 * math.sqrt(max(ahead.shape[1:]))", "0.2 * math.sqrt(max(p.shape))"),
        ('p.mul_(1 - lr * group["weight_decay"])', 'p.mul_(1 - group["weight_decay"])'),
        ("c * (gram @ gram)", "c * gram"),
        ("return x.mT if tall else x", "return x"),
        ("dim=(-2, -1), keepdim=True", "keepdim=True"),
        ("part.state = self.state", "pass"),
        ("if number in ids}", "if number not in ids}"),
        ('"initial_lr": peak}', '"initial_lr": 1.0}', "tests/train/test_modern_runs.py -k exact"),
    ],
}

A, B, C = 3.4445, -4.7750, 2.0315


def polynomial(u: Tensor) -> Tensor:
    """What `orthogonal` does, on the singular values themselves."""
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = A * s + B * s**3 + C * s**5
    return left * s @ right


def reference(weight: Tensor, grads: list[Tensor], *, lr: float, decay: float, parts: int) -> Tensor:
    """Steps of Muon in float64, part by part."""
    done = []
    for part, own in zip(
        weight.chunk(parts), zip(*(g.chunk(parts) for g in grads), strict=True), strict=True
    ):
        momentum = torch.zeros_like(part)
        for grad in own:
            momentum = 0.95 * momentum + 0.05 * grad
            ahead = 0.05 * grad + 0.95 * momentum
            part = part - lr * decay * part - lr * 0.2 * math.sqrt(max(part.shape)) * polynomial(ahead)
        done.append(part)
    return torch.cat(done)


def stepped(optimizer: type, weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    param = nn.Parameter(weight.clone())
    optimizer = optimizer([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize(("shape", "parts"), [((12, 40), 1), ((40, 12), 1), ((20, 20), 1), ((36, 12), 3)])
def test_steps_are_those_of_the_formula(shape: tuple[int, int], parts: int) -> None:
    torch.manual_seed(0)
    weight, *grads = (torch.randn(shape, dtype=torch.float64) for _ in range(5))
    expected = reference(weight, grads, lr=0.1, decay=0.3, parts=parts)
    options = {"lr": 0.1, "weight_decay": 0.3, "parts": parts}
    torch.testing.assert_close(stepped(Muon, weight, grads, **options), expected, rtol=1e-9, atol=1e-9)
    # In fp32, singular values near zero amplify rounding: the polynomial has slope 3.4445^5 = 485 there.
    single = stepped(Muon, weight.float(), [g.float() for g in grads], **options)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_steps_are_those_of_torch_up_to_its_bf16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, *grads = (torch.randn(shape) for _ in range(5))
    options = {"lr": 0.1, "weight_decay": 0.3}
    ours = stepped(Muon, weight, grads, **options)
    theirs = stepped(torch.optim.Muon, weight, grads, **options, adjust_lr_fn="match_rms_adamw")
    moved = (theirs - weight).norm()
    assert (ours - theirs).norm() < 0.03 * moved


def test_updates_have_singular_values_near_one_and_the_size_of_adamws() -> None:
    """Bounds are Jordan's, 0.7 and 1.3 with what five steps leave below; the directions are those of U."""
    torch.manual_seed(0)
    u = torch.randn(3, 48, 128) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    values = torch.linalg.svdvals(orthogonal(u))
    assert 0.6 < values.min() < values.max() < 1.3
    left, _, right = torch.linalg.svd(u.double(), full_matrices=False)
    torch.testing.assert_close(orthogonal(u).double(), left @ right, rtol=0, atol=0.1)
    moved = stepped(Muon, torch.zeros(48, 128), [u[1]], lr=0.5, weight_decay=0.0)
    assert moved.square().mean().sqrt() == pytest.approx(0.5 * 0.2, rel=0.15)
    assert not orthogonal(torch.zeros(1, 4, 4)).any()  # a gradient of zeros is no update, and not NaN


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(4,\): Muon takes matrices"):
        Muon([nn.Parameter(torch.ones(4))])
    with pytest.raises(InputError, match=r"shape \(4, 2\): Muon takes matrices whose rows .* of parts = 3"):
        Muon([nn.Parameter(torch.ones(4, 2))], parts=3)
    with pytest.raises(InputError, match="lr is -1"):
        Muon([nn.Parameter(torch.ones(4, 2))], lr=-1)


# -- joined with AdamW ---------------------------------------------------------------------------------------

CONFIG = TrainConfig(
    model=GPTConfig(vocab_size=65, block_size=8, n_layer=2, n_head=2, n_embd=16, activation="swiglu"),
    optimizer="muon",
    learning_rate=2e-3,
    muon_learning_rate=5e-3,
    weight_decay=0.2,
    grad_clip=0.5,
)


def gradients(model: GPT, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(65, (2, 8), generator=generator)
    model(idx, idx)[1].backward()


def made(build: Callable[..., Any] = optimizer_for) -> tuple[GPT, Any]:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG.model, tied_head=False))
    return model, build(model, CONFIG)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model, optimizer = made()
    names = {p: name for name, p in model.named_parameters()}
    groups = [({names[p] for p in g["params"]}, g) for g in optimizer.param_groups]
    matrices, vectors, hidden, packed = sorted(groups, key=lambda pair: "parts" in pair[1])[:2] + sorted(
        groups[2:], key=lambda pair: pair[1]["parts"]
    )
    assert matrices[0] == {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert all(".ln_" in name or name.endswith("bias") for name in vectors[0])
    assert packed[0] == {f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)}
    assert len(hidden[0]) == 2 * 4  # c_proj twice, c_fc and c_gate
    assert [g["weight_decay"] for _, g in (matrices, vectors, hidden, packed)] == [0.2, 0.0, 0.2, 0.2]
    assert [g["lr"] for _, g in (matrices, vectors, hidden, packed)] == [2e-3, 2e-3, 5e-3, 5e-3]
    assert packed[1]["parts"] == 3
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    default = muon(GPT(CONFIG.model), dataclasses.replace(CONFIG, muon_learning_rate=None))
    assert {g["lr"] for g in default.param_groups} == {2e-3}


@pytest.mark.parametrize("kernel", [False, True])
def test_it_steps_as_its_parts_do_after_clipping_over_all(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where AdamW is the one of this package, which clips by itself elsewhere."""
    if kernel:
        monkeypatch.setattr("fastgpt.optim.reference", None)  # as if the current choice were a kernel
    model, optimizer = made()
    assert isinstance(optimizer, Joined)
    assert isinstance(optimizer.parts[0], AdamW if kernel else torch.optim.AdamW)
    twin = copy.deepcopy(model)
    hidden = [p for n, p in twin.named_parameters() if n.startswith("transformer.h.") and p.dim() == 2]
    packed = {p for n, p in twin.named_parameters() if n.endswith("c_attn.weight")}
    others = [p for p in twin.parameters() if all(p is not q for q in hidden)]
    apart = [
        Muon([{"params": [p], "parts": 3 if p in packed else 1} for p in hidden], lr=5e-3, weight_decay=0.2),
        torch.optim.AdamW(
            [
                {"params": [p for p in others if p.dim() == 2], "weight_decay": 0.2},
                {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=2e-3,
            betas=CONFIG.betas,
        ),
    ]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        gradients(model, step)
        gradients(twin, step)
        expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for part in apart:
            part.step()
            part.zero_grad()
        twin.zero_grad()
        norm = update(optimizer, scaler, 0.5)
        assert norm > 0.5
        torch.testing.assert_close(norm, expected)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [False, True])
def test_state_goes_to_the_bit_into_another(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel:
        monkeypatch.setattr("fastgpt.optim.reference", None)
    model, optimizer = made()
    for step in range(2):
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    keys = {name for state in optimizer.state.values() for name in state}
    assert keys == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    assert len(optimizer.state) == len(list(model.parameters()))
    resumed, other = made()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, own in ((model, optimizer), (resumed, other)):
        gradients(network, 2)
        own.step()
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    ours, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for number in ours:
        assert all(torch.equal(ours[number][key], theirs[number][key]) for key in ours[number])


def test_closures_are_called_once() -> None:
    model, optimizer = made()
    calls = []

    def closure() -> str:
        calls.append(torch.is_grad_enabled())
        gradients(model)
        return "loss"

    assert optimizer.step(closure) == "loss"
    assert optimizer.parts[1].step(closure) == "loss"
    assert calls == [True, True]
