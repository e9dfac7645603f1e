"""What `fastgpt bench ops` times: each operation on GPT-2's shapes, as a `Workload` makes and calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgpt import ops
from fastgpt.benchmarks.timing import random_tensor
from fastgpt.config import VOCAB_MULTIPLE, preset
from fastgpt.errors import InputError
from fastgpt.ops import Cost
from fastgpt.ops.adamw import cost as adamw_cost
from fastgpt.ops.adamw import norm_cost
from fastgpt.ops.attention import cost as attention_cost
from fastgpt.ops.choices import shape_class
from fastgpt.ops.cross_entropy import cost as cross_entropy_cost
from fastgpt.ops.decode_attention import cost as decode_cost
from fastgpt.ops.dropout import cost as dropout_cost
from fastgpt.ops.embedding import cost as embedding_cost
from fastgpt.ops.gelu import bias_cost
from fastgpt.ops.gelu import cost as gelu_cost
from fastgpt.ops.gelu import linear_cost as linear_gelu_cost
from fastgpt.ops.layer_norm import add_cost
from fastgpt.ops.layer_norm import cost as layer_norm_cost
from fastgpt.ops.linear import cost as linear_cost
from fastgpt.ops.linear_cross_entropy import cost as linear_cross_entropy_cost
from fastgpt.ops.rms_norm import cost as rms_norm_cost

PADDED_VOCAB, PADDING = 50304, 47  # of which 50257 count
BLOCK = 1024  # positions of the table of GPT-2
DROPOUT_P = 0.1
NO_DROPOUT_P = 1e-12  # drops nothing, yet runs the same code: with it all implementations must agree

Inputs = list[Any]
"""Tensors, and lists of tensors, in the order of the operation's arguments."""


@dataclass(frozen=True)
class Sizes:
    """B sequences of T tokens in a model of width C with H heads and L layers."""

    B: int
    T: int
    C: int
    H: int
    L: int
    V: int = PADDED_VOCAB

    @property
    def rows(self) -> int:
        return self.B * self.T

    @property
    def D(self) -> int:
        return self.C // self.H


MODELS = {"124M": (768, 12, 12), "350M": (1024, 16, 24), "774M": (1280, 20, 36), "1.5B": (1600, 25, 48)}
_BATCHES = ((8, 1024), (1, 64), (64, 1024), (8, 8192), (1, 1024), (4, 1024), (16, 1024), (32, 1024), (1, 256))


def _sizes(model: str, *batches: tuple[int, int]) -> list[Sizes]:
    return [Sizes(b, t, *MODELS[model]) for b, t in batches]


def shapes_of(name: str, device: torch.device) -> list[Sizes]:
    """The set of that name, the most important first.

    Raises:
        InputError: there is no such set.
    """
    quick = _sizes("124M", (8, 1024), (1, 64))
    if device.type == "cpu":  # for the optimizer one layer: all parameters take minutes
        quick = [dataclasses.replace(sizes, L=1) for sizes in _sizes("124M", (1, 1024), (1, 64))]
    larger = [sizes for model in list(MODELS)[1:] for sizes in _sizes(model, (8, 1024))]
    small = preset("char-cpu")
    net = small.model
    char_cpu = Sizes(small.batch_size, net.block_size, net.n_embd, net.n_head, net.n_layer, V=VOCAB_MULTIPLE)
    sets = {
        "quick": quick,
        "cpu": [char_cpu, *quick],
        "gpt2": [*_sizes("124M", *_BATCHES[:5]), *larger],
        "all": [sizes for model in MODELS for sizes in _sizes(model, *_BATCHES)],
    }
    if name not in sets:
        raise InputError(f"shapes = {name!r}: it must be one of {', '.join(sets)}")
    return sets[name]


@dataclass(frozen=True)
class Workload:
    """How to run one operation. `names` are the sizes that it depends on, in the order of its label."""

    operation: str
    names: str
    make: Callable[[Sizes, torch.dtype, torch.device], Inputs]
    call: Callable[..., Any]
    """The public function, on inputs, with `backend` and what else is fixed here."""
    cost: Callable[[Sizes, torch.dtype, bool], Cost]
    """(sizes, dtype, backward)"""
    check: Callable[..., Any] | None = None
    """What is compared instead of `call`, where that is random."""
    elements: Callable[[Sizes, Inputs], int] = lambda sizes, inputs: inputs[0].numel()
    """What the class of shapes goes by, as the operation itself tells `auto`."""
    differentiable: bool = True
    one_sum: bool = False
    """The result is one sum over everything, whose rounding errors a part does not foretell."""
    in_place: bool = False
    """The call writes into its inputs: those it then returns."""

    def label(self, sizes: Sizes) -> str:
        """ "B=8 T=1024 C=768"."""
        return " ".join(f"{name}={getattr(sizes, name)}" for name in self.names)


def directions(workload: Workload) -> tuple[str, ...]:
    return ("both", "forward", "backward") if workload.differentiable else ("forward",)


def cost_of(workload: Workload, sizes: Sizes, dtype: torch.dtype, direction: str) -> Cost:
    """The least work of a call."""
    passes = {"forward": (False,), "backward": (True,), "both": (False, True)}[direction]
    return sum((workload.cost(sizes, dtype, backward) for backward in passes), Cost(0, 0))


def least_bytes(workload: Workload, sizes: Sizes, dtype: torch.dtype, direction: str) -> int:
    """What a call must hold at the least: its inputs, outputs, and with backward the gradients of both."""
    meta = torch.device("meta")
    with torch.no_grad():
        inputs = workload.make(sizes, dtype, meta)
        outputs = [] if workload.in_place else tensors_of(workload.call(*inputs, backend="eager"))
    floating = [x for x in tensors_of(inputs) if x.is_floating_point()]
    held = [*tensors_of(inputs), *outputs]
    if direction != "forward":
        held += [*floating, *outputs]
    return sum(x.numel() * x.element_size() for x in held)


def class_of(workload: Workload, sizes: Sizes, dtype: torch.dtype) -> str:
    return shape_class(workload.elements(sizes, workload.make(sizes, dtype, torch.device("meta"))))


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors of nested lists and tuples, in order."""
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def to_float64(inputs: Inputs) -> Inputs:
    """Copies in float64 of what is floating point, but for the step counters, which stay float32."""

    def wide(x: Any) -> Any:
        return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim else x

    return pytree.tree_map(wide, inputs)


def copy_of(inputs: Inputs, *, gradients: bool) -> Inputs:
    """Copies in memory of their own; with `gradients` those that are floating point record them."""

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone().requires_grad_(gradients and x.is_floating_point())

    return pytree.tree_map(copied, inputs)


# -- the operations ------------------------------------------------------------------------------------------


def _x(sizes: Sizes, dtype: torch.dtype, device: torch.device, width: int) -> Tensor:
    return random_tensor(sizes.B, sizes.T, width, device=device, dtype=dtype)


def _w(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights of GPT-2's initial size."""
    return random_tensor(*shape, device=device, dtype=dtype, scale=0.02)


def _norm_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, x: int, w: int) -> Inputs:
    """`x` inputs (B, T, C) and `w` of shape (C,)."""
    wide = [_x(sizes, dtype, device, sizes.C) for _ in range(x)]
    return [*wide, *(random_tensor(sizes.C, device=device, dtype=dtype) for _ in range(w))]


def _norm(operation: str, call: Callable[..., Any], cost: Callable[..., Cost], *, x: int, w: int) -> Workload:
    return Workload(
        operation,
        "BTC",
        lambda sizes, dtype, device: _norm_inputs(sizes, dtype, device, x=x, w=w),
        call,
        lambda sizes, dtype, backward: cost(sizes.rows, sizes.C, dtype, backward=backward),
    )


def _gelu(operation: str, call: Callable[..., Any], *, bias: bool) -> Workload:
    def make(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
        return [
            _x(sizes, dtype, device, 4 * sizes.C),
            *([_w(4 * sizes.C, dtype=dtype, device=device)] if bias else []),
        ]

    def cost(sizes: Sizes, dtype: torch.dtype, backward: bool) -> Cost:
        if bias:
            return bias_cost(sizes.rows, 4 * sizes.C, dtype, backward=backward)
        return gelu_cost(sizes.rows * 4 * sizes.C, dtype, backward=backward)

    return Workload(operation, "BTC", make, call, cost)


def _linear_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    weight = _w(4 * sizes.C, sizes.C, dtype=dtype, device=device)
    return [_x(sizes, dtype, device, sizes.C), weight, _w(4 * sizes.C, dtype=dtype, device=device)]


def _attention_cost(sizes: Sizes, dtype: torch.dtype, backward: bool) -> Cost:
    return attention_cost(sizes.B, sizes.T, sizes.T, sizes.H, sizes.D, dtype, backward=backward)


def _decode_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A query for each sequence, and a cache that is full."""
    shapes = [(sizes.B, length, sizes.H, sizes.D) for length in (1, sizes.T, sizes.T)]
    vectors = [random_tensor(*shape, device=device, dtype=dtype) for shape in shapes]
    return [*vectors, torch.full((1,), sizes.T, device=device)]


def _tokens(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.randint(sizes.V - PADDING, (sizes.B, sizes.T), device=device)


def _embedding_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    tables = (_w(n, sizes.C, dtype=dtype, device=device) for n in (sizes.V, sizes.T))
    return [_tokens(sizes, device), *tables]


def _embedding_cost(sizes: Sizes, dtype: torch.dtype, backward: bool) -> Cost:
    shape = sizes.B, sizes.T, sizes.C
    return embedding_cost(*shape, dtype, vocab_size=sizes.V, block_size=sizes.T, backward=backward)


def _dropout(p: float) -> Callable[..., Tensor]:
    return lambda x, residual, backend: ops.dropout_add(x, residual, p=p, backend=backend)


def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, backend: str) -> Tensor:
    vocab_size = weight.shape[0] - PADDING
    return ops.linear_cross_entropy(x, weight, targets, vocab_size=vocab_size, backend=backend)


def _cross_entropy(logits: Tensor, targets: Tensor, *, backend: str) -> Tensor:
    return ops.cross_entropy(logits, targets, vocab_size=logits.shape[-1] - PADDING, backend=backend)


def _linear_cross_entropy_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    weight = _w(sizes.V, sizes.C, dtype=dtype, device=device)
    return [_x(sizes, dtype, device, sizes.C), weight, _tokens(sizes, device)]


def parameter_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    """Of GPT-2: two tables, four matrices and eight vectors in each layer, and the last norm."""
    C = sizes.C
    layer = [
        (C,),
        (C,),
        (3 * C, C),
        (3 * C,),
        (C, C),
        (C,),
        (C,),
        (C,),
        (4 * C, C),
        (4 * C,),
        (C, 4 * C),
        (C,),
    ]
    return [(sizes.V, C), (BLOCK, C), *(layer * sizes.L), (C,), (C,)]


def _parameters(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [_w(*shape, dtype=dtype, device=device) for shape in parameter_shapes(sizes)]


def _elements(sizes: Sizes) -> int:
    return sum(torch.Size(shape).numel() for shape in parameter_shapes(sizes))


def _adamw_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    """params, grads, exp_avgs, exp_avg_sqs, steps, hyper and of 16 bits the working copies of fp32 params."""
    params, grads, means = (
        _parameters(sizes, kind, device) for kind in (torch.float32, dtype, torch.float32)
    )
    squares = [x.square() for x in means]
    steps = [torch.full((), 10.0, device=device) for _ in params]
    hyper = torch.tensor([[6e-4, 0.9, 0.95, 1e-8, 0.1]], dtype=torch.float64, device=device)
    copies = [x.to(dtype) for x in params] if dtype != torch.float32 else []
    return [params, grads, means, squares, steps, hyper, copies]


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    hyper: Tensor,
    copies: Sequence[Tensor] = (),
    *,
    backend: str | None = None,
) -> Any:
    ops.adamw_(params, grads, means, squares, steps, hyper, [0] * len(params), copies=copies, backend=backend)
    return params, means, squares, list(copies)


def _adamw_cost(sizes: Sizes, dtype: torch.dtype, backward: bool) -> Cost:
    copy = None if dtype == torch.float32 else dtype
    return adamw_cost(_elements(sizes), torch.float32, dtype, copy=copy)


WORKLOADS = {
    workload.operation: workload
    for workload in (
        Workload(
            "attention",
            "BTCH",
            lambda sizes, dtype, device: [
                random_tensor(sizes.B, sizes.T, 3, sizes.H, sizes.D, device=device, dtype=dtype)
            ],
            ops.causal_attention_qkvpacked,
            _attention_cost,
        ),
        Workload(
            "linear_cross_entropy",
            "BTCV",
            _linear_cross_entropy_inputs,
            _linear_cross_entropy,
            lambda sizes, dtype, backward: linear_cross_entropy_cost(
                sizes.rows, sizes.C, sizes.V, dtype, backward=backward
            ),
        ),
        _norm("layer_norm", ops.layer_norm, layer_norm_cost, x=1, w=2),
        _norm("add_layer_norm", ops.add_layer_norm, add_cost, x=2, w=2),
        _gelu("gelu", ops.gelu, bias=False),
        _gelu("bias_gelu", ops.bias_gelu, bias=True),
        Workload(
            "linear_gelu",
            "BTC",
            _linear_inputs,
            ops.linear_gelu,
            lambda sizes, dtype, backward: linear_gelu_cost(
                sizes.rows, sizes.C, 4 * sizes.C, dtype, backward=backward
            ),
        ),
        Workload(
            "linear",
            "BTC",
            _linear_inputs,
            ops.linear,
            lambda sizes, dtype, backward: linear_cost(
                sizes.rows, sizes.C, 4 * sizes.C, dtype, backward=backward
            ),
        ),
        Workload(
            "cross_entropy",
            "BTV",
            lambda sizes, dtype, device: [_x(sizes, dtype, device, sizes.V), _tokens(sizes, device)],
            _cross_entropy,
            lambda sizes, dtype, backward: cross_entropy_cost(sizes.rows, sizes.V, dtype, backward=backward),
        ),
        Workload(
            "adamw_",
            "CL",
            _adamw_inputs,
            _adamw,
            _adamw_cost,
            elements=lambda sizes, inputs: _elements(sizes),
            differentiable=False,
            in_place=True,
        ),
        Workload(
            "grad_norm",
            "CL",
            lambda sizes, dtype, device: [_parameters(sizes, dtype, device)],
            ops.grad_norm,
            lambda sizes, dtype, backward: norm_cost(_elements(sizes), dtype),
            elements=lambda sizes, inputs: _elements(sizes),
            differentiable=False,
            one_sum=True,
        ),
        Workload(
            "embedding",
            "BTCV",
            _embedding_inputs,
            ops.embedding,
            _embedding_cost,
            elements=lambda sizes, inputs: sizes.rows * sizes.C,
        ),
        Workload(
            "dropout_add",
            "BTC",
            lambda sizes, dtype, device: _norm_inputs(sizes, dtype, device, x=2, w=0),
            _dropout(DROPOUT_P),
            lambda sizes, dtype, backward: dropout_cost(sizes.rows * sizes.C, dtype, backward=backward),
            check=_dropout(NO_DROPOUT_P),
        ),
        _norm("rms_norm", ops.rms_norm, rms_norm_cost, x=1, w=1),
        Workload(
            "decode_attention",
            "BTCH",
            _decode_inputs,
            ops.decode_attention,
            lambda sizes, dtype, backward: decode_cost(sizes.B, sizes.T, sizes.H, sizes.D, dtype),
            elements=lambda sizes, inputs: inputs[1].numel(),
            differentiable=False,
        ),
    )
}
"""By operation, those that weigh most in a training step first; what only writing needs is last."""
