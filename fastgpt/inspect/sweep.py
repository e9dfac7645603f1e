"""Launch choices by computed ceiling: those that tuning may make, and a grid around the shipped one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastgpt.chips import Chip
from fastgpt.errors import InputError
from fastgpt.inspect import shipped
from fastgpt.inspect.report import Analysis, analyse, table
from fastgpt.kernels.examples import Example
from fastgpt.kernels.tune import trying


@dataclass(frozen=True)
class Row:
    """One choice: what it compiles to, or why it does not."""

    choice: Any
    kind: str  # shipped, candidate or near
    analyses: list[Analysis]  # of each kernel that the example launches
    error: str = ""

    @property
    def ceiling(self) -> float:
        """Seconds of all kernels together; infinite where one does not run."""
        if self.error or any(a.bounds is None for a in self.analyses):
            return float("inf")
        return sum(a.bounds.ceiling for a in self.analyses if a.bounds)


def names(chip: Chip) -> dict[str, tuple[str, Example]]:
    """The choices that there are, and for each the first example that asks for it."""
    found: dict[str, tuple[str, Example]] = {}
    for module in shipped.modules():
        for example in sorted(shipped.examples(module), key=lambda e: not e.every_chip):
            if example.slow and not example.every_chip:
                continue
            for name, offer in shipped.choices(module, example, chip).items():
                if offer.candidates:
                    found.setdefault(name, (module, example))
    return found


def sweep(name: str, chip: Chip) -> list[Row]:
    """Every choice, the lowest ceiling first.

    Raises:
        InputError: no launcher makes a choice of that name.
    """
    known = names(chip)
    if name not in known:
        raise InputError(f"--sweep {name!r}: the choices are {', '.join(sorted(known))}")
    module, example = known[name]
    static, candidates = shipped.choices(module, example, chip)[name]
    offered = [c for c in candidates if c != static]
    near = [c for c in _around(static) if c != static and c not in offered]
    kinds = [("shipped", [static]), ("candidate", offered), ("near", near)]
    rows = [_row(name, choice, kind, module, example, chip) for kind, some in kinds for choice in some]
    return sorted(rows, key=lambda row: row.ceiling)


def _around(choice: Any) -> Iterator[Any]:
    """Each whole number of a choice halved and doubled; of stages one less and one more."""
    for field, value in choice._asdict().items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            continue
        steps = (value - 1, value + 1) if field in ("stages", "programs_per_sm") else (value // 2, 2 * value)
        for changed in steps:
            if changed >= 1:
                yield choice._replace(**{field: changed})


def _row(name: str, choice: Any, kind: str, module: str, example: Example, chip: Chip) -> Row:
    try:
        with trying(name, choice):
            calls = shipped.calls(module, example, chip)
            built = [(call, call.compile(chip.sm)) for call in calls]
    except Exception as error:  # Triton's, MLIR's and ptxas's have no class in common
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return Row(choice, kind, [], lines[0][:60])
    return Row(choice, kind, [analyse(c.title, b, chip, c.launch(b), c.work(), c.values()) for c, b in built])


def text(name: str, chip: Chip, rows: list[Row]) -> str:
    """A table of the rows, and what they are for."""
    example = names(chip)[name][1]
    shown: list[tuple[str, list[str]]] = [
        ("choice", ["", "registers", "spilled", "shared", "occupancy", "us", "by", "TFLOP/s", "GB/s"])
    ]
    for row in rows:
        choice = " ".join(f"{k}={v}" for k, v in row.choice._asdict().items())
        if row.error:
            shown.append((choice, [row.kind, *"-----", row.error, "-", "-"]))
            continue
        main = max(row.analyses, key=lambda a: a.bounds.ceiling if a.bounds else float("inf"))
        limits = main.bounds
        shown.append(
            (
                choice,
                [
                    row.kind,
                    str(main.built.registers),
                    str(sum(a.built.local_bytes for a in row.analyses)),
                    str(main.built.shared_bytes),
                    f"{main.fits.share:.0%}",
                    f"{row.ceiling * 1e6:.2f}",
                    limits.binding if limits else "does not fit",
                    f"{limits.tflops:.1f}" if limits and limits.tflops else "-",
                    f"{limits.gbytes:.0f}" if limits and limits.gbytes else "-",
                ],
            )
        )
    return (
        f"{name} on {chip.name}, example {example.name}: computed, the lowest ceiling first\n{table(shown)}"
    )
