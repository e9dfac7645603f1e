"""AdamW on a list of tensors, in place, and the norm of a list of gradients.

For a tensor at its step t, with the hyperparameters of its group:

    s  = clip / grad_scale,  clip = min(1, max_grad_norm / (grad_norm / grad_scale + 1e-6))
    g  = s * grad
    m' = m + (1 - beta1) (g - m)                             exp_avg
    v' = beta2 v + (1 - beta2) g^2                           exp_avg_sq
    p' = (1 - lr wd) p - lr / (1 - beta1^t) * m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)

and nothing changes, the step neither, where found_inf is not 0.

    grad_norm = sqrt(sum over all elements of all gradients of g^2)

There is no backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.ops.checks import check_floating, check_shape
from fastgpt.ops.library import Kernels, Operator, add_native, add_triton, check_dtypes
from fastgpt.ops.registry import Cost, register, select

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay")


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    copies: Sequence[Tensor] = (),
    grad_norm: Tensor | None = None,
    max_grad_norm: float = 1.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding: bool = False,
) -> None:
    applied = torch.ones_like(steps[0]) if found_inf is None else (found_inf == 0).to(steps[0]).reshape(())
    scale = exp_avgs[0].new_ones(())
    if grad_scale is not None:
        scale = scale / grad_scale.reshape(())
    if grad_norm is not None:
        scale = scale * (max_grad_norm / (grad_norm * scale + 1e-6)).clamp(max=1)
    for i, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        lr, beta1, beta2, eps, decay = hyper[groups[i]].unbind()  # float64: rounded where it meets a tensor
        t = step + applied
        g = grad.to(exp_avg.dtype) * scale
        m = exp_avg + (g - exp_avg) * (1 - beta1)
        v = exp_avg_sq * beta2 + g * g * (1 - beta2)
        denominator = v.sqrt() / (1 - beta2 ** t.double()).sqrt() + eps
        p = param.to(exp_avg.dtype) * (1 - lr * decay)
        p = p - lr / (1 - beta1 ** t.double()) * (m / denominator)
        rounded = _round_randomly(p) if stochastic_rounding else p
        step.copy_(t)
        for old, new in [(param, rounded), (exp_avg, m), (exp_avg_sq, v)]:
            old.copy_(torch.where(applied.bool(), new, old.to(new.dtype)))
        if copies:
            copies[i].copy_(torch.where(applied.bool(), p, copies[i].to(p.dtype)))


def _round_randomly(p: Tensor) -> Tensor:
    """One of the two bfloat16 neighbours of fp32 values, each as likely as it is near."""
    bits = p.float().view(torch.int32)
    cut = (bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)
    return torch.where(p.isnan(), p, cut.view(torch.float32))  # a NaN might wrap around


def norm_reference(grads: Sequence[Tensor]) -> Tensor:
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    # contiguous, since PyTorch adds up strided elements one by one, with more rounding
    norms = [torch.linalg.vector_norm(g.contiguous(), dtype=wide) for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


register("adamw_", "eager", reference)
register("grad_norm", "eager", norm_reference)


def _call(
    kernels: Kernels,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    copies: Sequence[Tensor] = (),
    grad_norm: Tensor | None = None,
    max_grad_norm: float = 1.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding: bool = False,
) -> None:
    check_dtypes(**{"params[0]": params[0], "grads[0]": grads[0], "copies[0]": copies[0] if copies else None})
    if exp_avgs[0].dtype != torch.float32:
        raise InputError(f"exp_avgs[0] has dtype {exp_avgs[0].dtype}: kernels take torch.float32")
    seed = None
    if stochastic_rounding:  # on the device, where a CUDA graph advances the generator at each replay
        seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=hyper.device)
    scalars = [x if x is None else x.float() for x in (grad_norm, grad_scale, found_inf)]
    kernels.forward(
        *(params, grads, exp_avgs, exp_avg_sqs, steps, copies, hyper, groups),
        *(scalars[0], max_grad_norm, *scalars[1:], seed),
    )


def _norm_call(kernels: Kernels, grads: Sequence[Tensor]) -> Tensor:
    check_dtypes(**{"grads[0]": grads[0]})
    return kernels.forward(grads)


def _fake(*_: object) -> None:
    """Everything is written in place."""


def _fake_norm(grads: Sequence[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


ADAMW = Operator(
    name="adamw_",
    forward="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] copies, Tensor hyper, int[] groups, Tensor? grad_norm, "
    "float max_grad_norm, Tensor? grad_scale, Tensor? found_inf, Tensor? seed) -> ()",
    fake_forward=_fake,
    call=_call,
)
GRAD_NORM = Operator(
    name="grad_norm", forward="(Tensor[] grads) -> Tensor", fake_forward=_fake_norm, call=_norm_call
)
add_triton(ADAMW, "adamw")
add_triton(GRAD_NORM, "adamw")
add_native(ADAMW)
add_native(GRAD_NORM)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    *,
    copies: Sequence[Tensor] = (),
    grad_norm: Tensor | None = None,
    max_grad_norm: float = 1.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding: bool = False,
    backend: str | None = None,
) -> None:
    """One step of AdamW on all `params`, in place; `fastgpt.optim.AdamW` is the optimizer around it.

    All tensors are on one device, and those of one list have one dtype.

    Args:
        params: floating point; with `copies` the fp32 master weights.
        grads: each of the shape of its parameter.
        exp_avgs, exp_avg_sqs: the moments, each of the shape of its parameter; float32, or float64 for
            float64 parameters.
        steps: how many steps each parameter has taken: scalars, float32; counted up here.
        hyper: (number of groups, 5), float64: lr, beta1, beta2, eps and weight decay of each group.
        groups: for each parameter its row in `hyper`.
        copies: working copies of the parameters, of another dtype, written in the same pass; or none at all.
        grad_norm: norm of the gradients as they are, for clipping; None does not clip.
        max_grad_norm: the norm that longer gradients are scaled to.
        grad_scale: scalar that the gradients are too large by (of a GradScaler), or None.
        found_inf: scalar; not 0 leaves everything as it is.
        stochastic_rounding: round bfloat16 parameters to either neighbour at random, right in the mean; the
            random numbers follow `torch.manual_seed` and are new ones in each call.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Raises:
        InputError: lists that do not fit, wrong dtypes, shapes or devices.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; equal to
    `torch.optim.AdamW` and `torch.nn.utils.clip_grad_norm_`.
    """
    if len(params) == 0:
        return
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    for name, tensors in (lists | {"copies": copies} if copies else lists).items():
        _check_list(name, tensors, params)
    _check_list("params", params, params)
    if len(groups) != len(params):
        raise InputError(
            f"groups has length {len(groups)}: it must have {len(params)}, one for each of params"
        )
    if hyper.ndim != 2 or hyper.shape[1] != len(HYPER) or hyper.dtype != torch.float64:
        raise InputError(
            f"hyper has shape {tuple(hyper.shape)} and dtype {hyper.dtype}: "
            f"it must be (groups, {len(HYPER)}), torch.float64"
        )
    if min(groups) < 0 or max(groups) >= len(hyper):
        raise InputError(f"groups has {min(groups)} to {max(groups)}: hyper has rows 0 to {len(hyper) - 1}")
    scalars = {"grad_norm": grad_norm, "grad_scale": grad_scale, "found_inf": found_inf}
    for name, scalar in scalars.items():
        if scalar is not None and scalar.numel() != 1:
            raise InputError(f"{name} has shape {tuple(scalar.shape)}: it must hold one element")
    check_floating(**{"params[0]": params[0], "hyper": hyper}, **scalars)
    if stochastic_rounding and (params[0].dtype != torch.bfloat16 or copies):
        raise InputError(
            f"stochastic_rounding is for bfloat16 parameters without copies: params have {params[0].dtype}"
            + (" and copies" if copies else "")
        )
    trusted_adamw_(
        *(params, grads, exp_avgs, exp_avg_sqs, steps, hyper, groups),
        copies=copies,
        grad_norm=grad_norm,
        max_grad_norm=max_grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        stochastic_rounding=stochastic_rounding,
        backend=backend,
    )


def trusted_adamw_(
    params: Sequence[Tensor],
    *lists: Any,
    copies: Sequence[Tensor],
    backend: str | None = None,
    **options: Any,
) -> None:
    """`adamw_` of arguments that are right, at least one: looking at each tensor takes longer than a step.

    Raises:
        InputError: strides that the kernel does not take.
    """
    elements = sum(param.numel() for param in params)
    try:
        select("adamw_", backend, params[0], elements=elements)(params, *lists, copies=copies, **options)
    except ValueError as error:  # of a kernel in C++, which knows no InputError
        raise InputError(str(error)) from None
    if not torch.compiler.is_compiling():  # which sees the mutation in the schema
        # A backward that still needs the old values must fail.
        torch.autograd.graph.increment_version([*params, *copies])


def _check_list(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(tensors) != len(params):
        raise InputError(
            f"{name} has length {len(tensors)}: it must have {len(params)}, one for each of params"
        )
    device, dtype = params[0].device, tensors[0].dtype
    wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    wanted = {"steps": torch.float32, "exp_avgs": wide, "exp_avg_sqs": wide}.get(name, dtype)
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if not tensor.is_floating_point() or tensor.dtype != wanted:
            allowed = f"{wanted}" if wanted.is_floating_point else "floating point"
            raise InputError(f"{name}[{i}] has dtype {tensor.dtype}: it must be {allowed}")
        if tensor.device != device:
            raise InputError(f"{name}[{i}] is on {tensor.device}: it must be on {device}, where params[0] is")
        if tensor.layout != torch.strided:
            raise InputError(f"{name}[{i}] is {tensor.layout}: it must be dense")
        if name == "steps":
            check_shape(f"{name}[{i}]", tensor, (), "a scalar")
        else:
            check_shape(f"{name}[{i}]", tensor, param.shape, f"the shape of params[{i}]")


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The Euclidean norm of all gradients together, as if they were one vector.

    Args:
        grads: floating point, of any shapes, all of one dtype and on one device.
        backend: implementation to use; None is the current choice (`fastgpt.ops.use`).

    Returns:
        A scalar, float32 (float64 for float64): the sums are in fp32 whatever the gradients are. Infinity or
        NaN in any gradient gives infinity or NaN; no gradients give 0.

    Raises:
        InputError: dtypes or devices that differ, or a dtype that is not floating point.

    Source: `torch.nn.utils.get_total_norm`.
    """
    if len(grads) == 0:
        return torch.zeros(())
    for i, grad in enumerate(grads):
        check_floating(**{"grads[0]": grads[0], f"grads[{i}]": grad})
        if grad.dtype != grads[0].dtype:
            raise InputError(f"grads[{i}] has dtype {grad.dtype}: it must be {grads[0].dtype}, as grads[0]")
        if grad.layout != torch.strided:
            raise InputError(f"grads[{i}] is {grad.layout}: it must be dense")
    return trusted_grad_norm(grads, backend=backend)


def trusted_grad_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """`grad_norm` of gradients that are right, at least one."""
    elements = sum(grad.numel() for grad in grads)
    return select("grad_norm", backend, grads[0], elements=elements)(grads)


def cost(
    elements: int, dtype: torch.dtype, grad_dtype: torch.dtype, *, copy: torch.dtype | None = None
) -> Cost:
    """Reads and writes p (of `dtype`) and two fp32 moments, reads the gradient, and writes the copy.

    Flops per element: scale, decay, m (3), v (4), square root, two divisions, eps, step (2).
    """
    bytes_each = 2 * dtype.itemsize + 4 * 4 + grad_dtype.itemsize + (copy.itemsize if copy else 0)
    return Cost(15 * elements, bytes_each * elements)


def norm_cost(elements: int, dtype: torch.dtype) -> Cost:
    """Reads the gradients; a square and a sum for each element."""
    return Cost(2 * elements, elements * dtype.itemsize)
