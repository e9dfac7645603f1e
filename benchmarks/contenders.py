"""Who runs an operation: the table's implementations, the compiled reference, and others' kernels.

Others are detected, never required: one that is not installed is a row that says how to get it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import ops
from fastgpt.benchmarks.cases import PADDING, Workload
from fastgpt.ops.registry import AUTO

EAGER = "eager"
COMPILE = "compile"
# Its CUDA graphs are left to `timing`, which gives them to everyone.
MODES = {COMPILE: None, "compile-max-autotune": "max-autotune-no-cudagraphs"}
HALF = (torch.bfloat16, torch.float16)
BOTH = ("cpu", "cuda")
INSTALL = {
    "liger_kernel": "pip install liger-kernel",
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "apex": "install from https://github.com/NVIDIA/apex with its CUDA extensions",
}


@dataclass(frozen=True)
class Contender:
    """One way to run an operation. `function` takes the inputs that the workload makes."""

    name: str
    function: Callable[..., Any]
    checked: Callable[..., Any]
    """What stands for it when results are compared: `function`, but where that is random."""
    missing: str | None = None
    """Why it cannot run here."""
    compiles: bool = False
    by_default: bool = True
    """Whether it runs without being named."""
    note: str = ""


def contenders_of(workload: Workload, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """Everyone who might run the operation, eager first."""
    table = [row for row in ops.table() if row.operation == workload.operation]
    found = []
    for row in sorted(table, key=lambda row: row.name != EAGER):
        function, checked = (_with_backend(call, row.name) for call in _calls(workload))
        missing = row.missing(device)
        if row.name == "triton" and device.type != "cuda":
            missing = "Triton kernels run on GPUs; the time of its interpreter would say nothing"
        found.append(Contender(row.name, function, checked, missing))
    found += _compiled(workload)
    found += [_peer(peer, device, dtype) for peer in PEERS if peer.operation == workload.operation]
    return found


def _calls(workload: Workload) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return workload.call, workload.check or workload.call


def _with_backend(call: Callable[..., Any], backend: str) -> Callable[..., Any]:
    assert backend != AUTO
    return lambda *inputs: call(*inputs, backend=backend)


def _compiled(workload: Workload) -> list[Contender]:
    """The reference, compiled. A graph over all parameters takes minutes: only when it is named."""
    whole_model = workload.operation in ("adamw_", "grad_norm")
    found = []
    for name, mode in MODES.items():
        function, checked = (
            torch.compile(_with_backend(call, EAGER), fullgraph=True, dynamic=False, mode=mode)
            for call in _calls(workload)
        )
        if workload.check is None:
            checked = function  # one compilation, whose time is that of the check's first run
        by_default = name == COMPILE and not whole_model
        found.append(Contender(name, function, checked, compiles=True, by_default=by_default))
    return found


# -- others' kernels -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    operation: str
    name: str
    function: Callable[..., Any]
    package: str | None = None
    """What must be installed for it."""
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF)
    note: str = ""


def _peer(peer: Peer, device: torch.device, dtype: torch.dtype) -> Contender:
    missing = None
    if device.type not in peer.devices:
        missing = f"{peer.name} runs on {' and '.join(peer.devices)}"
    elif dtype not in peer.dtypes:
        missing = f"{peer.name} runs in {' and '.join(str(d).removeprefix('torch.') for d in peer.dtypes)}"
    elif peer.package and importlib.util.find_spec(peer.package) is None:
        missing = f"not installed: {INSTALL[peer.package]}"
    return Contender(peer.name, peer.function, peer.function, missing, note=peer.note)


def _sdpa(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
    def run(qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, T, D)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def _flash_attn(qkv: Tensor) -> Tensor:
    return importlib.import_module("flash_attn").flash_attn_qkvpacked_func(qkv, causal=True)


def _torch_adamw(**how: Any) -> Callable[..., Any]:
    from torch.optim.adamw import adamw

    def run(
        params: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
        hyper: Tensor,
        copies: Sequence[Tensor],
    ) -> Any:
        with torch.no_grad():
            adamw(
                *(params, grads, means, squares, [], steps),
                **how,
                amsgrad=False,
                maximize=False,
                lr=6e-4,  # as in `hyper`, which lies on the device
                beta1=0.9,
                beta2=0.95,
                eps=1e-8,
                weight_decay=0.1,
            )
        return params, means, squares, []

    return run


def _torch_grad_norm(grads: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(grads, foreach=True)


def _torch_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[..., :-PADDING].flatten(0, -2), targets.flatten())


def _liger(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def _liger_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    rows = logits[..., :-PADDING].flatten(0, -2).clone()
    return _liger("liger_cross_entropy")(rows, targets.flatten())


def _liger_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = _liger("liger_fused_linear_cross_entropy")
    return loss(x.flatten(0, -2), weight[:-PADDING], targets.flatten())


def _apex(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module("apex.normalization.fused_layer_norm"), name)


PEERS = [
    *(
        Peer("attention", f"sdpa-{name}", _sdpa(backend), devices=devices)
        for name, backend, devices in (
            ("math", SDPBackend.MATH, BOTH),
            ("flash", SDPBackend.FLASH_ATTENTION, BOTH),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
            ("cudnn", SDPBackend.CUDNN_ATTENTION, ("cuda",)),
        )
    ),
    Peer("attention", "flash-attn", _flash_attn, "flash_attn", dtypes=HALF),
    Peer("adamw_", "torch-fused", _torch_adamw(fused=True), devices=BOTH, dtypes=(torch.float32,)),
    Peer("adamw_", "torch-foreach", _torch_adamw(foreach=True), devices=BOTH, dtypes=(torch.float32,)),
    Peer("grad_norm", "torch-foreach", _torch_grad_norm, devices=BOTH),
    Peer("cross_entropy", "torch", _torch_cross_entropy, devices=BOTH),
    Peer(
        "cross_entropy",
        "liger-kernel",
        _liger_cross_entropy,
        "liger_kernel",
        note="with a copy of the logits, which it overwrites and which may not have padding",
    ),
    Peer("linear_cross_entropy", "liger-kernel", _liger_linear_cross_entropy, "liger_kernel"),
    Peer(
        "layer_norm",
        "liger-kernel",
        lambda x, weight, bias: _liger("liger_layer_norm")(x, weight, bias, 1e-5),
        "liger_kernel",
    ),
    Peer(
        "rms_norm",
        "liger-kernel",
        lambda x, weight: _liger("liger_rms_norm")(x, weight, 1e-6, in_place=False),
        "liger_kernel",
    ),
    Peer(
        "layer_norm",
        "apex",
        lambda x, weight, bias: _apex("fused_layer_norm_affine")(x, weight, bias, weight.shape),
        "apex",
    ),
    Peer(
        "rms_norm",
        "apex",
        lambda x, weight: _apex("fused_rms_norm_affine")(x, weight, weight.shape, 1e-6),
        "apex",
    ),
]
"""Their results are held to the same bound as everyone's: a wrong argument here is a row `wrong`, not a time.

PyTorch's own function is among them where the reference is built of several; elsewhere it is eager.
"""
