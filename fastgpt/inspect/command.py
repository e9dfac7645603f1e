"""`fastgpt inspect`: the command line of the microscope."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from fastgpt.chips import Chip, chip
from fastgpt.errors import InputError

if TYPE_CHECKING:
    from fastgpt.inspect.report import Analysis


@dataclass
class InspectArgs:
    """What a kernel becomes on a chip, and the most that the chip could do with it. Nothing is run.

    Kernels are the package's (`gelu`: a file of kernels/; `attention_forward`: one of its kernels; `gelu.cu`
    and `gelu.cu:gelu_forward_kernel`: CUDA, which takes nvcc), or yours: `path.py:kernel` with --signature,
    and `path.cu:kernel`.
    """

    kernels: Positional[tuple[str, ...]] = ()
    """Kernels; without any, and without --sweep, the package's Triton kernels are listed."""
    chip: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--arch"])] = ("sm_90",)
    """Chips (h100, a100, rtx4090 ...) or architectures (sm_80, sm_90, sm_100, sm_120: a typical chip)."""
    example: str | None = None
    """A part of the name of the package's examples to take, instead of those compiled for every chip."""
    compare: tuple[str, ...] = ()
    """Side by side: other chips, or other constants as NAME=VALUE,NAME=VALUE, num_warps among them."""
    sweep: str | None = None
    """Tabulate the choices of a launch, such as attention_forward, by computed ceiling."""
    stage: Literal["ttir", "ttgir", "llir", "ptx", "sass"] | None = None
    """Print this stage of the compiler instead, with the source line in front of each line."""
    html: Path | None = None
    """Write everything, with all stages, into one HTML page."""
    json: bool = False
    """Print JSON."""
    signature: str = ""
    """Your Triton kernel's arguments that are no constexprs: "*fp32,*bf16,i32,i32:16,fp32,1024"."""
    constexpr: tuple[str, ...] = ()
    """Your Triton kernel's constexprs: BLOCK=1024 ..."""
    num_warps: int = 4
    """Of your Triton kernel."""
    num_stages: int = 3
    """Of your Triton kernel."""
    block: int | None = None
    """Threads of a block of a CUDA kernel; by default what its __launch_bounds__ say."""
    shared: int = 0
    """Bytes of dynamic shared memory of a block of a CUDA kernel."""
    grid: int | None = None
    """Blocks of a launch, for the bounds of your kernel or a CUDA kernel."""
    trips: float | None = None
    """Rounds of the main loop in a block; by default as many as the work takes."""
    flops: float | None = None
    """Floating point operations of a launch of your kernel."""
    bytes: float | None = None
    """Bytes of memory that a launch of your kernel has to read and write."""


def inspect_command(args: Sequence[str]) -> None:
    given = tyro.cli(
        InspectArgs,
        args=list(args),
        prog="fastgpt inspect",
        description=InspectArgs.__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    _check(given)
    chips = [_chip(name) for name in given.chip]
    from fastgpt.inspect import build

    if any(not _is_cuda(name) for name in given.kernels) or not given.kernels:
        build.require_triton()
    if given.sweep is not None:
        _sweep(given, chips)
    elif not given.kernels:
        _list(chips[0])
    elif given.compare:
        _compare(given, chips[0])
    else:
        _show(
            given, [found for name in given.kernels for one in chips for found in analyses(given, name, one)]
        )


def _check(given: InspectArgs) -> None:
    """Options that could only be wrong."""
    for name in ("grid", "block", "trips", "flops", "bytes"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} {value}: it must be positive")
    if given.shared < 0:
        raise InputError(f"--shared {given.shared}: it must not be negative")
    if given.num_warps not in (1, 2, 4, 8, 16, 32):
        raise InputError(f"--num-warps {given.num_warps}: it must be 1, 2, 4, 8, 16 or 32")
    if given.sweep is not None and (given.kernels or given.compare):
        raise InputError("--sweep stands alone, without kernels and --compare")


def _chip(name: str) -> Chip:
    """Raises:
    InputError: there is none, or Triton and the package's kernels have nothing for it.
    """
    found = chip(name)
    if found.sm < 80:
        raise InputError(f"chip {name}: compute capability 8.0 or newer can be inspected")
    return found


def _is_cuda(name: str) -> bool:
    return name.split(":")[0].endswith(".cu")


def _constants(words: Sequence[str], option: str) -> dict[str, Any]:
    """NAME=VALUE by name; values are numbers, true, false, none, or text.

    Raises:
        InputError: a word without `=`.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{option} {word!r}: write NAME=VALUE")
        named = {"true": True, "false": False, "none": None}
        try:
            found[name] = named[value.lower()] if value.lower() in named else json.loads(value)
        except ValueError:
            found[name] = value
    return found


def analyses(
    given: InspectArgs, name: str, one: Chip, changed: dict[str, Any] | None = None
) -> list[Analysis]:
    """All kernels that a name means, on one chip, with the constants in `changed` instead of their own."""
    if _is_cuda(name):
        if changed:
            raise InputError(f"--compare: {name} is CUDA: compare it on chips")
        return _cuda(given, name, one)
    if ":" in name or name.endswith(".py"):
        return [_user(given, name, one, changed or {})]
    return _shipped(given, name, one, changed or {})


def _work(given: InspectArgs, *, tensor: bool) -> Any:
    from fastgpt.inspect.bounds import Work

    return Work(given.flops, given.bytes, given.flops if tensor else None)


def _launch(given: InspectArgs, warps: int) -> Any:
    from fastgpt.inspect.bounds import Launch

    return None if given.grid is None else Launch(given.grid, warps, given.trips)


def _cuda(given: InspectArgs, name: str, one: Chip) -> list[Analysis]:
    from fastgpt.inspect import build, sass
    from fastgpt.inspect.report import analyse

    file, _, wanted = name.partition(":")
    path = Path(file) if Path(file).exists() else build.CUDA / file
    if not path.exists():
        raise InputError(f"{file}: no such file, here or in {build.CUDA}")
    built = build.compile_cuda(path, one.sm, threads=given.block, shared=given.shared)
    chosen = [b for b in built if b.name.startswith(wanted)]
    if not chosen:
        known = ", ".join(sorted({b.name for b in built})) or "none"
        raise InputError(f"{file} has no kernel {wanted!r}: it has {known}")
    return [
        analyse(
            f"{path.name}: {b.name}",
            b,
            one,
            _launch(given, b.warps),
            _work(given, tensor=b.code.count(sass.TENSOR) > 0),
        )
        for b in chosen
    ]


def _user(given: InspectArgs, name: str, one: Chip, changed: dict[str, Any]) -> Analysis:
    from fastgpt.inspect import build, sass
    from fastgpt.inspect.report import analyse

    file, _, wanted = name.partition(":")
    kernel = build.load_triton(Path(file), wanted)
    values = {**_constants(given.constexpr, "--constexpr"), **changed}
    built = build.compile_user(
        kernel,
        given.signature,
        {k: v for k, v in values.items() if k not in ("num_warps", "num_stages")},
        warps=values.get("num_warps", given.num_warps),
        stages=values.get("num_stages", given.num_stages),
        sm=one.sm,
    )
    work = _work(given, tensor=built.code.count(sass.TENSOR) > 0)
    return analyse(f"{Path(file).name}: {wanted}", built, one, _launch(given, built.warps), work)


def _shipped(given: InspectArgs, name: str, one: Chip, changed: dict[str, Any]) -> list[Analysis]:
    from fastgpt.inspect import shipped
    from fastgpt.inspect.report import analyse

    unknown = set(changed) - {"num_warps", "num_stages", "maxnreg"}
    if unknown:
        raise InputError(
            f"--compare {', '.join(sorted(unknown))}: the grid of {name} depends on it; compare tiles with "
            "--sweep, or num_warps, num_stages and maxnreg here"
        )
    found = []
    for call in shipped.select(name, one, given.example):
        call = replace(call, options={**call.options, **changed})
        built = call.compile(one.sm)
        launch = replace(call.launch(built), trips=given.trips)
        found.append(analyse(call.title, built, one, launch, call.work(), call.values()))
    return found


def _compare(given: InspectArgs, first: Chip) -> None:
    from fastgpt.inspect.report import compared

    others: list[tuple[Chip, dict[str, Any]]] = [
        (first, _constants(other.split(","), "--compare")) if "=" in other else (_chip(other), {})
        for other in given.compare
    ]
    for name in given.kernels:
        # From the last to the first: what cannot be compared is an error before anything is compiled.
        sides = [analyses(given, name, *other) for other in reversed(others)]
        for row in zip(analyses(given, name, first), *reversed(sides), strict=True):
            print(f"{row[0].title}\n{compared(row, [first.name, *given.compare])}\n")


def _show(given: InspectArgs, found: Sequence[Analysis]) -> None:
    from fastgpt.inspect.page import page
    from fastgpt.inspect.report import text
    from fastgpt.inspect.stages import as_text

    if given.html is not None:
        given.html.write_text(page(found), encoding="utf-8")
        print(f"{given.html}: {len(found)} kernels")
    elif given.json:
        print(json.dumps([analysis.record() for analysis in found], indent=1))
    elif given.stage is not None:
        for analysis in found:
            if given.stage not in analysis.built.stages:
                raise InputError(f"--stage {given.stage}: {analysis.title} is CUDA, which has ptx and sass")
            print(f"{analysis.title} on {analysis.chip.name}: {given.stage}")
            print(as_text(given.stage, analysis.built.stages[given.stage]))
    else:
        print("\n\n".join(text(analysis) for analysis in found))


def _sweep(given: InspectArgs, chips: Sequence[Chip]) -> None:
    from fastgpt.inspect import sweep

    assert given.sweep is not None
    print("\n\n".join(sweep.text(given.sweep, one, sweep.sweep(given.sweep, one)) for one in chips))


def _list(one: Chip) -> None:
    from fastgpt.inspect import shipped, sweep

    for module in shipped.modules():
        shown = shipped.usual(module)
        kernels = dict.fromkeys(
            call.name.lstrip("_") for example in shown for call in shipped.calls(module, example, one)
        )
        print(f"{module:22} {', '.join(kernels)}")
    print(f"{'--sweep':22} {', '.join(sweep.names(one))}")
