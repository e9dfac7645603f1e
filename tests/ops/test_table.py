"""Every implementation in the table against the references: a new row is tested here without another line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import Implementation

from .helpers import CASES, DTYPES, Case, assert_accurate, spread, transposed

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = [
    pytest.param(row, device, id=f"{row.operation}-{row.name}-{device}")
    for row in ops.table()
    for device in DEVICES
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
rows = pytest.mark.parametrize(("row", "device"), ROWS)


def cases(row: Implementation, device: str) -> list[Case]:
    if reason := row.missing(torch.device(device)):
        pytest.skip(reason)
    return [case for case in CASES if case.operation == row.operation]


def forward_backward(
    case: Case,
    inputs: list[Tensor],
    backend: str,
    cotangents: list[Tensor] | None,
    call: Callable[..., list[Tensor]] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients; without cotangents, those of the sum of all outputs (expanded, stride 0)."""
    if not case.differentiable:
        return (call or case)(inputs, backend), []
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    outs = (call or case)(inputs, backend)
    differentiable = [x for x in inputs if x.is_floating_point()]
    if cotangents is None:
        grads = torch.autograd.grad([out.sum() for out in outs], differentiable)
    else:
        grads = torch.autograd.grad(outs, differentiable, [g.to(outs[0]) for g in cotangents])
    return [out.detach() for out in outs], list(grads)


def test_every_operation_has_cases() -> None:
    assert {case.operation for case in CASES} == {row.operation for row in ops.table()}


def test_every_operation_has_a_reference() -> None:
    assert {row.operation for row in ops.table() if row.name == "eager"} == {
        row.operation for row in ops.table()
    }


@dtypes
@rows
def test_accuracy(row: Implementation, device: str, dtype: torch.dtype) -> None:
    """Forward and backward within the bound, bitwise repeatable, from plain and from other layouts.

    Those are transposed inputs and gradients, and inputs with gaps with the expanded gradients of a sum.
    """
    for case in cases(row, device):
        inputs = case.inputs(dtype, device)
        exact = [x.detach().cpu().double() if x.is_floating_point() else x.cpu() for x in inputs]
        shapes = [out.shape for out in case(exact, "eager")]
        # With and without cotangents: dense random ones, and the expanded ones of a sum.
        for cotangents in ([torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes], None):
            exact_cotangents = None if cotangents is None else [g.double() for g in cotangents]
            oracle = forward_backward(case, exact, "eager", exact_cotangents)
            eager = forward_backward(case, inputs, "eager", cotangents)
            first = forward_backward(case, inputs, row.name, cotangents)
            again = forward_backward(case, inputs, row.name, cotangents)
            if cotangents is None:
                apart = forward_backward(case, [spread(x.detach()) for x in inputs], row.name, None)
            else:
                turned = [transposed(x.detach()) for x in inputs]
                apart = forward_backward(case, turned, row.name, [transposed(g) for g in cotangents])
            for part in (0, 1):
                for values in zip(
                    first[part], again[part], apart[part], eager[part], oracle[part], strict=True
                ):
                    assert values[0].device.type == device
                    assert_accurate(values[0], values[3], values[4])
                    assert_accurate(values[2], values[3], values[4])
                    assert torch.equal(values[0], values[1]), f"{case.name} differs on a second run"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@rows
def test_compiles_without_graph_breaks(row: Implementation, device: str, dynamic: bool) -> None:
    """Forward and backward trace into one graph, and give what they give without it."""
    case = cases(row, device)[-2]  # the last but one, since the last may have zero rows
    torch._dynamo.reset()
    compiled = torch.compile(case.__call__, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = case.inputs(torch.float32, device)
    expected = forward_backward(case, inputs, row.name, None)
    actual = forward_backward(case, inputs, row.name, None, compiled)
    torch.testing.assert_close(actual, expected)


@rows
def test_autocast(row: Implementation, device: str) -> None:
    """fp32 parameters under autocast work and give finite results and fp32 gradients."""
    case = cases(row, device)[-2]
    with torch.autocast(device, torch.bfloat16):
        outs, grads = forward_backward(case, case.inputs(torch.float32, device), row.name, None)
    assert all(x.isfinite().all() for x in [*outs, *grads])
    assert all(x.dtype == torch.float32 for x in grads)


@rows
def test_nan_propagates(row: Implementation, device: str) -> None:
    """A NaN in any floating point input reaches the output, as in PyTorch."""
    case = cases(row, device)[-2]
    count = sum(x.is_floating_point() for x in case.inputs(torch.float32))
    for number in range(count):
        inputs = case.inputs(torch.float32, device)
        [x for x in inputs if x.is_floating_point()][number].view(-1)[0] = torch.nan
        for actual, eager in zip(case(inputs, row.name), case(inputs, "eager"), strict=True):
            assert torch.equal(actual.isnan(), eager.isnan())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.name}")
def test_unknown_implementation(case: Case) -> None:
    with pytest.raises(InputError, match="no implementation 'nope': choose one of auto, eager"):
        case(case.inputs(torch.float32), "nope")


def test_public_functions_default_to_the_current_choice() -> None:
    """`backend` left out works for every public function."""
    for case in CASES:
        out = case.call(*case.inputs(torch.float32), **case.options)
        expected = case(case.inputs(torch.float32), "eager")
        torch.testing.assert_close(list(out) if isinstance(out, tuple) else [out], expected)
