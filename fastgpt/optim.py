"""AdamW in one pass over all parameters, and the optimizer of a run."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from fastgpt.config import TrainConfig
from fastgpt.errors import InputError
from fastgpt.ops.adamw import HYPER, reference, trusted_adamw_, trusted_grad_norm
from fastgpt.ops.checks import check_at_least
from fastgpt.ops.registry import select

# What torch.optim.AdamW keeps in a group besides, so that each can load the other's state.
_TORCH_OPTIONS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


@dataclass
class _Batch:
    """Parameters that are updated by one call, the lists as `adamw_` takes them."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; the formula and the results of `torch.optim.AdamW`.

    One call of `fastgpt.ops.adamw_` updates all parameters of a device and dtype, so that choosing
    `fastgpt.ops.use(adamw_="triton", grad_norm="triton")` makes a step two or four kernel launches. The host
    waits for nothing: steps, norm, scale and hyperparameters are on the device. A step can be captured in a
    CUDA graph after one step outside it, with gradients kept in place (`zero_grad(set_to_none=False)`); call
    `write_hyperparameters()` before a replay that is to see another learning rate.

    Moments are float32 whatever the parameters are. `state_dict` holds them by the names and in the format of
    `torch.optim.AdamW`, which can load it, as this class loads torch's; master weights are an entry `master`
    besides. Learning rate schedulers, GradScaler (`found_inf` and `grad_scale` are used on the device) and
    closures work as with torch's. Parameters without a gradient are skipped.

    Args:
        params: parameters, or dicts of groups of them with their own lr, betas, eps and weight_decay.
        lr: a float, or a scalar tensor on the parameters' device that is read in each step.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: times lr, the share of each weight that is taken away in a step.
        max_grad_norm: longer gradients are scaled to this norm, taken over all parameters, in the same pass;
            None leaves them. The norm before that is in `grad_norm` after a step.
        master_weights: keep float32 copies of bfloat16 and float16 parameters and update those; parameters
            are written in the same pass. A change of a parameter from outside, but for one through `.data`,
            is taken over.
        stochastic_rounding: without master weights, round bfloat16 parameters up or down at random with the
            right mean, by new random numbers in each step, so that small updates are not lost.

    Raises:
        InputError: a value out of range, options that exclude each other, sparse gradients.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves unscaling and skipping to `step`

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        master_weights: bool = True,
        stochastic_rounding: bool = False,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {max_grad_norm}: it must be greater than 0, or None")
        if stochastic_rounding and master_weights:
            raise InputError(
                "stochastic_rounding is for parameters without master weights, "
                "which lose nothing to rounding: add master_weights=False"
            )
        self.max_grad_norm = max_grad_norm
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.grad_norm: Tensor | None = None
        self.veto: Callable[[Tensor], Tensor | None] | None = None  # of `update`
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **_TORCH_OPTIONS})
        self._prepare()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    def __getstate__(self) -> dict[str, Any]:
        options = ("max_grad_norm", "master_weights", "stochastic_rounding")
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in options},
            "grad_norm": None,
            "veto": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in _TORCH_OPTIONS.items():
                group.setdefault(name, value)
            _check_group(group)
        self._prepare()

    def _prepare(self) -> None:
        """Make what is not part of the state; a CUDA graph may be reading what is there."""
        if not hasattr(self, "_hyper"):
            # By device: the table of hyperparameters, and what is in it.
            self._hyper: dict[torch.device, tuple[Tensor, list[tuple[float, ...]]]] = {}
            self._versions: dict[Tensor, int] = {}  # of parameters with a master, when it was last written

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Returns what `closure`, if given, returns."""
        loss = closure_loss(closure)
        batches = self._batches()
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        norm = None
        if self.max_grad_norm is not None and batches:
            norm = _norm(batches.values())
            self.grad_norm = norm if grad_scale is None else norm / grad_scale
            if self.veto is not None:
                found_inf = _either(found_inf, self.veto(self.grad_norm))
        self.write_hyperparameters()
        for (device, dtype, *_), batch in batches.items():
            trusted_adamw_(
                *(batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.steps),
                self._hyper[device][0],
                batch.groups,
                copies=batch.copies,
                grad_norm=_on(device, norm),
                max_grad_norm=1.0 if self.max_grad_norm is None else self.max_grad_norm,
                grad_scale=_on(device, grad_scale),
                found_inf=_on(device, found_inf),
                stochastic_rounding=self.stochastic_rounding and dtype == torch.bfloat16,
            )
            for param in batch.copies:
                self._versions[param] = param._version
        return loss

    def _batches(self) -> dict[tuple[Any, ...], _Batch]:
        """The parameters that have a gradient, by device and dtypes."""
        batches: dict[tuple[Any, ...], _Batch] = {}
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise InputError(
                        f"a parameter of shape {tuple(param.shape)} has a gradient of layout {grad.layout}: "
                        "AdamW takes dense gradients (torch.optim.SparseAdam takes sparse ones)"
                    )
                state = self._state_of(param)
                batch = batches.setdefault((param.device, param.dtype, grad.dtype), _Batch())
                if "master" in state:
                    batch.copies.append(param)
                batch.params.append(state.get("master", param.detach()))
                batch.grads.append(grad)
                batch.exp_avgs.append(state["exp_avg"])
                batch.exp_avg_sqs.append(state["exp_avg_sq"])
                batch.steps.append(state["step"])
                batch.groups.append(number)
        return batches

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=_wide(param), memory_format=torch.preserve_format)
        if self._has_master(param):
            if "master" not in state:
                state["master"] = param.detach().to(_wide(param))
            elif self._versions.get(param) != param._version:  # someone else wrote it: take over what differs
                master = state["master"]
                master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(master.dtype)))
        return state

    def _has_master(self, param: Tensor) -> bool:
        return self.master_weights and param.dtype in (torch.bfloat16, torch.float16)

    @torch.no_grad()
    def write_hyperparameters(self) -> None:
        """Bring the table on each device up to what the groups say; `step` does so, but not inside a graph.

        Raises:
            InputError: called while a CUDA graph is captured, which would repeat the writing of old values.
        """
        rows = [
            (0.0 if isinstance(g["lr"], Tensor) else g["lr"], *g["betas"], g["eps"], g["weight_decay"])
            for g in self.param_groups
        ]
        for device in {param.device for group in self.param_groups for param in group["params"]}:
            table, written = self._hyper.get(device, (torch.empty(0), []))
            if written != rows:
                host = torch.tensor(rows, dtype=torch.float64)
                if device.type == "cuda":
                    if torch.cuda.is_current_stream_capturing():
                        raise InputError(
                            "hyperparameters changed since the last step: "
                            "call write_hyperparameters() before capturing a CUDA graph"
                        )
                    host = host.pin_memory()  # the copy is then in the stream, and the host does not wait
                if len(table) != len(rows):
                    table = torch.empty((len(rows), len(HYPER)), dtype=torch.float64, device=device)
                table.copy_(host, non_blocking=True)
                self._hyper[device] = (table, rows)
            for number, group in enumerate(self.param_groups):
                if isinstance(group["lr"], Tensor):
                    table[number, 0].copy_(group["lr"].reshape(()), non_blocking=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this class or of `torch.optim.AdamW`.

        Raises:
            InputError: a state with amsgrad or maximize, which this class does not have.
        """
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)  # which rounds moments to the parameters' dtype: put them back
        saved_ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(saved_id)
            if saved is None:
                continue
            step = torch.as_tensor(saved["step"], dtype=torch.float32, device=param.device)
            state = {"step": step.reshape(()).clone()}
            names = ["exp_avg", "exp_avg_sq"]
            if self._has_master(param) and "master" in saved:
                names.append("master")
            for name in names:
                state[name] = torch.empty_like(param, dtype=_wide(param), requires_grad=False)
                state[name].copy_(saved[name])
            self.state[param] = state
        self._versions.clear()


def closure_loss(closure: Callable[[], Any] | None) -> Any:
    """What the closure given to an optimizer's `step`, which runs without gradients, returns with them."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_group(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise InputError(f"{name} is {group[name]}: fastgpt.optim.AdamW has False only")
    for name in ("lr", "eps", "weight_decay"):
        if not isinstance(group[name], Tensor):  # whose value the host does not wait for
            check_at_least(name, group[name], 0)
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise InputError(f"betas is {group['betas']}: it must be two numbers of at least 0 and less than 1")


def _wide(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(device, non_blocking=True)


def _either(found_inf: Tensor | None, veto: Tensor | None) -> Tensor | None:
    """What leaves a step out if one of them does."""
    if found_inf is None or veto is None:
        return veto if found_inf is None else found_inf
    return torch.maximum(found_inf.reshape(()), veto.to(found_inf).reshape(()))


def _norm(batches: Iterable[_Batch]) -> Tensor:
    """Of the gradients of all batches together."""
    norms = [trusted_grad_norm(batch.grads) for batch in batches]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))


def adamw(model: nn.Module, config: TrainConfig) -> AdamW | torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) as GPT-2 and GPT-3 were trained with.

    Weight decay pulls on matrices and embeddings only: a bias or a norm's gain has no scale to control.
    It is the class above where weights are bf16, which need its masters, and where a kernel is chosen for
    `adamw_`; else PyTorch's, whose fused kernel is faster than our plain reference. Parameters that are split
    over ranks are DTensors, which PyTorch's takes as they are.
    """
    return adamw_of(list(model.parameters()), config)


def adamw_of(params: list[nn.Parameter], config: TrainConfig) -> AdamW | torch.optim.AdamW:
    """`adamw` for some of the parameters of a model."""
    decay = [p for p in params if p.dim() >= 2]
    keep = [p for p in params if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if isinstance(decay[0], DTensor):
        return torch.optim.AdamW(groups, fused=True, **options)
    elements = sum(p.numel() for p in params)
    kernel = select("adamw_", None, decay[0], elements=elements) is not reference
    if kernel or any(p.dtype != torch.float32 for p in params):
        return AdamW(groups, max_grad_norm=config.grad_clip or math.inf, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    *,
    veto: Callable[[Tensor], Tensor | None] | None = None,
    look: Callable[[], None] | None = None,
) -> Tensor:
    """Clip the gradients, step, and forget them. Returns their norm before clipping, on the device.

    Args:
        optimizer: of `adamw`, which folds the clipping into its step where it can, or of `fastgpt.muon`.
        scaler: skips the step where fp16 gradients overflowed.
        max_grad_norm: the norm that longer gradients are scaled to; 0 leaves them.
        veto: asked with that norm whether to leave the step out: by a scalar on the device that is 1.0.
        look: called when the gradients are there, unscaled and not clipped.
    """
    scaler.unscale_(optimizer)
    if look is not None:
        look()
    if isinstance(optimizer, AdamW):
        optimizer.veto = veto
        scaler.step(optimizer)
        norm = optimizer.grad_norm
        assert norm is not None  # max_grad_norm is set
    else:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        with _left_out(optimizer, None if veto is None else veto(norm)):
            scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


@contextlib.contextmanager
def _left_out(optimizer: torch.optim.Optimizer, veto: Tensor | None) -> Iterator[None]:
    """Inside, a step of PyTorch's fused AdamW does nothing where `veto` is 1.0 or a scaler found infinity."""
    if veto is None:
        yield
        return

    def merge(optimizer: Any, *_: Any) -> None:
        found = _either(getattr(optimizer, "found_inf", None), veto)
        parameter = optimizer.param_groups[0]["params"][0]
        if isinstance(parameter, DTensor) and found is not None:
            found = DTensor.from_local(
                found, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
            )
        optimizer.found_inf = found

    handle = optimizer.register_step_pre_hook(merge)
    try:
        yield
    finally:
        handle.remove()
        if hasattr(optimizer, "found_inf"):  # a scaler deletes its own
            del optimizer.found_inf
