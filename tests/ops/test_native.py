"""What is particular to the native rows: instruction sets, threads, memory that C++ allocates."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import Implementation, library

from .helpers import CASES, Case, _case, adamw, grad_norm
from .test_operators import gradients, requiring

CPU = torch.device("cpu")
ROWS = [row for row in ops.table() if row.name == "native" and row.missing(CPU) is None]
native_rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.operation)
NATIVE = {row.operation for row in ops.table() if row.name == "native"}
OPERATORS = {
    value.name: value
    for module in list(sys.modules.values())
    if getattr(module, "__name__", "").startswith("fastgpt.ops.")
    for value in vars(module).values()
    if isinstance(value, library.Operator) and value.name in NATIVE
}


def cases(row: Implementation) -> list[Case]:
    return [case for case in CASES if case.operation == row.operation]


def everything(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients."""
    inputs = requiring(case, case.inputs(dtype))
    outs = case(inputs, "native")
    torch.manual_seed(1)
    grads = gradients(outs, inputs) if any(out.requires_grad for out in outs) else []
    return [x.detach() for x in [*outs, *grads]]


@pytest.mark.skipif(not ROWS, reason="the native kernels are not built here")
@pytest.mark.parametrize("name", OPERATORS)
def test_schemas_are_those_of_the_other_implementations(name: str) -> None:
    for direction in ("forward", "backward"):
        schema = getattr(OPERATORS[name], direction)
        if schema is not None:
            operator = getattr(torch.ops.fastgpt_native, f"{name}_{direction}").default
            assert operator._schema == torch._C.parse_schema(f"fastgpt_native::{name}_{direction}{schema}")


@pytest.mark.skipif(not ROWS, reason="the native kernels are not built here")
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_kernels_are_registered(name: str) -> None:
    """Built for CUDA, which takes no GPU, every operator has a CUDA kernel."""
    extension = importlib.import_module("fastgpt._C")
    if not hasattr(extension, "cuda_targets"):
        pytest.skip("built without CUDA")
    for direction in ("forward", "backward"):
        if getattr(OPERATORS[name], direction) is not None:
            operator = f"fastgpt_native::{name}_{direction}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")
            assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


# Large enough that each thread gets a share, of numbers of rows that three does not divide. Attention and
# cross_entropy have tests of their own; the products of the linear operations are PyTorch's, whose libraries
# divide a sum among threads as they please.
X, W = (403, 300), (300,)
SHARED = [
    _case("layer_norm", "rows", ops.layer_norm, X, W, W),
    _case("add_layer_norm", "rows", ops.add_layer_norm, X, X, W, W),
    _case("rms_norm", "rows", ops.rms_norm, X, W),
    _case("gelu", "rows", ops.gelu, X),
    _case("bias_gelu", "rows", ops.bias_gelu, X, W),
    _case("dropout_add", "rows", ops.dropout_add, X, X, p=0.3),
    _case("embedding", "rows", ops.embedding, torch.arange(1000).view(4, 250) ** 2 % 401, X, X),
    _case("adamw_", "rows", adamw, X, X, X, X),
    _case("grad_norm", "rows", grad_norm, X, W),
]


@pytest.mark.skipif(not ROWS, reason="the native kernels are not built here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.operation)
def test_threads_do_not_change_the_result(case: Case, dtype: torch.dtype, threads: None) -> None:
    results = []
    for count in (1, 3, 4):
        torch.set_num_threads(count)
        results.append(everything(case, dtype))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "row",
    [row for row in ops.table() if row.name in ("native", "emulated") and row.missing(CPU) is None],
    ids=lambda row: f"{row.operation}-{row.name}",
)
def test_derivatives_are_in_cpp(row: Implementation) -> None:
    """No Python runs in a backward pass; the emulated row, whose derivative is in Python, shows some."""
    case = cases(row)[-2]
    inputs = requiring(case, case.inputs(torch.float32))
    outs = case(inputs, row.name)
    if not any(out.requires_grad for out in outs):
        pytest.skip("no gradient")
    package = str(Path(ops.__file__).parent)
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            called.append(frame.f_code.co_name)

    wanted = [x for x in inputs if x.requires_grad]
    cotangents = [torch.ones_like(out) for out in outs if out.requires_grad]
    sys.setprofile(note)
    try:
        torch.autograd.grad([out for out in outs if out.requires_grad], wanted, cotangents)
    finally:
        sys.setprofile(None)
    assert bool(called) == (row.name == "emulated"), called


@native_rows
def test_every_element_is_written(row: Implementation) -> None:
    """In deterministic mode PyTorch fills what C++ allocates with NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        for case in cases(row):
            for tensor in everything(case, torch.float32):
                assert not tensor.isnan().any(), case.name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not ROWS, reason="the native kernels are not built here")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_lesser_instruction_sets(isa: str) -> None:
    """The machine's own is what the other tests run."""
    environment = {**os.environ, "FASTGPT_CPU_ISA": isa}
    probe = "import torch; from fastgpt import _C; print(_C.isa())"
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if "this machine does not have it" in done.stderr:
        pytest.skip(f"this machine does not have {isa}")
    assert done.stdout.strip() == isa, done.stderr
    tests = [
        "tests/ops/test_table.py",
        "-k",
        "native and (accuracy or nan)",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not ROWS, reason="the native kernels are not built here")
def test_unknown_instruction_set() -> None:
    probe = "import torch; from fastgpt import _C; _C.isa()"
    environment = {**os.environ, "FASTGPT_CPU_ISA": "avx3"}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    assert "FASTGPT_CPU_ISA=avx3: it must be baseline, avx2, avx512 or avx512_bf16" in done.stderr


@pytest.mark.skipif(not ROWS, reason="the native kernels are not built here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions(dtype: torch.dtype) -> None:
    """All numbers of 16 bits are read and written as by PyTorch, and their sums are rounded as by it.

    But for subnormal bf16, which the processor's own instruction writes as 0.
    """
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(-1, 64)
    w = torch.ones(64, dtype=dtype)
    for other in (
        torch.zeros_like(every),
        every.flip(0),
        every.roll(12345).view(-1, 64),
        torch.full_like(every, 3e-7),
    ):
        summed = ops.add_layer_norm(every, other, w, backend="native")[1]
        expected = every + other
        if dtype == torch.bfloat16 and importlib.import_module("fastgpt._C").isa() == "avx512_bf16":
            expected[expected.abs() < torch.finfo(dtype).tiny] = 0
        torch.testing.assert_close(summed, expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    absent = library._load_native()
    assert "were not built: install fastgpt again with a C++ compiler" in str(absent)
    monkeypatch.setattr(library, "_native_absent", absent)
    with pytest.raises(
        InputError, match="layer_norm cannot run as 'native' on cpu: the native kernels were not"
    ):
        ops.layer_norm(x, torch.ones(3), backend="native")
    monkeypatch.setattr(library, "_native_absent", None)
    monkeypatch.setattr(library, "_native_built", set())
    assert "FASTGPT_BUILD=cuda" in str(library.native_missing("gelu", torch.device("cuda")))
    assert "CPU and CUDA tensors" in str(library.native_missing("gelu", torch.device("meta")))


def test_an_extension_for_another_torch_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: object())
    built = SimpleNamespace(torch_version="1.0.0")
    monkeypatch.setattr(library.importlib, "import_module", lambda name: built)
    assert "install fastgpt again" in str(library._load_native())
    assert "built for 1.0.0" in str(library._load_native())

    def undefined_symbol(name: str) -> None:
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(library.importlib, "import_module", undefined_symbol)
    assert "undefined symbol" in str(library._load_native())


MUTANTS = {
    "csrc/cpu/loops/gelu.h": [
        ("fma(hv, e * r * r, s)", "fma(hv, e * r, s)", "tests/ops/test_table.py -k gelu-native-cpu"),
        (
            "store(db + c, load(db + c, n) + d, n)",
            "store(db + c, d, n)",
            "tests/ops/test_table.py -k gelu-native-cpu",
        ),
    ],
    "csrc/cpu/loops/layer_norm.h": [
        (
            "first(load(x + c, n) - mean, n)",
            "load(x + c, n) - mean",
            "tests/ops/test_table.py -k norm-native-cpu",
        ),
        (
            "if (dsummed != nullptr) out +=",
            "if (dsummed == nullptr) out +=",
            "tests/ops/test_table.py -k norm-native-cpu",
        ),
    ],
    "csrc/cpu/loops/cross_entropy.h": [
        (
            "total = total * exp_negative(top - greater) +",
            "total = total +",
            "tests/ops/test_table.py -k cross_entropy-native-cpu",
        ),
        (
            "fill_zero(dx + size, all.width - size);",
            "",
            "tests/ops/test_table.py -k cross_entropy-native-cpu",
        ),
    ],
    "csrc/cpu/loops/attention.h": [
        ("total[i] = fma(total[i], factor[i], sum);", "total[i] += sum;", "tests/native/test_attention.py"),
        (
            "n > part.first + kLanes - 1 - part.window",
            "n > part.first - part.window",
            "tests/native/test_attention.py",
        ),
    ],
    "csrc/cpu/loops/adamw.h": [
        (
            "chunk_words(*seed, number, words)",
            "chunk_words(*seed, chunk, words)",
            "tests/test_optim.py -k native",
        ),
        (
            "v = v * a.beta2 + g * g * a.weight2;",
            "v = v * a.beta2 + g * a.weight2;",
            "tests/ops/test_table.py -k adamw_-native-cpu",
        ),
    ],
    "csrc/cpu/common.h": [
        ("count(std::clamp<int64_t>(rows / 8, 1, 64))", "count(at::get_num_threads())"),
    ],
    "csrc/autograd/gelu.cpp": [
        (
            "save_for_backward({x, bias})",
            "save_for_backward({bias, x})",
            "tests/ops/test_table.py -k gelu-native-cpu",
        ),
    ],
}
