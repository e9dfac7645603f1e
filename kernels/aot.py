"""Compile kernels for chips that are not here, and look at what came out: no GPU and no driver needed.

    python -m fastgpt.kernels.aot layer_norm gelu --families 80 90 100 120 [--json] [--candidates]

Each kernel file lists `examples()`, calls of its launchers at the sizes that matter. The calls run on meta
tensors with their launches captured, so what is compiled is what a GPU would get, launch choices included;
with --candidates, what `tune.py` would try instead of each choice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastgpt.kernels.examples import Example
from fastgpt.kernels.launch import FAMILIES, Chip, capture
from fastgpt.kernels.tune import listing, trying

# The chip of each family that launches are chosen for: its SMs, and the shared memory a program can have.
CHIPS = {80: (108, 163 << 10), 90: (132, 227 << 10), 100: (148, 227 << 10), 120: (170, 99 << 10)}

# What an example can require of the machine code.
TENSOR_CORES = {80: r"\bHMMA\.", 90: r"\b[HQ]GMMA\.", 100: r"\bUTC[HQ]MMA", 120: r"\bHMMA\."}
VECTOR_LOAD = r"\bLDG\.E(\.\w+)*\.128\b|\bLDGSTS\.E(\.\w+)*\.128\b|\bUTMALDG\b"
VECTOR_STORE = r"\bSTG\.E(\.\w+)*\.128\b|\bUTMASTG\b"


@dataclass(frozen=True)
class Compiled:
    """A kernel as a chip would run it."""

    example: str
    kernel: str
    family: int
    constexprs: dict[str, Any]
    warps: int
    registers: int  # of a thread
    local_bytes: int  # stack and spills of a thread
    shared_bytes: int  # of a program
    shared_limit: int
    missing: list[str]  # requirements that are not met


def modules() -> list[str]:
    """The kernel files that list examples."""
    here = Path(__file__).parent
    names = [module.name for module in pkgutil.iter_modules([str(here)])]
    return [name for name in names if "\ndef examples(" in (here / f"{name}.py").read_text()]


def compile_example(example: Example, family: int) -> Iterator[Compiled]:
    """Every kernel that the example launches."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    sms, shared_limit = CHIPS[family]
    with capture(Chip(family, sms), lambda *launch: launches.append(launch)):
        example.call()
    assert {kernel.__name__ for kernel, _, _ in launches} >= set(example.requires), example
    for kernel, args, options in launches:
        compiled, constexprs = _compile(kernel, args, options, family)
        registers, local = _resources(compiled.asm["cubin"])
        missing = _missing(example.requires.get(kernel.__name__, ()), compiled, family)
        yield Compiled(
            example=example.name,
            kernel=kernel.__name__,
            family=family,
            constexprs=constexprs,
            warps=compiled.metadata.num_warps,
            registers=registers,
            local_bytes=local,
            shared_bytes=compiled.metadata.shared,
            shared_limit=shared_limit,
            missing=missing,
        )


def compile_candidates(example: Example, family: int) -> Iterator[Compiled]:
    """Every kernel that the example may launch while its choices are tuned."""
    with capture(Chip(family, CHIPS[family][0]), lambda *launch: None), listing() as asked:
        example.call()
    for name, candidates in asked.items():
        for candidate in candidates:
            with trying(name, candidate):
                yield from compile_example(example, family)


def _compile(
    kernel: Any, args: tuple[Any, ...], options: dict[str, Any], family: int
) -> tuple[Any, dict[str, Any]]:
    """The compiled kernel, specialised on its arguments as Triton's own launcher does, and its constants."""
    target = GPUTarget("cuda", family, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **options)
    options.setdefault("debug", False)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    constants = {
        parameter.name: bound[parameter.name] for parameter in kernel.params if parameter.is_constexpr
    }
    return triton.compile(source, target=target, options=parsed.__dict__), constants


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack and local bytes) of a thread."""
    usage = _tool("cuobjdump", cubin, "-res-usage")
    registers, stack, local = (
        int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def _missing(requirements: tuple[str, ...], compiled: Any, family: int) -> list[str]:
    """Those of the requirements that are not met."""
    if not requirements:
        return []
    code = sass(compiled.asm["cubin"])
    # (shape, bits) of the offsets that pointers get.
    offsets = re.findall(r"tt\.addptr .*, tensor<(\d+(?:x\d+)?)xi(\d+)", compiled.asm["ttir"])
    narrow = [shape for shape, bits in offsets if bits == "32" and "x" in shape]
    to_rows = set(re.findall(r"tt\.addptr .*: !tt\.ptr<\w+>, i(\d+)", compiled.asm["ttir"]))
    met = {
        "vector_load": re.search(VECTOR_LOAD, code),
        "vector_store": re.search(VECTOR_STORE, code),
        "tensor_cores": re.search(TENSOR_CORES[family], code),
        "wide_rows": to_rows == {"64"},
        "wide_offsets": not narrow and any(bits == "64" for _, bits in offsets),
    }
    return [requirement for requirement in requirements if not met[requirement]]


def sass(cubin: bytes) -> str:
    """The machine code."""
    return _tool("nvdisasm", cubin, "-c")


def _tool(name: str, cubin: bytes, *arguments: str) -> str:
    """Run one of the CUDA tools that ship with Triton."""
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels' examples without a GPU.")
    parser.add_argument("modules", nargs="*", choices=[[], *modules()], help="kernel files; default: all")
    parser.add_argument("--families", nargs="*", type=int, choices=FAMILIES, help="default: all that are due")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--candidates", action="store_true", help="those of tuning, not what is shipped")
    options = parser.parse_args()
    compiled = compile_candidates if options.candidates else compile_example
    results = []
    for name in options.modules or modules():
        for example in importlib.import_module(f"fastgpt.kernels.{name}").examples():
            due = FAMILIES if example.every_chip else () if example.slow else (90,)
            for family in options.families or due:
                results += compiled(example, family)
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
        return
    for r in results:
        constants = " ".join(f"{k}={v}" for k, v in r.constexprs.items())
        print(
            f"{r.example:44} {r.kernel:27} sm_{r.family:<4} {constants:28} warps={r.warps:<3} "
            f"registers={r.registers:<4} local={r.local_bytes:<4} shared={r.shared_bytes:<6} "
            f"{'missing: ' + ', '.join(r.missing) if r.missing else ''}"
        )


if __name__ == "__main__":
    main()
