"""The operators that kernels are: what `torch.library`, autograd and memory demand of every row but eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import Implementation
from fastgpt.ops.library import triton_missing

from .guard import Guard, guarded
from .helpers import CASES, Case

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = [
    pytest.param(row, device, id=f"{row.operation}-{row.name}-{device}")
    for row in ops.table()
    if row.name != "eager"
    for device in DEVICES
]
rows = pytest.mark.parametrize(("row", "device"), ROWS)


def cases(row: Implementation, device: str) -> list[Case]:
    if reason := row.missing(torch.device(device)):
        pytest.skip(reason)
    return [case for case in CASES if case.operation == row.operation]


def gradients(outs: list[Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Gradients of all inputs that want one, for random gradients of the outputs."""
    wanted = [x for x in inputs if x.requires_grad]
    outs = [out for out in outs if out.requires_grad]
    return list(torch.autograd.grad(outs, wanted, [torch.randn_like(out) for out in outs], **options))


def requiring(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    return [x.requires_grad_() if x.is_floating_point() and case.differentiable else x for x in inputs]


class Calls(TorchDispatchMode):
    """Records the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fastgpt_"):
            copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.calls.append((func, tuple(copies), kwargs or {}))
        return func(*args, **(kwargs or {}))


@rows
def test_opcheck(row: Implementation, device: str) -> None:
    """Schema, fake function and derivative agree with what the operator does, forward and backward."""
    case = cases(row, device)[-2]
    with Calls() as recorded:
        inputs = requiring(case, case.inputs(torch.float32, device))
        outs = case(inputs, row.name)
        if any(out.requires_grad for out in outs):
            gradients(outs, inputs, allow_unused=True)
    seen = {func.name(): (func, args, kwargs) for func, args, kwargs in recorded.calls}
    both = {f"fastgpt_{row.name}::{row.operation}_{direction}" for direction in ("forward", "backward")}
    assert set(seen) == both & set(torch._C._dispatch_get_all_op_names())
    for name, (func, args, kwargs) in seen.items():
        if name.endswith("_forward") and case.differentiable:
            args = tuple(
                x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
            )
        torch.library.opcheck(func, args, kwargs)


@rows
def test_second_derivatives_are_refused(row: Implementation, device: str) -> None:
    case = cases(row, device)[-2]
    inputs = requiring(case, case.inputs(torch.float32, device))
    outs = case(inputs, row.name)
    if not any(out.requires_grad for out in outs):
        pytest.skip("no gradient")
    with pytest.raises(NotImplementedError, match=f"{row.operation} has no second derivative .*'eager'"):
        gradients(outs, inputs, create_graph=True)


@rows
def test_memory(row: Implementation, device: str) -> None:
    """Every element of an output is written, nothing outside, and nothing outside the inputs is used."""
    for case in cases(row, device):
        with guarded() as guard:
            inputs = requiring(case, [guard.place(x) for x in case.inputs(torch.float32, device)])
            outs = case(inputs, row.name)
            grads = gradients(outs, inputs) if any(out.requires_grad for out in outs) else []
        for tensor in [*outs, *grads]:
            assert not tensor.isnan().any(), case.name


@rows
def test_float64_is_refused(row: Implementation, device: str) -> None:
    case = cases(row, device)[-2]
    with pytest.raises(InputError, match=r"has dtype torch.float64: kernels take float32, float16"):
        case(case.inputs(torch.float64, device), row.name)


def test_guard_notices() -> None:
    guard = Guard()
    x = guard.place(torch.zeros(3))
    guard.check()
    torch.as_strided(x, (4,), (1,))[3] = 0
    with pytest.raises(AssertionError, match="written outside of a tensor of 12 bytes"):
        guard.check()
    with pytest.raises(AssertionError), guarded():
        torch.as_strided(torch.empty(3), (1,), (1,), x.storage_offset() - 1)[0] = 0
    with guarded():
        assert torch.empty(2, 3).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


def test_missing_triton_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        InputError, match="cannot run as 'triton' on cpu: .* GPU and its driver; .*INTERPRET=1"
    ):
        ops.gelu(torch.ones(2), backend="triton")
    monkeypatch.setattr("fastgpt.ops.library._HAS_TRITON", False)
    assert "pip install triton" in str(triton_missing(torch.device("cuda")))
