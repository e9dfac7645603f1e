"""What a study is made of: one operation, and steps from a first version of it to the one that is shipped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastgpt.chips import Chip
from fastgpt.inspect.bounds import Work
from fastgpt.inspect.shipped import Call

# What one launch costs when the next one is ready: an estimate, so that many small launches count as such.
LAUNCH_S = 3e-6
# What an SM's L1 takes in a clock from L2: Volta's, by Jia et al., arXiv:1804.06826, and no less since.
FILL_BYTES = 64

Size = Literal["small", "gpt2"]
Run = Callable[..., Sequence[Any]]
"""Takes what `Study.inputs` makes, and returns the results: tensors, or lists of tensors."""


@dataclass(frozen=True)
class Prediction:
    """What a step should come to at GPT-2's size, said before it is looked at."""

    text: str
    """In one or two sentences, with the arithmetic."""
    bytes: float | None = None
    """Of memory, read and written by all launches together."""
    launches: int = 0
    us: Callable[[Chip], float] | None = None
    """Microseconds on a chip, where more than bytes and launches count."""
    cpu: float | None = None
    """How many times as fast as the step before its CPU form should be."""

    def microseconds(self, chip: Chip) -> float | None:
        """On that chip: what takes longer, the bytes or the launches; None where nothing is predicted."""
        if self.us is not None:
            return self.us(chip)
        if self.bytes is None and not self.launches:
            return None
        return 1e6 * max((self.bytes or 0.0) / chip.bandwidth, self.launches * LAUNCH_S)


@dataclass(frozen=True)
class Again:
    """What a launch reads again later: from L2 where that holds what went by since, else from memory."""

    held: float
    """Bytes that go by a program between the two reads."""
    bytes: float
    """That all programs together read again."""


@dataclass(frozen=True)
class Step:
    """One version of the operation.

    `run` launches Triton kernels by `fastgpt.kernels.launch.launch`, and nothing else that takes time: on
    CUDA tensors, on CPU tensors in Triton's interpreter, and on meta tensors, where the launches are looked
    at. It chooses grids and tiles by `fastgpt.kernels.launch.chip`.
    """

    name: str
    change: str
    """What is different from the step before, in one sentence."""
    prediction: Prediction
    run: Run
    cpu: Run | None = None
    """The same idea on CPU tensors, to be measured."""
    cpu_form: str = ""
    """What `cpu` is, in a few words."""
    work: Callable[[Call], Work | None] | None = None
    """Of a launch; None is what the package knows of its own kernels, and of others every tensor once."""
    limits: Callable[[Call, Chip], Mapping[str, float]] | None = None
    """Seconds that a launch takes at least, by what for: bounds that the microscope does not have."""
    again: Callable[[Call], Again | None] | None = None
    """What a launch reads again; None is nothing, or so soon that caches hold it."""
    aside: Collection[str] = ()
    """Kernels that are not what the step is about: they count, and are left out of the table of kernels."""
    fills: int = 0
    """Launches of PyTorch's own in `run`, that move next to nothing (zeros to add to)."""
    refused: str = ""
    """Why it is not shipped, however low its ceiling is; empty where nothing but times speaks against it."""
    deterministic: bool = True
    """Whether a second run must give the same bits."""


@dataclass(frozen=True)
class Study:
    """An operation and its steps, the shipped one last."""

    name: str
    """Of its file in benchmarks/studies/ and its page in docs/optimise/."""
    sizes: str
    """What `gpt2` means, in words."""
    inputs: Callable[[Size, torch.device], list[Any]]
    """The arguments of all steps: tensors, lists of tensors, numbers. Those on meta tensors have the shapes
    and dtypes of a GPU's, and `small` is what Triton's interpreter does in a second."""
    reference: Run
    """The equations in plain PyTorch: in float64 the oracle, in the dtype of the inputs what errors are held
    against."""
    steps: Sequence[Step]
    peers: Mapping[str, Run] = field(default_factory=dict)
    """What others offer for the same, measured on CPU tensors besides the steps."""

    def on_cpu(self) -> dict[str, Run]:
        """All that is measured on CPU tensors, by name."""
        return {**{step.name: step.cpu for step in self.steps if step.cpu is not None}, **self.peers}

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)


def fill_limit(bytes_: float, chip: Chip) -> dict[str, float]:
    """The bound of what all SMs ask of L2: sectors of 32 bytes, of which a kernel may use only a part."""
    return {"sectors": bytes_ / (FILL_BYTES * chip.sms * chip.clock_hz)}


def slices(rows: int, at_a_time: int) -> list[slice]:
    """Of all rows, in order: what CPU forms take at a time."""
    return [slice(first, first + at_a_time) for first in range(0, rows, at_a_time)]
