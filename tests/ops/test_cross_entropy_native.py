"""What is special to the native and the emulated kernels of both cross-entropies: whose memory the gradient
is in, targets that only a kernel checks, threads, and what the linear form allocates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import cross_entropy, linear_cross_entropy

from .guard import guarded
from .helpers import assert_accurate
from .losses import IGNORE, run, some_targets

CPU = torch.device("cpu")
ROWS = [
    row
    for row in ops.table()
    if row.operation == "cross_entropy" and row.name in ("native", "emulated") and row.missing(CPU) is None
]
rows = pytest.mark.parametrize("backend", [row.name for row in ROWS])
native = pytest.mark.skipif("native" not in [row.name for row in ROWS], reason="not built here")


def operator(backend: str, name: str) -> Any:
    return getattr(getattr(torch.ops, f"fastgpt_{backend}"), name)


def forward(
    backend: str, logits: Tensor, targets: Tensor, size: int, *, with_gradient: bool = True
) -> list[Tensor]:
    options = IGNORE, 0.1, 0.01, "none", size, with_gradient
    return list(operator(backend, "cross_entropy_forward")(logits, targets, *options))


@rows
def test_the_first_backward_gets_what_forward_made(backend: str) -> None:
    logits = torch.randn(5, 57, requires_grad=True)
    loss, _, made = forward(backend, logits, some_targets(5, 57), 57)
    grads = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for _ in range(3)]
    assert grads[0].data_ptr() == made.data_ptr()
    assert len({grad.data_ptr() for grad in grads}) == 3
    for grad in grads:
        assert torch.equal(grad, grads[0])


@rows
def test_a_stand_in_for_a_tensor_is_not_written_into(backend: str) -> None:
    """Backward gets a buffer of its own, and is told that there is nothing in it."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "cross_entropy_backward" in str(func):
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    for mode, filled in ((FakeTensorMode(), False), (torch.enable_grad(), True)):
        with mode, Watch():
            logits = torch.randn(5, 57, requires_grad=True)
            loss, _, _ = forward(backend, logits, torch.zeros(5, dtype=torch.int64), 57)
            torch.autograd.grad(loss.sum(), logits)
        assert seen.pop() == filled


# Either side of the columns that count, inside the padding, and what would overflow an offset.
outside = pytest.mark.parametrize("target", [-1, 50, 56, 57, 2**40, -(2**62)])


@rows
@outside
def test_targets_out_of_range(target: int, backend: str) -> None:
    """An error on a CPU; from a CUDA kernel, which that would make wait, NaN in the row. Nothing is read."""
    logits, targets = torch.randn(3, 57), torch.tensor([1, target, 3])
    x, w = torch.randn(3, 4), torch.randn(57, 4)
    if backend == "native":
        message = f"targets holds {target}: it must be 0 to 49 or ignore_index = -100"
        with pytest.raises(InputError, match=message):
            cross_entropy(logits, targets, vocab_size=50, backend=backend)
        with pytest.raises(InputError, match=message):
            linear_cross_entropy(x, w, targets, vocab_size=50, backend=backend)
    else:
        loss, _, dlogits = forward(backend, logits, targets, 50)
        assert loss.isnan().tolist() == [False, True, False]
        assert dlogits.isnan().any(-1).tolist() == [False, True, False]
        assert linear_cross_entropy(x, w, targets, vocab_size=50, backend=backend).isnan()
    with guarded() as guard:  # backward does not look again whether targets are in range
        dlogits = torch.empty(3, 57)
        operator(backend, "cross_entropy_backward")(
            *(dlogits, torch.ones(3), guard.place(logits), guard.place(targets), torch.empty(0)),
            *(IGNORE, 0.1, 0.01, 50, False),
        )
    assert dlogits[1, :50].isnan().all()
    assert (dlogits[:, 50:] == 0).all()
    assert not dlogits[[0, 2]].isnan().any()


@rows
def test_dlogits_of_another_layout_are_refused(backend: str) -> None:
    logits = torch.randn(5, 57)
    for dlogits in (torch.empty(57, 5).T, torch.empty(5, 57, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="dlogits must be contiguous and have the dtype of logits"):
            operator(backend, "cross_entropy_backward")(
                *(dlogits, torch.tensor(0.5), logits, some_targets(5, 57), torch.empty(0)),
                *(IGNORE, 0.0, 0.0, 57, False),
            )


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_gives_the_same_bits_wherever_it_lies(dtype: torch.dtype, backend: str) -> None:
    """At any multiple of its elements' size, and as row of any number of them."""
    row, target = torch.randn(600).to(dtype), torch.tensor([7])
    want: list[Tensor] = []
    for offset in range(17):
        base = torch.zeros(offset + 600, dtype=dtype)
        base[offset:] = row
        loss, grad = run(cross_entropy, [base[offset:].view(1, 600), target], 0.3, backend, reduction="sum")
        want = want or [loss, grad]
        assert torch.equal(loss, want[0])
        assert torch.equal(grad, want[1])


@rows
def test_mean_of_rows_that_do_not_count_is_over_the_others(backend: str) -> None:
    """More rows than a block of the second stage has threads."""
    logits, targets = torch.randn(2500, 3), torch.arange(2500) % 3
    targets[::7] = IGNORE
    losses = cross_entropy(logits, targets, reduction="none", backend=backend)
    want = losses.double().sum() / (targets != IGNORE).sum()
    torch.testing.assert_close(
        cross_entropy(logits, targets, backend=backend).double(), want, rtol=1e-6, atol=0
    )


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_do_not_change_the_result(dtype: torch.dtype, threads: None) -> None:
    """Rows that are worth a thread each, and numbers of threads that do not divide theirs."""
    logits, targets = (3 * torch.randn(17, 9001)).to(dtype), some_targets(17, 9000)
    options = {"vocab_size": 9000, "label_smoothing": 0.1, "z_loss": 0.01}
    want = run(cross_entropy, [logits, targets], 0.3, "native", **options)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        got = run(cross_entropy, [logits, targets], 0.3, "native", **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_holds_all_the_logits(dtype: torch.dtype) -> None:
    """What is allocated: a quarter of the logits for four chunks, dW in fp32, and less than these."""
    rows, width, columns = 64, 8, 5000
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(columns, width, dtype=dtype)
    x.requires_grad_()
    w.requires_grad_()
    targets = some_targets(rows, columns)
    linear_cross_entropy(x, w, targets, chunk_rows=16, backend="native")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        linear_cross_entropy(x, w, targets, chunk_rows=16, backend="native")
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    chunk = 16 * math.ceil(columns / 64) * 64 * dtype.itemsize
    assert max(sizes) == max(chunk, 4 * columns * width)
    assert sizes.count(chunk) == 1


@native
def test_chunks_that_are_large_products() -> None:
    """Those that another library multiplies than the small ones: their gradients of W add up."""
    x, w = torch.randn(1000, 300) / 300**0.5, torch.randn(700, 300)
    targets = torch.arange(1000) % 690
    found = []
    for backend, dtype in (("eager", torch.float64), ("eager", torch.float32), ("native", torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        loss = linear_cross_entropy(*leaves, targets, chunk_rows=400, vocab_size=690, backend=backend)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for oracle, eager, actual in zip(*found, strict=True):
        assert_accurate(actual, eager, oracle)


MUTANTS = {
    "csrc/cuda/cross_entropy.cuh": [
        (
            "sums.total = sums.total * exp_flushed(sums.top - top) + total;",
            "sums.total += total;",
            "tests/ops/test_table.py -k cross_entropy-emulated",
        ),
        ("known = target >= 0 && target < p.size", "known = target >= 0 && target < p.width"),
    ],
    "csrc/cuda/linear_cross_entropy.cuh": [
        (
            "*count > 0.0f ? factor / *count : 0.0f",
            "factor / *count",
            "tests/ops/test_linear_cross_entropy_kernels.py -k emulated",
        ),
        (
            "values[i] = i < there ? values[i] * factor : 0.0f;",
            "values[i] *= factor;",
            "tests/ops/test_linear_cross_entropy_kernels.py -k emulated",
        ),
    ],
}
