"""Kernels as PyTorch operators: what all implementations of an operation share, declared once.

A kernel reaches PyTorch as two operators of `torch.library`, `<operation>_forward` and
`<operation>_backward`, in the namespace of its implementation (`fastgpt_triton`, `fastgpt_native`). Their
schemas, fake functions (which tell `torch.compile` the shapes) and the autograd formula belong to the
operation, not to the kernel: an `Operator` holds them, so that a second implementation adds nothing but its
kernels.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastgpt.errors import InputError
from fastgpt.ops.registry import register


class Kernels(NamedTuple):
    """The operators of one implementation."""

    forward: OpOverload
    backward: OpOverload  # `forward` again where there is no gradient


@dataclass(frozen=True)
class Operator:
    """What every kernel of an operation has in common.

    Schemas have no absent outputs: a gradient that is not wanted comes back with shape (0,). Kernels take
    arguments with any strides and return contiguous tensors, none of which shares memory with another or with
    an argument. No operator has a second derivative: its formula raises NotImplementedError.

    Autocast reaches an operator only where its `call` casts. Kernels take mixed dtypes, compute in fp32, and
    write the dtype of x, or what x and the other addend promote to. PyTorch's autocast has layer_norm return
    fp32 on CUDA; here bf16 x gives that rounded to bf16, to which the next matrix product would cast it.

    An operation without a gradient leaves out `backward`, `fake_backward`, `save` and `gradients`. Native
    kernels have `save` and `gradients` in C++ (csrc/autograd), where a call costs microseconds.
    """

    name: str
    call: Callable[..., Any]  # (kernels, *arguments): as the public function, less `backend`
    forward: str  # schema without the name: "(Tensor x, float eps) -> (Tensor, Tensor)"
    fake_forward: Callable[..., Any]
    backward: str | None = None
    fake_backward: Callable[..., Any] | None = None
    save: Callable[..., None] | None = None  # (ctx, inputs, output) of the forward operator
    gradients: Callable[..., Any] | None = None  # (kernels, ctx, *of the outputs): one for each input


def add_triton(operator: Operator, module: str, *, package: str | None = "fastgpt.kernels") -> None:
    """Add the row `triton`: functions `<name>_forward` and `<name>_backward` of `<package>.<module>`.

    They take and return what the schemas say. For a kernel outside the package, `module` is its full name and
    `package` None. The module, and with it Triton, is not imported before the first of them runs.
    """
    path = module if package is None else f"{package}.{module}"
    for direction, schema in (("forward", operator.forward), ("backward", operator.backward)):
        if schema is not None:
            name = f"{operator.name}_{direction}"
            _triton.define(name + schema)
            for key in ("CPU", "CUDA"):
                _triton.impl(name, _lazy(path, name), key)
    kernels = _attach(_triton.ns, operator)
    register(operator.name, "triton", functools.partial(operator.call, kernels), triton_missing)


def add_native(operator: Operator) -> None:
    """Add the row `native`: the operators of `fastgpt._C`, whose C++ (csrc/) holds the derivative too."""
    missing = functools.partial(native_missing, operator.name)
    if _native_absent:
        register(operator.name, "native", operator.call, missing)  # never called
    else:
        kernels = _fake("fastgpt_native", operator)
        register(operator.name, "native", functools.partial(operator.call, kernels), missing)


def native_missing(operation: str, device: torch.device) -> str | None:
    """Why the native kernel of an operation cannot run on the device, or None when it can."""
    if _native_absent or (operation, device.type) in _native_built:
        return _native_absent
    if device.type == "cuda":
        return (
            "the native kernels were built without CUDA: install fastgpt again with nvcc and a CUDA build of "
            "torch at hand; FASTGPT_BUILD=cuda makes what is missing an error"
        )
    return "native kernels run on CPU and CUDA tensors"


def triton_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on the device, or None when they can."""
    if not _HAS_TRITON:
        return "Triton is not installed (Linux only): pip install triton"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        "Triton kernels run on CUDA tensors, which take an NVIDIA GPU and its driver; to try one on CPU "
        "tensors, thousands of times slower, set TRITON_INTERPRET=1 before Python starts"
    )


def check_dtypes(**tensors: Tensor | None) -> None:
    """The dtypes that kernels take, which compute in fp32 whatever they read."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"{name} has dtype {tensor.dtype}: kernels take float32, float16 and bfloat16; "
                "use backend='eager' for others"
            )


def product_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a linear layer for a kernel: cast where autocast casts those of `F.linear`.

    Raises:
        InputError: dtypes that differ, or that kernels do not take.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_dtypes(x=x, weight=weight, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputError(f"{name} has dtype {tensor.dtype}: it must be {x.dtype}, as x is")
    return x, weight, bias


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_triton = torch.library.Library("fastgpt_triton", "DEF")


def _lazy(module: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return run


def _load_native() -> str | None:
    """Load `fastgpt._C`, which registers its operators with PyTorch; why that cannot be done, or None."""
    if importlib.util.find_spec("fastgpt._C") is None:
        return (
            "the native kernels were not built: install fastgpt again with a C++ compiler (g++ or clang++) "
            "at hand and without FASTGPT_BUILD=none; pip's -v shows the reason"
        )
    again = f"the native kernels were not built for torch {torch.__version__}: install fastgpt again"
    try:
        extension = importlib.import_module("fastgpt._C")
    except ImportError as error:
        return f"{again} ({error})"
    if extension.torch_version != torch.__version__.split("+")[0]:
        return f"{again} (they were built for {extension.torch_version})"
    return None


def _fake(namespace: str, operator: Operator) -> Kernels:
    """The operators of `namespace`, already defined, given their fake functions."""
    packets = getattr(torch.ops, namespace)
    forward = getattr(packets, f"{operator.name}_forward").default
    torch.library.register_fake(forward, operator.fake_forward)
    if operator.backward is None:
        return Kernels(forward, forward)
    assert operator.fake_backward is not None
    backward = getattr(packets, f"{operator.name}_backward").default
    torch.library.register_fake(backward, operator.fake_backward)
    return Kernels(forward, backward)


def _attach(namespace: str, operator: Operator) -> Kernels:
    """The operators of `namespace`, already defined, given their fake functions and their derivative."""
    kernels = _fake(namespace, operator)
    if operator.backward is None:
        return kernels

    def gradients(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # only under create_graph=True
            raise NotImplementedError(
                f"{operator.name} has no second derivative in its kernels: use backend='eager' where "
                "create_graph=True is needed"
            )
        assert operator.gradients is not None
        return operator.gradients(kernels, ctx, *grads)

    torch.library.register_autograd(kernels.forward, gradients, setup_context=operator.save)
    return kernels


_native_absent = _load_native()
_native_built = {
    (name.removeprefix("fastgpt_native::").removesuffix("_forward"), device)
    for device in ("cpu", "cuda")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key(device.upper())
    if name.startswith("fastgpt_native::")
}
