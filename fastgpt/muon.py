"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

For a matrix W (rows, columns) with gradient G, momentum m and the learning rate lr:

    M <- m M + (1 - m) G
    U  = (1 - m) G + m M                                    Nesterov's look ahead
    W <- W - lr * weight_decay * W - lr * 0.2 sqrt(max(rows, columns)) * orthogonal(U)

`orthogonal(U)` is near to U with all its singular values made 1: five steps of a polynomial of U / ||U||, in
bf16, leave all but the smallest between about 0.7 and 1.2. Such an update moves all directions of a matrix
alike, where AdamW's is nearly of low rank. The factor gives it a root mean square of 0.2, that of AdamW's
updates, so that the learning rate and the weight decay are in AdamW's units.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
kellerjordan.github.io/posts/muon; for the factor Liu et al., "Muon is Scalable for LLM Training", arXiv
2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.config import TrainConfig
from fastgpt.optim import adamw, adamw_of

MOMENTUM = 0.95
_PACKED = {"attn.c_attn.weight": 3}  # matrices that lie one above another: q, k and v


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose groups say in `parts` how many matrices lie one above another in a parameter.

    Each is made orthogonal by itself, as Jordan's post advises for q, k and v; momentum and state are of the
    parameter, under PyTorch's name `momentum_buffer`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        whole = [group["params"] for group in self.param_groups]
        parts: list[Tensor] = []
        try:
            for group in self.param_groups:
                group["params"] = [part for p in group["params"] for part in self._parts(p, group["parts"])]
                parts += group["params"]
            super().step()
        finally:
            for group, params in zip(self.param_groups, whole, strict=True):
                group["params"] = params
            for part in parts:
                del self.state[part]
        return loss

    def _parts(self, param: Tensor, count: int) -> list[Tensor]:
        """Views of a parameter, with views of its gradient and of its momentum."""
        if param.grad is None:
            return []
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        parts = list(param.detach().chunk(count))
        views = zip(parts, param.grad.chunk(count), state["momentum_buffer"].chunk(count), strict=True)
        for part, grad, momentum in views:
            part.grad = grad
            self.state[part] = {"momentum_buffer": momentum}
        return parts


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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
    hidden = Muon(
        groups,
        lr=peak,
        weight_decay=config.weight_decay,
        momentum=MOMENTUM,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    return Joined(adamw_of(others, config, clip=False), hidden)
