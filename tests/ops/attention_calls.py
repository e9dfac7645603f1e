"""What the tests of attention's kernels share: a call with its gradients, comparing it, and what it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops

from .guard import guarded
from .helpers import assert_accurate


def run(inputs: list[Tensor], do: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """o and the gradients of q, k and v, or of qkv."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    call = ops.causal_attention if len(inputs) == 3 else ops.causal_attention_qkvpacked
    o = call(*inputs, backend=backend, **options)
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


def compare(inputs: list[Tensor], do: Tensor, backend: str, **options: Any) -> None:
    """Within twice PyTorch's error of the oracle; every element written and nothing else; the same twice."""
    eager = run(inputs, do, "eager", **options)
    oracle = run([x.cpu().double() for x in inputs], do.cpu().double(), "eager", **options)
    with guarded() as guard:
        first = run([guard.place(x) for x in inputs], guard.place(do), backend, **options)
    again = run(inputs, do, backend, **options)
    for a, b, e, o in zip(first, again, eager, oracle, strict=True):
        assert_accurate(a, e, o)
        assert torch.equal(a, b)


class Recorded(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))
