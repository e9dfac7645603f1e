"""Kernels compiled for chips that are not here: Triton's and CUDA's, the package's and the user's."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.errors import InputError
from fastgpt.inspect import sass

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc/cuda"
# nvcc's names of the families that the package compiles for, with their own instructions.
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a", 120: "sm_120"}
NVCC_OPTIONS = ("-std=c++17", "-O3")
STAGES = ("ttir", "ttgir", "llir", "ptx", "sass")


@dataclass(frozen=True)
class Built:
    """A kernel as a chip would run it."""

    name: str
    sm: int
    registers: int  # of a thread
    local_bytes: int  # stack and spills of a thread
    shared_bytes: int  # of a block, static and, where it is known, dynamic
    threads: int  # of a block
    code: sass.Code
    stages: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    threads_are: str = "compiled"  # or "given" or "assumed"

    @property
    def warps(self) -> int:
        return -(-self.threads // 32)


# -- tools ---------------------------------------------------------------------------------------------------


def tool(name: str, cubin: bytes, *arguments: str) -> str:
    """What one of the CUDA tools that ship with Triton prints of a compiled kernel."""
    import triton

    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def machine_code(cubin: bytes) -> str:
    """As text, with the encoding of each instruction and the source lines that are known."""
    return tool("nvdisasm", cubin, "-c", "-hex", "-g")


def resources(cubin: bytes) -> dict[str, tuple[int, int, int]]:
    """(registers of a thread, its stack and local bytes, static shared bytes of a block) of each kernel."""
    usage = tool("cuobjdump", cubin, "-res-usage")
    pattern = r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: (int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(pattern, usage)
    }


# -- Triton --------------------------------------------------------------------------------------------------


def compile_triton(kernel: Any, args: Sequence[Any], options: dict[str, Any], sm: int) -> Built:
    """A Triton kernel, specialised on its arguments as Triton's own launcher does.

    `args` and `options` are what `kernel[grid](...)` would get; tensors may be on the meta device.
    """
    compiled, constants = _triton_compiled(kernel, args, options, sm)
    cubin = compiled.asm["cubin"]
    ((name, (registers, local, _)),) = resources(cubin).items()
    text = machine_code(cubin)
    stages = {stage: str(compiled.asm[stage]) for stage in STAGES if stage in compiled.asm}
    return Built(
        name=kernel.__name__,
        sm=sm,
        registers=registers,
        local_bytes=local,
        shared_bytes=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
        code=sass.parse(text)[name],
        stages={**stages, "sass": text},
        constants=constants,
    )


def _triton_compiled(
    kernel: Any, args: Sequence[Any], options: dict[str, Any], sm: int
) -> tuple[Any, dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **options)
    options.setdefault("debug", False)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    constants = {
        parameter.name: bound[parameter.name] for parameter in kernel.params if parameter.is_constexpr
    }
    # Triton's cache knows a kernel by its text: in another checkout, lines would be those of the first.
    place = hashlib.sha256(kernel.fn.__code__.co_filename.encode()).hexdigest()[:16]
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / f"inspect-{place}")
        return triton.compile(source, target=target, options=parsed.__dict__), constants


def require_triton() -> None:
    """Raises:
    InputError: Triton is not installed, or interprets kernels instead of compiling them.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("inspecting needs Triton, which runs on Linux: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET=1 makes Triton interpret kernels: unset it to compile them")


_SCALARS = {
    "i1": True, "i32": 4097, "i64": 1 << 40 | 1, "fp32": 1.5, "fp64": 1.5, "i32:16": 4096, "i64:16": 1 << 40
}  # fmt: skip
_POINTERS = {
    "fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i64": "int64",
    "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "i1": "bool", "fp8e4nv": "float8_e4m3fn",
    "fp8e5": "float8_e5m2",
}  # fmt: skip


def arguments(signature: str) -> list[Any]:
    """Sample arguments for types like "*fp32,*bf16,i32,i32:16,fp32,1024,none".

    Pointers are taken to be multiples of 16 bytes, as PyTorch's are; `i32:16` is a number that is a multiple
    of 16, and a literal is itself.

    Raises:
        InputError: an unknown type.
    """
    import torch

    found: list[Any] = []
    for word in filter(None, (part.strip() for part in signature.split(","))):
        if word.startswith("*") and word[1:] in _POINTERS:
            found.append(torch.empty(1 << 20, dtype=getattr(torch, _POINTERS[word[1:]]), device="meta"))
        elif word in _SCALARS:
            found.append(_SCALARS[word])
        elif word == "none":
            found.append(None)
        elif re.fullmatch(r"-?\d+", word):
            found.append(int(word))
        else:
            known = ", ".join([*(f"*{name}" for name in _POINTERS), *_SCALARS, "none"])
            raise InputError(f"--signature: {word!r} is no type; use a whole number or one of {known}")
    return found


def load_triton(path: Path, name: str) -> Any:
    """The Triton kernel called `name` in a Python file, without its autotuner.

    Raises:
        InputError: there is no such file, it does not run, or has no such kernel.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"inspected_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and Triton look a module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    kernels = {key: value for key, value in vars(module).items() if hasattr(_unwrapped(value), "arg_names")}
    if name not in kernels:
        raise InputError(f"{path} has no Triton kernel {name!r}: it has {', '.join(kernels) or 'none'}")
    return _unwrapped(kernels[name])


def _unwrapped(value: Any) -> Any:
    """Without `triton.autotune` and `triton.heuristics`."""
    while hasattr(value, "fn") and hasattr(value.fn, "arg_names"):
        value = value.fn
    return value


def compile_user(
    kernel: Any, signature: str, constants: dict[str, Any], *, warps: int, stages: int, sm: int
) -> Built:
    """A user's Triton kernel for the types of its arguments and the values of its constexprs.

    Raises:
        InputError: the number of types or the constexprs are not the kernel's, or it does not compile.
    """
    values = arguments(signature)
    names = [p.name for p in kernel.params if not p.is_constexpr]
    missing = [
        p.name for p in kernel.params if p.is_constexpr and p.name not in constants and not p.has_default
    ]
    unknown = set(constants) - {p.name for p in kernel.params if p.is_constexpr}
    if len(values) != len(names):
        raise InputError(f"--signature has {len(values)} types: {kernel.__name__} takes {', '.join(names)}")
    if missing or unknown:
        wrong = f"needs {', '.join(missing)}" if missing else f"has no {', '.join(sorted(unknown))}"
        raise InputError(f"--constexpr: {kernel.__name__} {wrong}")
    options = {**dict(zip(names, values, strict=True)), **constants, "num_warps": warps, "num_stages": stages}
    try:
        return compile_triton(kernel, (), options, sm)
    except Exception as error:  # Triton's, MLIR's and ptxas's have no class in common
        text = next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
        raise InputError(f"{kernel.__name__} does not compile for sm_{sm}: {text.strip()}") from error


# -- CUDA ----------------------------------------------------------------------------------------------------


def require_nvcc() -> str:
    """Raises:
    InputError: there is none.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise InputError("inspecting CUDA needs nvcc: install the CUDA toolkit and put nvcc on PATH")
    return nvcc


@functools.cache
def nvcc_version() -> str:
    said = subprocess.run([require_nvcc(), "--version"], capture_output=True, text=True).stdout
    return str(re.findall(r"release ([\d.]+)", said)[0])


def nvcc_command(source: Path, architecture: str) -> list[str]:
    """All but what is to be written, and where."""
    return [require_nvcc(), *NVCC_OPTIONS, f"-arch={architecture}", f"-I{ROOT / 'csrc'}", str(source)]


def ptxas_report(said: str) -> Iterator[tuple[str, int, int, int]]:
    """(kernel, registers, static shared memory, spilled bytes) of each, from what `ptxas -v` said."""
    pattern = (
        r"Function properties for (\S+)\n.*, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stores, loads, registers, rest in re.findall(pattern, said):
        shared = re.findall(r"(\d+) bytes smem", rest)
        yield name, int(registers), int(shared[0]) if shared else 0, int(stores) + int(loads)


def demangled(names: Sequence[str]) -> list[str]:
    """Without arguments and our namespace."""
    if shutil.which("c++filt") is None:
        return list(names)
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [
        re.sub(r"\(.*|^void ", "", line.replace("fastgpt::cuda::", "")) for line in text.stdout.splitlines()
    ]


def compile_cuda(source: Path, sm: int, *, threads: int | None, shared: int = 0) -> list[Built]:
    """Every kernel of a CUDA file, with `shared` bytes of dynamic shared memory a block.

    The threads of a block are those given, else those of `__launch_bounds__`, else 256 are assumed.

    Raises:
        InputError: no nvcc, no such file, or it does not compile.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file")
    architecture = ARCHITECTURES.get(sm, f"sm_{sm}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.cubin"
        call = [*nvcc_command(source, architecture), "-lineinfo", "--cubin", "-o", str(out)]
        done = subprocess.run([*call, "--keep", "--keep-dir", folder], capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["nvcc failed"]
            raise InputError(f"{source} does not compile for {architecture}: {lines[0].strip()}")
        cubin = out.read_bytes()
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    return _cuda_kernels(cubin, ptx, sm, threads, shared)


def _cuda_kernels(cubin: bytes, ptx: str, sm: int, threads: int | None, shared: int) -> list[Built]:
    codes = sass.parse(machine_code(cubin))
    used = {name: values for name, values in resources(cubin).items() if name in codes}
    entries = ptx_entries(ptx)
    found = []
    for mangled, name in zip(used, demangled(list(used)), strict=True):
        registers, local, static = used[mangled]
        entry = entries.get(mangled, "")
        bound = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry)
        compiled = 1
        for size in bound.groups() if bound else ():
            compiled *= int(size or 1)
        found.append(
            Built(
                name=name,
                sm=sm,
                registers=registers,
                local_bytes=local,
                shared_bytes=static + shared,
                threads=threads or (compiled if bound else 256),
                code=codes[mangled],
                stages={"ptx": entry, "sass": _listing(codes[mangled])},
                threads_are="given" if threads else "compiled" if bound else "assumed",
            )
        )
    return found


def ptx_entries(ptx: str) -> dict[str, str]:
    """The text of each kernel of a PTX file by its name."""
    starts = [(m[1], m.start()) for m in re.finditer(r"\.entry\s+([\w$]+)", ptx)]
    ends = [start for _, start in starts[1:]] + [len(ptx)]
    return {name: ptx[start:end] for (name, start), end in zip(starts, ends, strict=True)}


def _listing(code: sass.Code) -> str:
    """Machine code of one of several kernels of a file."""
    lines, before = [], ""
    for i in code.instructions:
        if i.source != before:
            before = i.source
            lines.append(f"\t//## {i.source}")
        lines.append(f"        /*{i.address:04x}*/ {i.predicate:>6} {i.opcode} {i.operands} ;")
    return "\n".join(lines)
