"""`fastgpt bench ops` on operations of a few numbers: what is timed, what is refused, and what rows say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops as public
from fastgpt.benchmarks import cases, check, contenders, ops
from fastgpt.benchmarks.cases import WORKLOADS, Sizes, cost_of, directions, least_bytes, parameter_shapes
from fastgpt.benchmarks.check import Checker
from fastgpt.benchmarks.contenders import Contender, contenders_of
from fastgpt.benchmarks.ops import Case, OpsArgs, cases_of, run_ops
from fastgpt.benchmarks.results import Row, read
from fastgpt.cli import main
from fastgpt.config import GPTConfig
from fastgpt.errors import InputError
from fastgpt.model import GPT
from fastgpt.ops import Cost, registry

CPU = torch.device("cpu")
TINY = Sizes(B=1, T=8, C=32, H=2, L=1, V=1024)
QUICK = {"case_seconds": 0.0, "device": "cpu", "threads": 1, "dtypes": ("float32",)}


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "shapes_of", lambda name, device: [TINY])


@pytest.fixture
def implement(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds an implementation of gelu to the table, for one test."""
    table = {name: dict(rows) for name, rows in registry._table.items()}
    monkeypatch.setattr(registry, "_table", table)

    def add(name: str, function: Callable[..., Tensor]) -> None:
        registry.register("gelu", name, function)

    return add


def rows_of(tmp_path: Path, **options: Any) -> dict[tuple[str, str], Row]:
    """By operation and contender, of one run."""
    path = run_ops(OpsArgs(out=tmp_path, **{**QUICK, **options}))
    return {(row.operation, row.contender): row for row in read(path)}


def gelu(x: Tensor, *, approximate: str) -> Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


def test_two_operations_end_to_end(
    tiny_shapes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--ops layer_norm grad_norm --contenders native torch-foreach triton --directions both"
    options = f"--device cpu --threads 1 --dtypes float32 --case-seconds 0 --run one --out {tmp_path}"
    assert main(["bench", "ops", *arguments.split(), *options.split()]) == 0
    out = capsys.readouterr().out
    assert "layer_norm both float32 B=1 T=8 C=32: eager" in out
    (path,) = tmp_path.rglob("*.csv")
    assert path.name == "one.csv"
    found = {(row.operation, row.contender): row for row in read(path)}
    eager = found["layer_norm", "eager"]
    assert (eager.status, eager.kind, eager.shape, eager.shape_class) == (
        "ok",
        "measured",
        "B=1 T=8 C=32",
        "tiny",
    )
    assert eager.median_us and eager.ratio and eager.rounds == ops.MIN_ROUNDS
    assert eager.peak_memory_bytes is not None
    assert eager.peak_memory_bytes >= 2 * 4 * 8 * 32  # y and dx
    assert (eager.threads, eager.device, eager.run) == (1, "cpu", "one")
    assert eager.flops == cost_of(WORKLOADS["layer_norm"], TINY, torch.float32, "both").flops
    assert found["layer_norm", "triton"].status == "missing"
    assert "interpreter" in found["layer_norm", "triton"].note
    foreach = found["grad_norm", "torch-foreach"]
    assert (foreach.status, foreach.direction, foreach.baseline) == ("ok", "forward", "eager")


def test_a_wrong_contender_is_not_timed(
    tiny_shapes: None, implement: Callable[..., None], tmp_path: Path
) -> None:
    """Wrong outputs, wrong gradients and NaN are all seen; nearly right is not enough."""

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return gelu(x, approximate="tanh")

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 1.0001 * dy

    calls = {"off": 0}

    def off(x: Tensor, *, approximate: str) -> Tensor:
        calls["off"] += 1
        return 1.00001 * gelu(x, approximate=approximate)

    implement("right", gelu)
    implement("off", off)
    implement("erf", lambda x, *, approximate: gelu(x, approximate="none"))
    implement("gradient", lambda x, *, approximate: WrongGradient.apply(x))
    implement("nan", lambda x, *, approximate: gelu(x, approximate=approximate) + x.new_tensor(torch.nan))
    implement("shape", lambda x, *, approximate: gelu(x, approximate=approximate)[..., :-1])
    names = ("right", "off", "erf", "gradient", "nan", "shape")
    found = rows_of(tmp_path, ops=("gelu",), directions=("forward",), contenders=names)
    assert found["gelu", "right"].status == "ok"
    for name, note in {
        "off": "result 0 (outputs, then gradients): error",
        "erf": "result 0 (outputs, then gradients): error",
        "gradient": "result 1 (outputs, then gradients): error",
        "nan": "error nan against float64 exceeds",
        "shape": "outputs have shapes (1, 8, 127): they must have (1, 8, 128)",
    }.items():
        row = found["gelu", name]
        assert (row.status, row.median_us, row.ratio) == ("wrong", None, None)
        assert note in row.note
    assert calls["off"] == 1, "it ran again after it was found to be wrong"


def test_a_contender_wrong_only_in_many_rows_is_not_timed(
    implement: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The few rows that float64 checks are right; the whole case is compared with eager."""
    sizes = dataclasses.replace(TINY, T=4 * check.ROWS)
    monkeypatch.setattr(ops, "shapes_of", lambda name, device: [sizes])

    def forgets_the_last_row(x: Tensor, *, approximate: str) -> Tensor:
        y = gelu(x, approximate=approximate)
        return y if x.shape[1] <= check.ROWS else torch.cat([y[:, :-1], 0.99 * y[:, -1:]], 1)

    implement("right", gelu)
    implement("late", forgets_the_last_row)
    found = rows_of(tmp_path, ops=("gelu",), directions=("forward",), contenders=("late", "right"))
    assert found["gelu", "right"].status == "ok"
    assert found["gelu", "late"].status == "wrong"
    assert "from eager's exceeds" in found["gelu", "late"].note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_contenders_pass(dtype: torch.dtype) -> None:
    """Every row of the table that runs here, and PyTorch's own, for every operation."""
    sizes = dataclasses.replace(TINY, T=check.ROWS + 32, L=2)  # more than float64 checks
    for workload in WORKLOADS.values():
        checker = Checker(CPU)
        able = [c for c in contenders_of(workload, CPU, dtype) if c.missing is None and not c.compiles]
        able = [
            c for c in able if c.name != "emulated"
        ]  # which the tests of kernels add, and hold to the same
        for contender in able:
            verdict = checker.verdict(contender.name, contender.checked, workload, sizes, dtype, few=True)
            assert verdict.wrong is None, (workload.operation, contender.name, verdict.wrong)


def test_out_of_memory_is_a_row(
    tiny_shapes: None, implement: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def greedy(x: Tensor, *, approximate: str) -> Tensor:
        torch.empty(1 << 60)
        return x

    implement("greedy", greedy)
    found = rows_of(tmp_path, ops=("gelu",), directions=("both",), contenders=("greedy",), run="a")
    assert (found["gelu", "greedy"].status, found["gelu", "greedy"].kind) == ("oom", "measured")
    assert found["gelu", "eager"].status == "ok"

    monkeypatch.setattr(ops, "_free_memory", lambda device: 1000)
    found = rows_of(tmp_path, ops=("gelu",), directions=("both",), contenders=("native",), run="b")
    row = found["gelu", "eager"]
    assert (row.status, row.kind, row.median_us) == ("oom", "computed", None)
    assert row.note == "not tried: it takes at least 0.0 GB, and 0.0 GB are free"


def test_a_peer_that_is_not_installed_is_a_row(tiny_shapes: None, tmp_path: Path) -> None:
    found = rows_of(tmp_path, ops=("rms_norm",), directions=("forward",), contenders=("liger-kernel",))
    assert found["rms_norm", "liger-kernel"].status == "missing"
    assert found["rms_norm", "liger-kernel"].note == "liger-kernel runs on cuda"
    on_gpu = {
        c.name: c.missing for c in contenders_of(WORKLOADS["rms_norm"], torch.device("cuda"), torch.float32)
    }
    assert on_gpu["liger-kernel"] == "not installed: pip install liger-kernel"
    flash = {
        c.name: c.missing for c in contenders_of(WORKLOADS["attention"], torch.device("cuda"), torch.float32)
    }
    assert flash["flash-attn"] == "flash-attn runs in bfloat16 and float16"


def test_resume_skips_what_is_there(
    tiny_shapes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"contenders": ("native",), "directions": ("forward",), "run": "r"}
    path = run_ops(OpsArgs(out=tmp_path, ops=("gelu",), **QUICK, **options))
    before = read(path)
    with pytest.raises(InputError, match="give another --run, or --resume"):
        run_ops(OpsArgs(out=tmp_path, ops=("gelu",), **QUICK, **options))
    del options["run"]  # the newest
    run_ops(OpsArgs(out=tmp_path, ops=("gelu", "rms_norm"), resume=True, **QUICK, **options))
    rows = read(path)
    assert rows[: len(before)] == before
    assert [row.operation for row in rows[len(before) :]] == ["rms_norm"] * 2


def test_the_budget_leaves_out_what_does_not_fit(
    tiny_shapes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_ops(OpsArgs(out=tmp_path, ops=("gelu",), budget=0.0, run="r", **QUICK))
    assert not path.exists()
    out = capsys.readouterr().out
    assert "3 of 3 cases did not fit into 0 s, such as gelu both float32 B=1 T=8 C=32" in out
    assert "--resume --run r" in out


def test_a_case_that_would_eat_the_budget_comes_last(
    tiny_shapes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first by importance takes 3 of 10 seconds, as guessed: the others go before it."""
    monkeypatch.setattr(ops._Suite, "_guess", lambda suite, case: 3.0 * (case.workload.operation == "gelu"))
    options = {"contenders": ("native",), "directions": ("forward",), "budget": 10.0}
    path = run_ops(OpsArgs(out=tmp_path, ops=("gelu", "rms_norm"), **QUICK, **options))
    assert [row.operation for row in read(path)] == ["rms_norm", "rms_norm", "gelu", "gelu"]


@pytest.mark.parametrize(("budget", "first"), [(1000.0, "ok"), (20.0, "missing")])
def test_every_case_comes_before_compiling(
    tiny_shapes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float, first: str
) -> None:
    """Of 20 seconds two cases of 9, as guessed, leave too few to compile the first, and then enough."""
    monkeypatch.setattr(ops._Suite, "_guess", lambda suite, case: 9.0)
    monkeypatch.setattr(ops, "LARGE", 1.0)
    options = {"ops": ("gelu", "rms_norm"), "directions": ("forward",), "contenders": ("native", "compile")}
    rows = rows_of(tmp_path, **options, budget=budget, every_case=True)
    compiled = {operation: row.status for (operation, name), row in rows.items() if name == "compile"}
    assert compiled == {"gelu": first, "rms_norm": "ok"}
    assert all(row.status == "ok" for (_, name), row in rows.items() if name != "compile")
    assert (rows["gelu", "compile"].note == ops.NO_TIME) == (first == "missing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": ("gelo",)}, "ops = 'gelo': choose from attention, "),
        ({"dtypes": ("float8",)}, "dtypes = 'float8': choose from float32, "),
        ({"directions": ("sideways",)}, "directions = 'sideways': choose from both, forward, backward"),
        ({"shapes": "huge"}, "shapes = 'huge': it must be one of quick, cpu, gpt2, all"),
        ({"contenders": ("nativ",)}, "contenders = 'nativ': choose from apex, .*native"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_ops(OpsArgs(out=tmp_path, device="cpu", **options))


def test_every_operation_has_a_workload() -> None:
    assert set(WORKLOADS) == {row.operation for row in public.table() if row.name == "eager"}


def test_shapes_are_gpt2s() -> None:
    found = {(s.B, s.T, s.C, s.H) for s in cases.shapes_of("all", CPU)}
    assert {(1, 64, 768, 12), (64, 1024, 1600, 25), (8, 8192, 1280, 20), (8, 1024, 1024, 16)} <= found
    assert len(found) == 4 * 9
    assert all(s.C % s.H == 0 for s in cases.shapes_of("all", CPU))


def test_most_important_cases_come_first_and_once() -> None:
    found = list(cases_of(OpsArgs(shapes="all"), torch.device("cuda")))
    assert len({str(case) for case in found}) == len(found)
    first = found[: len(WORKLOADS)]
    assert [case.workload.operation for case in first] == list(WORKLOADS)
    assert {(case.dtype_name, case.sizes.B, case.sizes.T) for case in first} == {("bfloat16", 8, 1024)}
    # A step of the optimizer does not depend on the batch: one for each model and dtype.
    assert len([case for case in found if case.workload.operation == "adamw_"]) == 4 * 2


def test_parameters_are_those_of_the_model() -> None:
    model = GPT(GPTConfig(vocab_size=128, block_size=1024, n_layer=2, n_head=2, n_embd=32))
    sizes = Sizes(B=1, T=16, C=32, H=2, L=2, V=model.transformer.wte.weight.shape[0])
    expected = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(parameter_shapes(sizes)) == expected


def test_costs_and_memory_add_up() -> None:
    workload = WORKLOADS["layer_norm"]
    parts = [cost_of(workload, TINY, torch.float32, direction) for direction in ("forward", "backward")]
    assert cost_of(workload, TINY, torch.float32, "both") == parts[0] + parts[1]
    x, w = 4 * 8 * 32, 4 * 32
    assert least_bytes(workload, TINY, torch.float32, "forward") == 2 * x + 2 * w
    assert least_bytes(workload, TINY, torch.float32, "both") == 4 * x + 4 * w
    assert directions(WORKLOADS["adamw_"]) == ("forward",)
    assert ops.limit_us("AMD EPYC", torch.float32, 1, 1) is None
    h100 = ops.limit_us("NVIDIA H100 80GB HBM3", torch.bfloat16, 10**12, 1)
    assert h100 == pytest.approx(1e12 / 989e12 * 1e6, rel=0.01)
    assert Cost(1, 1) + Cost(1, 1) == Cost(2, 2)


def test_a_lost_gpu_ends_the_run_with_what_to_do(
    tmp_path: Path, tiny_shapes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    suite = ops._Suite(OpsArgs(out=tmp_path, run="r", **QUICK), CPU)
    suite._require_usable_device()
    suite.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(InputError, match="illegal memory access.*go on after it with --resume --run r"):
        suite._require_usable_device()


def test_backends_without_a_kernel_are_missing(tmp_path: Path) -> None:
    suite = ops._Suite(OpsArgs(out=tmp_path, run="r", **QUICK), CPU)
    case = Case(WORKLOADS["attention"], torch.float32, TINY, "both")
    row = suite._failed(case, "sdpa-cudnn", RuntimeError("No available kernel. Aborting execution."))
    assert row.status == "missing"
    assert suite._failed(case, "sdpa-cudnn", RuntimeError("other")).status == "failed"


@pytest.mark.slow
def test_the_compiled_reference_is_timed_and_its_compilation_too(tiny_shapes: None, tmp_path: Path) -> None:
    """In every case, however often one function may be compiled. Slow: it compiles C++."""
    with torch._dynamo.config.patch(recompile_limit=1):
        found = rows_of(tmp_path, ops=("gelu", "rms_norm"), directions=("both",), contenders=("compile",))
    for operation in ("gelu", "rms_norm"):
        row = found[operation, "compile"]
        assert row.status == "ok"
        assert row.compile_s is not None and row.compile_s > 0.1
        assert found[operation, "eager"].compile_s is None


def test_contenders_have_one_name_each() -> None:
    for workload in WORKLOADS.values():
        names = [c.name for c in contenders_of(workload, CPU, torch.float32)]
        assert len(set(names)) == len(names)
        assert names[0] == contenders.EAGER
        assert isinstance(contenders_of(workload, CPU, torch.float32)[0], Contender)
