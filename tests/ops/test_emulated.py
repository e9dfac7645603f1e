"""The CUDA kernels in the emulator: in whatever order their threads run, the result is the same, bit for bit.

`python tests/cuda_emulator.py address` (or `thread`) runs this file under a sanitizer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import cuda_emulator
import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import Implementation

from .helpers import CASES, Case, _case, assert_accurate
from .test_operators import gradients, requiring
from .test_table import forward_backward

CPU = torch.device("cpu")
ROWS = [row for row in ops.table() if row.name == "emulated" and row.missing(CPU) is None]
GIVEN = cuda_emulator.LIBRARY in os.environ  # by a sanitizer's run or by tests/cuda_barriers.py
SANITIZED = "san.so" in os.environ.get("LD_PRELOAD", "")
RACES = "libtsan.so" in os.environ.get("LD_PRELOAD", "")
# Under ThreadSanitizer a block takes a tenth of a second: no cases of fifty blocks, which do what three do.
MOST_ELEMENTS = 6400 if SANITIZED else 1 << 30


# Rows with a block of their own, and too long to keep; whole vectors or not; more than one for each program.
LONG = [
    _case(operation, f"{rows}x{width}", call, *shapes(rows, width))
    for rows, width in [(9, 1100), (2, 1601), (19, 4104), (3, 5001)]
    for operation, call, shapes in [
        ("layer_norm", ops.layer_norm, lambda rows, width: ((rows, width), (width,), (width,))),
        (
            "add_layer_norm",
            ops.add_layer_norm,
            lambda rows, width: ((rows, width), (rows, width), (width,), (width,)),
        ),
        ("rms_norm", ops.rms_norm, lambda rows, width: ((rows, width), (width,))),
    ]
]


def cases(row: Implementation) -> list[Case]:
    chosen = [case for case in CASES if max(x.numel() for x in case.make()) <= MOST_ELEMENTS]
    return [case for case in [*chosen, *LONG] if case.operation == row.operation]


def everything(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients."""
    inputs = requiring(case, case.inputs(dtype))
    outs = case(inputs, "emulated")
    torch.manual_seed(1)
    grads = gradients(outs, inputs) if any(out.requires_grad for out in outs) else []
    return [x.detach() for x in [*outs, *grads]]


@pytest.fixture
def any_schedule() -> Iterator[None]:
    yield
    cuda_emulator.set_schedule(os.environ.get("FASTGPT_EMULATOR_SCHEDULE", "greedy"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"emulated-{row.operation}")
def test_schedules_agree(row: Implementation, dtype: torch.dtype, any_schedule: None) -> None:
    for case in cases(row):
        results = []
        for schedule in ["greedy:early", "reverse:late"] if GIVEN else cuda_emulator.SCHEDULES:
            cuda_emulator.set_schedule(schedule)
            results.append(everything(case, dtype))
        for schedule, other in zip(cuda_emulator.SCHEDULES, results, strict=False):
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b), f"{case.name}: {schedule}"
                assert not a.isnan().any(), case.name


@pytest.mark.skipif(not ROWS, reason="nothing is emulated here")
@pytest.mark.skipif(RACES, reason="test_schedules_agree makes the same launches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda case: f"emulated-{case.operation}-{case.name}")
def test_accuracy_of_long_rows(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    exact = [x.detach().double() for x in inputs]
    cotangents = [torch.randn(out.shape).to(dtype) for out in case(exact, "eager")]
    oracle = forward_backward(case, exact, "eager", [g.double() for g in cotangents])
    eager = forward_backward(case, inputs, "eager", cotangents)
    emulated = forward_backward(case, inputs, "emulated", cotangents)
    for part in (0, 1):
        for a, b, c in zip(emulated[part], eager[part], oracle[part], strict=True):
            assert_accurate(a, b, c)


MUTANTS = {
    "csrc/cuda/layer_norm.cuh": [
        (
            "dw[0][i] += dy[i] * xhat[i];",
            "dw[0][i] = dy[i] * xhat[i];",
            "tests/ops/test_emulated.py -k accuracy",
        ),
        (
            "column + i < p.width ? s[i] - mean : 0.0f",
            "s[i] - mean",
            "tests/ops/test_emulated.py -k accuracy",
        ),
    ],
    "csrc/cuda/reduce.cuh": [
        ("lane < warps ? scratch", "lane <= warps ? scratch", "tests/ops/test_emulated.py -k accuracy"),
    ],
    "csrc/cuda/partials.cuh": [
        (
            "p < programs; p += kPartialWarps",
            "p < programs - 1; p += kPartialWarps",
            "tests/ops/test_emulated.py -k accuracy",
        ),
    ],
}
