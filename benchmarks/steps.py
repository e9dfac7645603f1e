"""Whole training steps by several recipes: from the same weights, on the same tokens, to the same losses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from fastgpt import ops, optim
from fastgpt.config import GPTConfig, TrainConfig
from fastgpt.model import GPT

Precision = Literal["fp32", "tf32", "autocast", "bf16"]  # autocast to bf16; bf16 weights with fp32 master
Optimizer = Literal["torch", "torch-fused", "fastgpt"]
Batch = tuple[Tensor, Tensor]

LEARNING_RATE = 3e-4  # constant: the one that the lecture measures its ladder with
GRAD_CLIP = 1.0
BATCHES = 4  # that a timed step goes round


@dataclass(frozen=True)
class Recipe:
    """One way to take a training step: forward, backward, clipping, optimizer."""

    name: str
    precision: Precision
    ops: str = "eager"
    """The implementation of all operations but those of `eager_ops`."""
    eager_ops: tuple[str, ...] = ()
    compile: str | None = None
    """The mode of torch.compile, or None without it."""
    optimizer: Optimizer = "torch-fused"
    flash: bool = True
    """False writes the (T, T) attention weights to memory, as a model without flash attention does."""
    padded: bool = True
    """Whether the embedding has its padding rows, which are masked from the loss."""
    graph: bool = False
    """Replay the whole step as one CUDA graph."""
    exact_norm: bool = False
    """Take the gradient's norm in float64: PyTorch's, in fp32, is off by 7e-5 of it for GPT-2's embedding."""

    @property
    def compiles(self) -> bool:
        """Whether its first step takes time that later ones do not."""
        return self.compile is not None or self.ops == "triton"

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run on the device, or None where it can."""
        if device.type != "cuda":
            if self.precision == "tf32":
                return "TF32 is a precision of NVIDIA's tensor cores"
            if self.graph:
                return "CUDA graphs need an NVIDIA GPU"
        return missing(self.ops, device)


def missing(implementation: str, device: torch.device) -> str | None:
    """Why an operation of that implementation cannot run on the device, or None where all can."""
    reasons = [row.missing(device) for row in ops.table() if row.name == implementation]
    return next((reason for reason in reasons if reason), None)


class Step:
    """Calling it takes one training step by a recipe and returns the loss, on the device.

    Args:
        recipe: how.
        initial: the model with its initial weights, on the CPU; it stays as it is.
        config: weight decay and betas are taken from it.
        batches: token ids and targets, each (B, T), on the device; steps go round them.
    """

    def __init__(self, recipe: Recipe, initial: GPT, config: TrainConfig, batches: list[Batch]) -> None:
        self.recipe, self.batches = recipe, batches
        self.device = batches[0][0].device
        self.taken = 0
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.model = (copy.deepcopy(initial) if recipe.padded else unpadded(initial)).to(self.device, dtype)
        self.network: Any = self.model if recipe.flash else self._without_flash
        if recipe.compile is not None:
            self.network = torch.compile(self.network, mode=recipe.compile, dynamic=False)
        self.optimizer = _optimizer(recipe.optimizer, self.model, config)
        with ops.use(recipe.ops, **dict.fromkeys(recipe.eager_ops, "eager")) as self._choice:
            pass  # a choice is made where `use` is called: undo it until a step enters it again
        self._run: Callable[..., Tensor] = self.take
        if recipe.graph:
            from fastgpt.graphs import CapturedStep

            self._run = CapturedStep(self.take)

    def __call__(self) -> Tensor:
        batch = self.batches[self.taken % len(self.batches)]
        self.taken += 1
        with self.settings():
            return self._run(*batch)

    def take(self, idx: Tensor, targets: Tensor) -> Tensor:
        """One step on these tokens, within `settings`."""
        loss = self.loss(idx, targets)
        loss.backward()
        self.update()
        return loss.detach()

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.recipe.precision == "autocast"
        )
        with autocast:
            return self.network(idx, targets, return_logits=False)[1]

    def _without_flash(self, idx: Tensor, targets: Tensor, *, return_logits: bool) -> Any:
        """The model with attention weights in memory. The choice is made inside, where torch.compile sees it:
        made outside, it would run what it has compiled of the same model with flash attention."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(idx, targets, return_logits=return_logits)

    def update(self) -> None:
        """Clip and apply the gradients. A graph keeps them in place: it knows them by address."""
        if self.recipe.exact_norm:
            grads = [p.grad.double() for p in self.model.parameters() if p.grad is not None]
            clip_grads_with_norm_(self.model.parameters(), GRAD_CLIP, get_total_norm(grads).float())
        elif self.recipe.optimizer != "fastgpt":  # which clips in its own pass
            clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.recipe.graph)

    def held_bytes(self) -> int:
        """Of weights and the optimizer's state, which are there between steps."""
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in itertools.chain(self.model.parameters(), state))

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """The global choices of the recipe, put back afterwards."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.recipe.precision == "tf32" else "highest")
        try:
            with self._choice:
                yield
        finally:
            torch.set_float32_matmul_precision(before)


def unpadded(model: GPT) -> GPT:
    """A copy whose embedding and classifier have vocab_size rows: what it computes stays the same."""
    model = copy.deepcopy(model)
    rows = model.config.vocab_size
    model.transformer.wte.num_embeddings = rows
    for module in (model.transformer.wte, *(() if model.config.tied_head else (model.lm_head,))):
        module.weight = torch.nn.Parameter(module.weight.detach()[:rows].clone())
    return model


def _optimizer(name: Optimizer, model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    config = dataclasses.replace(config, learning_rate=LEARNING_RATE)
    fused = optim.adamw(model, config)
    if name == "torch-fused":
        return fused
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in fused.param_groups]
    options: dict[str, Any] = {"lr": LEARNING_RATE, "betas": config.betas, "eps": config.eps}
    if name == "fastgpt":
        return optim.AdamW(groups, max_grad_norm=GRAD_CLIP, **options)
    return torch.optim.AdamW(groups, **options)  # on a GPU its default is the one of many launches (foreach)


def initial_model(config: GPTConfig, seed: int = 1337) -> GPT:
    """With random weights, on the CPU."""
    torch.manual_seed(seed)
    return GPT(config).train()


def random_batches(config: GPTConfig, batch_size: int, device: torch.device, seed: int = 1337) -> list[Batch]:
    """BATCHES batches of random text: token k is drawn about 1 / (k + 1) times as often as token 0.

    The frequencies of words in a language fall so (Zipf's law), and how often a token comes twice is what the
    gradient of the embedding costs.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCHES, batch_size, config.block_size + 1)
    ranks = config.vocab_size ** torch.rand(shape, generator=generator)  # log-uniform in [1, vocab_size]
    text = ranks.long().clamp(max=config.vocab_size) - 1
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in text.to(device)]
