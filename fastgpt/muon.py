"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

For a matrix W (rows, columns) with gradient G, momentum m = 0.95 and the learning rate lr:

    M <- m M + (1 - m) G
    U  = (1 - m) G + m M                                    Nesterov's look ahead
    W <- W - lr * weight_decay * W - lr * 0.2 sqrt(max(rows, columns)) * orthogonal(U)

`orthogonal(U)` is near to U with all its singular values made 1: it moves all directions of a matrix alike,
where AdamW's update is nearly of low rank. Five steps of a polynomial leave all singular values but the
smallest between about 0.7 and 1.2:

    X <- U / ||U||
    X <- a X + (b A + c A A) X    with A = X X^T            five times; a, b, c = 3.4445, -4.7750, 2.0315

The factor gives the update a root mean square of 0.2, which is that of AdamW's, so that the learning rate and
the weight decay are in AdamW's units.

The formula is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, to which tests hold this one.
It is not used because it takes q, k and v, packed in one parameter, for one matrix, and computes in bf16
everywhere: on an AVX2 processor, without bf16 units, its products took 8 to 27 times as long as in fp32.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
kellerjordan.github.io/posts/muon; for the factor Liu et al., "Muon is Scalable for LLM Training", arXiv
2502.16982.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.config import TrainConfig
from fastgpt.errors import InputError
from fastgpt.ops.checks import check_at_least
from fastgpt.optim import adamw, adamw_of, closure_loss

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_PACKED = {"attn.c_attn.weight": 3}  # matrices that lie one above another in a parameter: q, k and v


def orthogonal(u: Tensor) -> Tensor:
    """Matrices (..., rows, columns) with singular values near 1; bf16 on a GPU, elsewhere at least fp32."""
    x = u.bfloat16() if u.is_cuda else u.to(torch.promote_types(u.dtype, torch.float32))
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # so that A is the smaller of X X^T and X^T X
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # then no singular value is above 1
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon; the state is the momentum, under the name of `torch.optim.Muon`'s. The host waits for nothing.

    Args:
        params: matrices, or dicts of groups of them with their own options.
        lr: the learning rate, in the units of AdamW's.
        weight_decay: times lr, the share of each weight that is taken away in a step.
        momentum: decay rate of the average of gradients.
        parts: how many matrices lie one above another in each parameter; each is made orthogonal by itself.

    Raises:
        InputError: a value out of range, a parameter that is no matrix or cannot be taken apart.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = MOMENTUM,
        *,
        parts: int = 1,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": parts}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, least in {"lr": 0, "weight_decay": 0, "momentum": 0, "parts": 1}.items():
            check_at_least(name, group[name], least)
        for p in group["params"]:
            if p.dim() != 2 or p.size(0) % group["parts"]:
                raise InputError(
                    f"a parameter has shape {tuple(p.shape)}: Muon takes matrices whose rows are a multiple "
                    f"of parts = {group['parts']}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Returns what `closure`, if given, returns."""
        loss = closure_loss(closure)
        for group in self.param_groups:
            lr, parts = group["lr"], group["parts"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"]).unflatten(0, (parts, -1))
                scale = 0.2 * math.sqrt(max(ahead.shape[1:]))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(orthogonal(ahead).flatten(0, 1), alpha=-lr * scale)
        return loss


class Joined(torch.optim.Optimizer):
    """Optimizers of different parameters as one, which has all their groups and states, in their order."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        self.state = defaultdict(dict)
        for part in self.parts:
            self.state.update(part.state)
            part.state = self.state
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step with each of them. Returns what `closure`, if given, returns."""
        loss = closure_loss(closure)
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each of them its share."""
        groups = iter(state_dict["param_groups"])
        for part in self.parts:
            own = list(islice(groups, len(part.param_groups)))
            ids = {number for group in own for number in group["params"]}
            state = {number: value for number, value in state_dict["state"].items() if number in ids}
            part.load_state_dict({"state": state, "param_groups": own})
        self._join()


def optimizer_for(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that config names."""
    return muon(model, config) if config.optimizer == "muon" else adamw(model, config)


def muon(model: nn.Module, config: TrainConfig) -> Joined:
    """Muon for the matrices inside the blocks, and AdamW for embeddings, head, norms and biases.

    The matrices with a row for each token are AdamW's, as in Jordan's post: they map no vectors to vectors,
    and a step that moves all directions alike would move what is rare as far as what is frequent.
    """
    matrices: dict[int, list[nn.Parameter]] = defaultdict(list)
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if name.startswith("transformer.h.") and p.dim() == 2:
            packed = (count for ending, count in _PACKED.items() if name.endswith(ending))
            matrices[next(packed, 1)].append(p)
        else:
            others.append(p)
    peak = config.muon_learning_rate or config.learning_rate
    groups = [{"params": params, "parts": count, "initial_lr": peak} for count, params in matrices.items()]
    hidden = Muon(groups, lr=peak, weight_decay=config.weight_decay)
    return Joined(adamw_of(others, config), hidden)  # of gradients clipped together no part is clipped again
