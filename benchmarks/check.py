"""Whether a contender computes what the reference does: asked before it is timed.

Two questions. On at most ROWS rows of the same widths: is its error against the reference in float64 at most
twice that of eager in the same dtype, plus one unit in the last place of the largest value, in the maximum
and the Euclidean norm? (The bound of the kernels' own tests.) And on the whole case, where float64 would take
too much memory and time: is it as near to eager as two results can be that both meet that bound? By the
triangle inequality that is three times eager's error plus the unit; eager's relative error there is that of
the few rows times the square root of how many more there are, which is how rounding errors of sums grow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.benchmarks.cases import Inputs, Sizes, Workload, copy_of, tensors_of, to_float64
from fastgpt.benchmarks.timing import first_call, random_tensor

ROWS = 128
CHUNK = 1 << 26  # elements compared at a time
NORMS = (math.inf, 2)
Function = Callable[..., Any]


class Wrong(Exception):
    """A contender's result is not the reference's; the message says by how much."""


def inputs_for(workload: Workload, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The same random inputs each time."""
    torch.manual_seed(0)
    return workload.make(sizes, dtype, device)


def results(
    workload: Workload, function: Function, inputs: Inputs, cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, and the gradients of all inputs that have one. The inputs are left as they were."""
    inputs = copy_of(inputs, gradients=workload.differentiable)
    outputs = tensors_of(function(*inputs))
    if not workload.differentiable:
        return [x.detach() for x in outputs]
    if [x.shape for x in outputs] != [g.shape for g in cotangents]:
        raise Wrong(f"outputs have shapes {_shapes(outputs)}: they must have {_shapes(cotangents)}")
    leaves = [x for x in tensors_of(inputs) if x.requires_grad]
    grads = [g.to(x.dtype) for g, x in zip(cotangents, outputs, strict=True)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def cotangents_for(workload: Workload, inputs: Inputs, dtype: torch.dtype, rows: int) -> list[Tensor]:
    """A gradient for each output, the same each time.

    That of a mean is as large as there are rows, as a loss scaler would have it: a row's gradients are then
    normal numbers in fp16, however many rows there are.
    """
    if not workload.differentiable:
        return []
    with torch.no_grad():
        outputs = tensors_of(workload.call(*inputs, backend="eager"))
    torch.manual_seed(1)
    scales = [1.0 if x.ndim else float(min(rows, 1 << 15)) for x in outputs]
    return [
        random_tensor(*x.shape, device=x.device, dtype=dtype, scale=scale)
        for x, scale in zip(outputs, scales, strict=True)
    ]


@dataclass(frozen=True)
class Oracle:
    """The reference in float64 on few rows, and how far eager is from it."""

    inputs: Inputs
    cotangents: list[Tensor]
    exact: list[Tensor]
    sizes: list[list[float]]
    """Of each result, its norms."""
    errors: list[list[float]]
    """Of each result, the norms of eager's error."""
    rows: int

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        cotangents: list[Tensor],
        exact: list[Tensor],
        usual: Sequence[Tensor],
        rows: int,
    ) -> Oracle:
        """From the results of the reference in float64, and those of eager in the dtype of the inputs."""
        sizes = [[_norm(x.double(), norm) for norm in NORMS] for x in exact]
        errors = [
            [_norm(x.double() - y.double(), norm) for norm in NORMS]
            for x, y in zip(usual, exact, strict=True)
        ]
        return cls(inputs, cotangents, exact, sizes, errors, rows)

    def verify(self, actual: Sequence[Tensor], unit: float) -> None:
        """
        Raises:
            Wrong: a result is further from the oracle than the bound.
        """
        _require_same_shapes(actual, self.exact)
        for number, (x, exact) in enumerate(zip(actual, self.exact, strict=True)):
            for norm, size, error in zip(NORMS, self.sizes[number], self.errors[number], strict=True):
                found, bound = _norm(x.double() - exact, norm), 2 * error + unit * size
                if not found <= bound:  # true for NaN too
                    raise Wrong(f"{_name(number)}: error {found:.2e} against float64 exceeds {bound:.2e}")

    def verify_like(self, actual: Sequence[Tensor], eager: Sequence[Tensor], unit: float, rows: int) -> None:
        """The same for results of `rows` rows, by how near they are to eager's.

        Raises:
            Wrong: they differ by more than two right results can.
        """
        growth = math.sqrt(max(1.0, rows / self.rows))
        _require_same_shapes(actual, eager)
        for number, (x, other) in enumerate(zip(actual, eager, strict=True)):
            for which, norm in enumerate(NORMS):
                bound = 3 * growth * self._relative_error(number, which, len(actual)) + 2 * unit
                found = _difference(x, other, norm)
                if not found <= bound:  # true for NaN too
                    raise Wrong(f"{_name(number)}: {found:.2e} of its size from eager's exceeds {bound:.2e}")

    def _relative_error(self, number: int, norm: int, count: int) -> float:
        """Eager's in a result; of all parameters, of which the oracle has only some, the largest in any."""
        numbers = [number] if count == len(self.exact) else range(len(self.exact))
        return max(self.errors[n][norm] / max(self.sizes[n][norm], 1e-300) for n in numbers)


def oracle_for(workload: Workload, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Oracle:
    """For the sizes as `few_rows` has them."""
    check = workload.check or workload.call
    inputs = inputs_for(workload, sizes, dtype, device)
    cotangents = cotangents_for(workload, inputs, dtype, sizes.rows)

    def eager(*args: Any) -> Any:
        return check(*args, backend="eager")

    exact = results(workload, eager, to_float64(inputs), cotangents)
    usual = results(workload, eager, inputs, cotangents)
    return Oracle.of(inputs, cotangents, exact, usual, sizes.rows)


def few_rows(sizes: Sizes, workload: Workload) -> Sizes:
    """The same widths on at most ROWS rows; of what goes over all parameters, one layer, few tokens."""
    if workload.one_sum:
        return sizes
    if workload.differentiable:
        return dataclasses.replace(sizes, B=1, T=min(sizes.T, ROWS))
    return dataclasses.replace(sizes, L=1, V=min(sizes.V, 1024))


@dataclass(frozen=True)
class Verdict:
    wrong: str | None
    """What is wrong, or None."""
    seconds: float
    """What the first run of the whole case took, which is when a compiler works."""


class Checker:
    """Checks contenders on one device, and remembers what it found."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._oracles: dict[tuple[Any, ...], Oracle] = {}
        self._verdicts: dict[tuple[Any, ...], Verdict] = {}
        self._eager: tuple[tuple[Any, ...], Inputs, list[Tensor], list[Tensor]] | None = None

    def verdict(
        self,
        name: str,
        function: Function,
        workload: Workload,
        sizes: Sizes,
        dtype: torch.dtype,
        *,
        few: bool,
    ) -> Verdict:
        """Both questions, or with `few` False only the second: a compiler would work twice for the first.

        Raises what the contender raises.
        """
        key = (name, workload.operation, dtype, sizes)
        if (verdict := self._verdicts.get(key)) is None:
            verdict = self._verdicts[key] = self._judge(function, workload, sizes, dtype, few)
        return verdict

    def forget_case(self) -> None:
        """Let go of what a case's comparison holds."""
        self._eager = None

    def _judge(
        self, function: Function, workload: Workload, sizes: Sizes, dtype: torch.dtype, few: bool
    ) -> Verdict:
        unit = torch.finfo(dtype).eps
        oracle = self._oracle(workload, few_rows(sizes, workload), dtype)
        inputs, cotangents, eager = self._case(workload, sizes, dtype)
        try:
            if few:
                oracle.verify(results(workload, function, oracle.inputs, oracle.cotangents), unit)
            actual, seconds = first_call(lambda: results(workload, function, inputs, cotangents), self.device)
            oracle.verify_like(actual, eager, unit, sizes.rows)
        except Wrong as error:
            return Verdict(str(error), 0.0)
        return Verdict(None, seconds)

    def _oracle(self, workload: Workload, sizes: Sizes, dtype: torch.dtype) -> Oracle:
        key = (workload.operation, dtype, sizes)
        if key not in self._oracles:
            self._oracles = {
                key: oracle_for(workload, sizes, dtype, self.device)
            }  # one at a time: some are large
        return self._oracles[key]

    def _case(
        self, workload: Workload, sizes: Sizes, dtype: torch.dtype
    ) -> tuple[Inputs, list[Tensor], list[Tensor]]:
        """Inputs, cotangents and eager's results of a whole case."""
        key = (workload.operation, dtype, sizes)
        if self._eager is None or self._eager[0] != key:
            self._eager = None
            inputs = inputs_for(workload, sizes, dtype, self.device)
            cotangents = cotangents_for(workload, inputs, dtype, sizes.rows)
            check = workload.check or workload.call
            eager = results(workload, lambda *args: check(*args, backend="eager"), inputs, cotangents)
            self._eager = key, inputs, cotangents, eager
        return self._eager[1:]


def _require_same_shapes(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    if [x.shape for x in actual] != [x.shape for x in expected]:
        raise Wrong(f"results have shapes {_shapes(actual)}: they must have {_shapes(expected)}")


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _name(number: int) -> str:
    return f"result {number} (outputs, then gradients)"


def _norm(x: Tensor, norm: float) -> float:
    return float(torch.linalg.vector_norm(x, norm)) if x.numel() else 0.0


def _difference(x: Tensor, other: Tensor, norm: float) -> float:
    """The norm of the difference over that of `other`, in chunks: copies in fp32 of all might not fit."""
    differences, lengths = [], []
    for a, b in zip(x.flatten().split(CHUNK), other.flatten().split(CHUNK), strict=True):
        wide = b.float()
        differences.append(_norm(a.float() - wide, norm))
        lengths.append(_norm(wide, norm))
    combine = max if norm == math.inf else math.hypot
    return combine(*differences, 0.0) / max(combine(*lengths, 0.0), 1e-300)
