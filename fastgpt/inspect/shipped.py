"""The Triton kernels of the package: their examples, compiled for any chip as they are launched there."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastgpt.kernels
from fastgpt.chips import Chip
from fastgpt.errors import InputError
from fastgpt.inspect import build
from fastgpt.inspect.bounds import Launch, Work
from fastgpt.inspect.work import work
from fastgpt.kernels.examples import Example
from fastgpt.kernels.launch import FAMILIES, capture
from fastgpt.kernels.launch import Chip as Target
from fastgpt.kernels.tune import Offer, listing, trying

# What an example can require of the machine code.
TENSOR_CORES = {80: r"\bHMMA\.", 90: r"\b[HQ]GMMA\.", 100: r"\bUTC[HQ]MMA", 120: r"\bHMMA\."}
VECTOR_LOAD = r"\bLDG\.E(\.\w+)*\.128\b|\bLDGSTS\.E(\.\w+)*\.128\b|\bUTMALDG\b"
VECTOR_STORE = r"\bSTG\.E(\.\w+)*\.128\b|\bUTMASTG\b"


@dataclass(frozen=True)
class Call:
    """One launch of an example, as it is chosen for a chip."""

    module: str
    example: Example
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def title(self) -> str:
        return f"{self.module}, {self.example.name}: {self.name}"

    @property
    def programs(self) -> int:
        return functools.reduce(lambda a, b: a * b, self.grid, 1)

    def arguments(self) -> dict[str, Any]:
        """By the names of the kernel's parameters."""
        return {**dict(zip(self.kernel.arg_names, self.args, strict=False)), **self.options}

    def work(self) -> Work:
        return work(self.name, self.arguments(), self.example.call)

    def launch(self, built: build.Built) -> Launch:
        return Launch(self.programs, built.warps)

    def values(self) -> list[Any]:
        """What the compiled kernel's parameters are: numbers, and None for pointers and floats.

        Triton compiles the values None and 1 into the code.
        """
        names = {p.name for p in self.kernel.params if not p.is_constexpr}
        given = [v for name, v in self.arguments().items() if name in names]
        kept = [v for v in given if v is not None and not (isinstance(v, int) and v == 1)]
        return [v if isinstance(v, int) and not isinstance(v, bool) else None for v in kept]

    def compile(self, sm: int) -> build.Built:
        return build.compile_triton(self.kernel, self.args, self.options, sm)


def modules() -> list[str]:
    """The kernel files that list examples."""
    here = Path(str(fastgpt.kernels.__file__)).parent
    names = [module.name for module in pkgutil.iter_modules([str(here)])]
    return [name for name in names if "\ndef examples(" in (here / f"{name}.py").read_text()]


@functools.cache
def examples(module: str) -> list[Example]:
    return list(importlib.import_module(f"fastgpt.kernels.{module}").examples())


def usual(module: str) -> list[Example]:
    """The examples that stand for the rest: those compiled for every chip, or all where there are none."""
    return [e for e in examples(module) if e.every_chip] or [e for e in examples(module) if not e.slow]


def family(chip: Chip) -> int:
    """The family whose launch choices a chip gets."""
    return max(known for known in FAMILIES if known <= max(chip.sm, FAMILIES[0]))


def calls(module: str, example: Example, chip: Chip) -> list[Call]:
    """Every launch of an example on that chip."""
    found: list[Call] = []
    with capture(
        Target(family(chip), chip.sms), lambda *launch: found.append(Call(module, example, *launch))
    ):
        example.call()
    assert {call.name for call in found} >= set(example.requires), example
    return found


def select(name: str, chip: Chip, wanted: str | None = None) -> list[Call]:
    """The launches that a name means: of a kernel file, all of its examples; of a kernel, its first one.

    `wanted` is a part of the names of examples; without it, those that are compiled for every chip.

    Raises:
        InputError: there is no such file or kernel, or no such example.
    """
    chosen = [name] if name in modules() else modules()
    found = [
        call
        for module in chosen
        for example in (usual(module) if wanted is None else examples(module))
        if wanted is None or wanted in example.name
        for call in calls(module, example, chip)
        if name in modules() or call.name.lstrip("_") == name.lstrip("_")
    ]
    if found:
        return found if name in modules() or wanted else found[:1]
    known = sorted({*modules(), *_kernels(chip)})
    if name.lstrip("_") in known and wanted is not None:
        raise InputError(f"--example {wanted!r}: no example of {name} is called so")
    close = difflib.get_close_matches(name.lstrip("_"), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
    raise InputError(f"no kernel {name!r}: {hint}")


def _kernels(chip: Chip) -> set[str]:
    every = [(module, example) for module in modules() for example in usual(module)]
    return {call.name.lstrip("_") for module, example in every for call in calls(module, example, chip)}


def missing(requirements: Sequence[str], built: build.Built) -> list[str]:
    """Those of an example's requirements of a kernel that are not met."""
    if not requirements:
        return []
    code, ttir = built.stages["sass"], built.stages["ttir"]
    # (shape, bits) of the offsets that pointers get.
    offsets = re.findall(r"tt\.addptr .*, tensor<(\d+(?:x\d+)?)xi(\d+)", ttir)
    narrow = [shape for shape, bits in offsets if bits == "32" and "x" in shape]
    to_rows = set(re.findall(r"tt\.addptr .*: !tt\.ptr<\w+>, i(\d+)", ttir))
    met = {
        "vector_load": re.search(VECTOR_LOAD, code),
        "vector_store": re.search(VECTOR_STORE, code),
        "tensor_cores": re.search(TENSOR_CORES[built.sm], code),
        "wide_rows": to_rows == {"64"},
        "wide_offsets": not narrow and any(bits == "64" for _, bits in offsets),
    }
    return [requirement for requirement in requirements if not met[requirement]]


def choices(module: str, example: Example, chip: Chip) -> dict[str, Offer]:
    """The launch choices that an example makes, by name."""
    with capture(Target(family(chip), chip.sms), lambda *launch: None), listing() as asked:
        example.call()
    return dict(asked)


def candidates(module: str, example: Example, chip: Chip) -> Iterator[list[Call]]:
    """The launches of an example for each choice that tuning may make."""
    for name, offer in choices(module, example, chip).items():
        for candidate in offer.candidates:
            with trying(name, candidate):
                yield calls(module, example, chip)
