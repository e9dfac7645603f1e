"""Where the time of a training step goes, by operation, from PyTorch's profiler.

On a GPU: the time of the kernels, each under the operator that launched it, and the time in which none runs.
On a CPU: the time inside operators that work on data, and the rest of the step, which is overhead: Python,
autograd, dispatch, and operators that only make tensors or views.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastgpt.benchmarks.steps import Step
from fastgpt.benchmarks.timing import quiet

IDLE, OVERHEAD = "idle", "overhead"
GROUPS = (
    *("matmul", "attention", "norm", "gelu", "classifier", "embedding", "optimizer"),
    *("copies", "compiled", "other", IDLE, OVERHEAD),
)
STEPS = 3

# fastgpt's own operators, by operation.
_OPERATIONS = {
    "layer_norm": "norm",
    "add_layer_norm": "norm",
    "rms_norm": "norm",
    "gelu": "gelu",
    "bias_gelu": "gelu",
    "linear_gelu": "gelu",
    "linear": "matmul",
    "attention": "attention",
    "embedding": "embedding",
    "cross_entropy": "classifier",
    "linear_cross_entropy": "classifier",
    "adamw_": "optimizer",
    "grad_norm": "optimizer",
    "dropout_add": "other",
}
# Whatever runs inside one of these belongs to it.
_WHOLE = (
    (r"fastgpt_\w+::linear_cross_entropy_.*", "classifier"),
    (r"Optimizer\.step#.*|Optimizer\.zero_grad#.*|aten::_fused_adamw_|aten::_foreach_.*", "optimizer"),
    (r"aten::linalg_vector_norm|aten::nan_to_num", "optimizer"),  # in steps: of clipping
    (r"aten::.*scaled_dot_product.*", "attention"),
)
# Otherwise the innermost of these.
_MATMUL = (
    r"fastgpt::multiply|aten::(mm|addmm|bmm|baddbmm|linear|matmul|_addmm_activation)|mkl(dnn)?::.*linear.*"
)
_OPERATORS = (
    (r"aten::bmm|aten::_softmax.*", "attention"),  # only attention without a kernel of its own has them
    (_MATMUL, "matmul"),
    (r"aten::.*layer_norm.*", "norm"),
    (r"aten::gelu.*", "gelu"),
    (r"aten::.*(log_softmax|nll_loss|cross_entropy).*", "classifier"),
    (r"aten::embedding.*", "embedding"),
    (r"aten::(copy_|_to_copy|to|contiguous|clone|cat)", "copies"),
    (r"Torch-Compiled Region.*|CompiledFunction.*|## Call CompiledFxGraph.*", "compiled"),
)
_VIEWS = (
    r"aten::(_unsafe_view|_reshape_alias|alias|as_strided|chunk|detach_?|empty\w*|expand|narrow|new_empty\w*|"
    r"permute|reshape|resize_|resolve_\w+|result_type|select|slice|split\w*|squeeze|t|transpose|unbind|unflatten|"
    r"unsqueeze|view\w*|item|_local_scalar_dense)|detach_?"
)
_GEMM_KERNEL = r".*(gemm|cutlass|nvjet|xmma|cublas).*"
_COMPILED_KERNELS = (  # whose names hold the operators that inductor fused
    (r".*layer_norm.*", "norm"),
    (r".*(log_softmax|nll_loss|logsumexp).*", "classifier"),
    (r".*softmax.*", "attention"),
    (r".*(gelu|tanh|erf).*", "gelu"),
    (r".*embedding.*", "embedding"),
)


@dataclass(frozen=True)
class Attribution:
    """Microseconds a step by group, all of which sum to `wall_us`: the time of a step under the profiler."""

    wall_us: float
    groups: dict[str, float]

    def share(self, group: str) -> float:
        return self.groups[group] / self.wall_us


def attribute(step: Step) -> Attribution:
    """Profile some steps; they train on."""
    device = step.device
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with quiet(), profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall_us = (time.perf_counter() - start) * 1e6
    c = step.model.config
    widths = {c.n_embd, 3 * c.n_embd, c.mlp_size}  # by which the blocks' own products would be taken for it
    vocabulary = {c.vocab_size, c.padded_vocab_size} - widths
    return attribution_of(list(profiler.events() or []), wall_us, vocabulary, STEPS)


def attribution_of(events: list[Any], wall_us: float, vocabulary: set[int], steps: int) -> Attribution:
    """The attribution of `steps` steps that took `wall_us` together.

    Args:
        events: of the profiler, with shapes.
        wall_us: by the clock.
        vocabulary: sizes by which a matrix product of the classifier is known.
    """
    totals = dict.fromkeys(GROUPS, 0.0)
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    if kernels:
        launched = 0.0
        for event in operators:
            for kernel in event.kernels:
                totals[_group_of_kernel(kernel.name, event, vocabulary)] += kernel.duration
                launched += kernel.duration
        totals["other"] += max(0.0, sum(map(_duration, kernels)) - launched)
        # Streams may overlap: then the sum is more than the time in which something ran.
        scale = busy(kernels) / sum(totals.values())
        totals = {group: value * scale for group, value in totals.items()}
        totals[IDLE] = wall_us - sum(totals.values())
    else:
        for event in operators:
            group = _group_of_operator(event, vocabulary)
            if group != OVERHEAD:
                totals[group] += event.self_cpu_time_total
        totals[OVERHEAD] = wall_us - sum(totals.values())
    return Attribution(wall_us / steps, {group: value / steps for group, value in totals.items()})


def _duration(event: Any) -> float:
    return event.time_range.end - event.time_range.start


def busy(kernels: Iterable[Any]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in kernels):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _chain(event: Any) -> Iterator[Any]:
    """The event and those around it, from the inside."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _first(table: Iterable[tuple[str, str]], name: str) -> str | None:
    return next((group for pattern, group in table if re.fullmatch(pattern, name)), None)


def _group_of_operator(event: Any, vocabulary: set[int]) -> str:
    if re.fullmatch(_VIEWS, event.name) or event.name.startswith(("autograd::", "Optimizer.")):
        return OVERHEAD
    for outer in _chain(event):
        if group := _first(_WHOLE, outer.name):
            return group
    for outer in _chain(event):
        if re.fullmatch(_MATMUL, outer.name) and _has_size(outer, vocabulary):
            return "classifier"
        if group := _first(_OPERATORS, outer.name):
            return group
        if own := re.fullmatch(r"fastgpt_\w+::(\w+?)_(forward|backward)", outer.name):
            return _OPERATIONS.get(own[1], "other")
    return "other" if "::" in event.name else OVERHEAD


def _has_size(event: Any, sizes: set[int]) -> bool:
    return any(size in sizes for shape in event.input_shapes or [] for size in shape if isinstance(size, int))


def _group_of_kernel(kernel: str, event: Any, vocabulary: set[int]) -> str:
    group = _group_of_operator(event, vocabulary)
    if group == "gelu" and re.fullmatch(_GEMM_KERNEL, kernel, re.IGNORECASE):
        return "matmul"  # with GELU in its epilogue
    if group in (OVERHEAD, "compiled", "other") and kernel.startswith("triton_"):
        return _first(_COMPILED_KERNELS, kernel) or "compiled"
    return "other" if group == OVERHEAD else group
