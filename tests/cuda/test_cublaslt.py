"""What linear_gelu asks of cuBLASLt: descriptors, layouts, epilogues, and when it asks for an algorithm.

cuBLASLt needs a GPU. In the emulator its functions are those of emulator_cublaslt.h, which refuse what
cuBLASLt would, write down each call and compute the product, so that tests/ops compares the numbers as well.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import cuda_emulator
import pytest
import torch
from torch import Tensor

from fastgpt.ops import linear_gelu

pytestmark = pytest.mark.skipif(cuda_emulator.absent() is not None, reason=str(cuda_emulator.absent()))
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
GELU, BIAS, AUX = 32, 4, 128  # the bits of cublasLtEpilogue_t
COMPUTE_32F, COMPUTE_TF32 = 68, 77
# On the CPU y and h are multiples of 64, 128 or 256 bytes by chance, and that is a part of a product's kind.
ALIGNMENTS = 9


@pytest.fixture(autouse=True, scope="module")
def rows() -> None:
    cuda_emulator.register_rows()
    cuda_emulator.loaded().emulator_cublaslt_take.restype = ctypes.c_char_p


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    calls()
    yield
    cuda_emulator.loaded().emulator_cublaslt_refuse(0)


def calls() -> list[str]:
    """Lines of the calls since the last time."""
    return cuda_emulator.loaded().emulator_cublaslt_take().decode().splitlines()


def products() -> list[dict[str, int]]:
    return [
        {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}
        for line in calls()
        if line.startswith("matmul")
    ]


def run(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, save: bool = False, approximate: str = "tanh"
) -> Tensor:
    x = x.detach().requires_grad_(save)
    return linear_gelu(x, w, b, approximate=approximate, backend="emulated")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_description(dtype: torch.dtype, save: bool, bias: bool) -> None:
    """Column-major, the product is y^T (n, m) = w x^T; h is an output where backward needs it."""
    m, n, k = 5, 16, 24
    x, w, b = (torch.randn(*shape).to(dtype) for shape in [(m, k), (n, k), (n,)])
    run(x, w, b if bias else None, save=save)
    (call,) = products()
    layout = {"m": n, "n": m, "k": k, "transa": 1, "lda": k, "ldb": k, "ldd": n}
    epilogue = GELU + BIAS * bias + AUX * save
    assert call == layout | {"type": TYPES[dtype], "compute": COMPUTE_32F, "epilogue": epilogue}


def test_weights_are_read_as_they_are() -> None:
    """Transposed, as Hugging Face's Conv1D stores them; with gaps between rows; otherwise copied."""
    x = torch.randn(3, 24)
    for w, transa, lda in [
        (torch.randn(24, 16).t(), 0, 16),
        (torch.randn(24, 20)[:, :16].t(), 0, 20),
        (torch.randn(16, 40)[:, :24], 1, 40),
        (torch.randn(16, 48)[:, ::2], 1, 24),
        (torch.randn(1, 24).expand(16, 24), 1, 24),
    ]:
        y = run(x, w)
        (call,) = products()
        assert (call["transa"], call["lda"]) == (transa, lda)
        torch.testing.assert_close(y, linear_gelu(x, w, backend="eager"))


def test_an_algorithm_is_chosen_once_for_each_kind_of_product() -> None:
    w, b = torch.randn(32, 16), torch.randn(32)
    x = torch.randn(4 * 16 + 1)

    def heuristics(x: Tensor, w: Tensor, b: Tensor | None = b, save: bool = False) -> int:
        run(x, w, b, save=save)
        return sum(line.startswith("heuristic") for line in calls())

    wide, shifted = x[:-1].view(4, 16), x[1:].view(4, 16)
    kinds = [
        (wide, w),
        (wide[:3], w),
        (shifted, w),  # off the 16 bytes that the algorithm of the first may count on
        (wide, w, None),
        (wide, w, b, True),
        (wide, torch.randn(16, 32).t()),
        (wide.bfloat16(), w.bfloat16(), b.bfloat16()),
        (wide.half(), w.half(), b.half()),
    ]
    assert [heuristics(*kind) for kind in kinds] == [1] * len(kinds)
    for kind in kinds:
        assert sum(heuristics(*kind) for _ in range(50)) <= ALIGNMENTS


def test_partial_sums_stay_in_fp32() -> None:
    run(torch.randn(7, 8), torch.randn(8, 8))
    assert calls()[0] == "heuristic reduction=2"  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE


def test_tf32_where_the_user_allows_it() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    x, w = torch.randn(2, 8), torch.randn(8, 8)
    try:
        for precision, compute in [("tf32", COMPUTE_TF32), ("ieee", COMPUTE_32F)]:
            torch.backends.cuda.matmul.fp32_precision = precision
            run(x, w)
            run(x.half(), w.half())
            assert [call["compute"] for call in products()] == [compute, COMPUTE_32F]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("n", "k", "options", "asked"),
    [
        (12, 8, {"save": True}, False),  # h's leading dimension must be a multiple of 8
        (12, 8, {}, True),
        (16, 8, {"approximate": "none"}, False),  # cuBLASLt has no erf form
        (16, 0, {}, False),
    ],
)
def test_what_cublaslt_has_not_is_a_product_and_gelu(
    n: int, k: int, options: dict[str, object], asked: bool
) -> None:
    x, w, b = torch.randn(3, k), torch.randn(n, k), torch.randn(n)
    y = run(x, w, b, **options)  # type: ignore[arg-type]
    assert len(products()) == asked
    expected = linear_gelu(x, w, b, approximate=str(options.get("approximate", "tanh")), backend="eager")
    torch.testing.assert_close(y, expected)


def test_no_algorithm() -> None:
    """The heuristic may find none; then the answer is remembered as well."""
    cuda_emulator.loaded().emulator_cublaslt_refuse(1)
    x, w = torch.randn(6, 40), torch.randn(48, 40)
    for _ in range(50):
        torch.testing.assert_close(run(x, w, save=True), linear_gelu(x, w, backend="eager"))
    assert 1 <= len(calls()) <= ALIGNMENTS


def test_constants_are_those_of_cublaslt(tmp_path: Path) -> None:
    headers = [
        Path(sysconfig.get_path("purelib")) / "nvidia" / name / "include" for name in ("cu13", "cublas")
    ]
    headers += [toolkit] if (toolkit := cuda_emulator.toolkit()) else []
    found = [path for path in headers if (path / "cublasLt.h").exists()]
    if not found:
        pytest.skip("cublasLt.h is not installed")
    text = (cuda_emulator.EMULATOR / "emulator_cublaslt.h").read_text()
    constants = dict(re.findall(r"\b(CUBLAS\w+) = (\d+)", text))
    assert len(constants) > 20
    source = tmp_path / "constants.cpp"
    source.write_text(
        "#include <cublasLt.h>\n"
        + "".join(f"static_assert({name} == {value});\n" for name, value in constants.items())
    )
    includes = [f"-I{path}" for path in (found[0], cuda_emulator.toolkit())]
    compiler = shutil.which("g++")
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", *includes, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


MUTANTS = {
    "csrc/cuda/cublaslt.cpp": [
        ("p.n % 8 != 0", "p.n % 4 != 0"),
        ("          alignment(p.x),\n", "          0,\n"),
    ],
    "csrc/cuda/linear_gelu_ops.cpp": [
        ("tensor = transposed || holds(0, 1) ? w : w.contiguous();", "tensor = w;")
    ],
}
