"""Cross entropy and its gradient, from a kernel for each operation to one that reads and writes a row once.

    python benchmarks/studies/cross_entropy.py

For a row l of V columns of which S count (the others are padding), with target y, and R rows:

    m = max_{c < S} l_c,  t = sum_{c < S} exp(l_c - m)
    loss = mean over rows of (m - l_y) + log t
    dl_c = (exp(l_c - m) / t - [c = y]) / R        0 for c >= S

The least: logits are read once, the gradient is written once. docs/optimise/cross_entropy.md tells the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt import ops
from fastgpt.benchmarks.studies.run import main
from fastgpt.benchmarks.studies.study import Again, Prediction, Size, Step, Study, slices
from fastgpt.benchmarks.timing import random_tensor
from fastgpt.inspect.bounds import Work
from fastgpt.inspect.shipped import Call
from fastgpt.kernels.cross_entropy import count_rows, cross_entropy_forward, sum_losses
from fastgpt.kernels.launch import launch

R, V, S = 8192, 50304, 50257  # 8 sequences of 1024 tokens, GPT-2's vocabulary padded to a multiple of 64
CPU_ROWS = 1024
PASS = 2 * R * V  # bytes of one (R, V) tensor of bf16
IGNORED = -100
NARROW, WIDE = (1024, 4), (8192, 16)  # columns of a block, warps of a program
ROWS_AT_A_TIME = 4  # of CPU forms: 0.8 MB of fp32, which L2 holds

Results = tuple[Tensor, Tensor]  # the mean loss, and its gradient


def inputs(size: Size, device: torch.device) -> list[Any]:
    """logits (R, V), targets (R,) and S."""
    rows, width, counted = (R, V, S) if size == "gpt2" else (6, 9008, 8999)
    if size == "gpt2" and device.type == "cpu":
        rows = CPU_ROWS
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    logits = random_tensor(rows, width, device=device, dtype=dtype, scale=3.0)
    return [logits, torch.randint(counted, (rows,), device=device), counted]


def reference(logits: Tensor, targets: Tensor, S: int) -> Results:
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        loss = ops.cross_entropy(logits, targets, vocab_size=S, backend="eager")
        return loss.detach(), torch.autograd.grad(loss, logits)[0]


# -- 1. an operation, a kernel -------------------------------------------------------------------------------


@triton.jit
def _log_softmax(logits_ptr, logp_ptr, V, S, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * V
    m = -float("inf")
    for start in range(0, S, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row + cols, cols < S, other=-float("inf")).to(tl.float32)
        m = tl.maximum(m, tl.max(x, 0))
    t = 0.0
    for start in range(0, S, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row + cols, cols < S, other=-float("inf")).to(tl.float32)
        t += tl.sum(tl.exp(x - m), 0)
    log_t = tl.log(t)
    for start in range(0, S, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row + cols, cols < S, other=-float("inf")).to(tl.float32)
        tl.store(logp_ptr + row + cols, (x - m) - log_t, cols < S)


@triton.jit
def _pick(logp_ptr, targets_ptr, loss_ptr, V):
    row = tl.program_id(0).to(tl.int64)
    tl.store(loss_ptr + row, -tl.load(logp_ptr + row * V + tl.load(targets_ptr + row)))


@triton.jit
def _gradient_of_log_softmax(logp_ptr, targets_ptr, count_ptr, dlogits_ptr, V, S, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets_ptr + row)
    g = 1.0 / tl.load(count_ptr)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(logp_ptr + row * V + cols, cols < S, other=-float("inf")))
        tl.store(dlogits_ptr + row * V + cols, (p - (cols == y).to(tl.float32)) * g, cols < V)


def operations(logits: Tensor, targets: Tensor, S: int) -> Results:
    rows, width = logits.shape
    block, warps = NARROW
    logp = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    losses, dlogits = logp.new_empty(rows), torch.empty_like(logits)
    count = count_rows(targets, IGNORED)
    launch(_log_softmax, (rows,), logits, logp, width, S, BLOCK=block, num_warps=warps)
    launch(_pick, (rows,), logp, targets, losses, width, num_warps=1)
    loss = sum_losses(losses, count)
    args = (logp, targets, count, dlogits, width, S)
    launch(_gradient_of_log_softmax, (rows,), *args, BLOCK=block, num_warps=warps)
    return loss, dlogits


# -- 2 to 4. maximum and sum are kept, the rest is made again ------------------------------------------------


@triton.jit
def _load(row_ptr, cols, V, S, BOUND_BY_V: tl.constexpr):
    """Logits, -inf from S on. V is a multiple of 16, and so keeps an access with `cols < V` wide."""
    if BOUND_BY_V:
        x = tl.load(row_ptr + cols, cols < V, other=0.0).to(tl.float32)
        x = tl.where(cols < S, x, -float("inf"))
    else:
        x = tl.load(row_ptr + cols, cols < S, other=-float("inf")).to(tl.float32)
    return x


@triton.jit
def _max_and_sum(row_ptr, V, S, BOUND_BY_V: tl.constexpr, ONLINE: tl.constexpr, BLOCK: tl.constexpr):
    m = -3.4028234663852886e38  # finite: -inf - -inf would be NaN
    t = 0.0
    if ONLINE:
        for start in range(0, S, BLOCK):
            x = _load(row_ptr, start + tl.arange(0, BLOCK), V, S, BOUND_BY_V)
            greater = tl.maximum(m, tl.max(x, 0))
            t = t * tl.exp(m - greater) + tl.sum(tl.exp(x - greater), 0)
            m = greater
    else:
        for start in range(0, S, BLOCK):
            m = tl.maximum(m, tl.max(_load(row_ptr, start + tl.arange(0, BLOCK), V, S, BOUND_BY_V), 0))
        for start in range(0, S, BLOCK):
            t += tl.sum(tl.exp(_load(row_ptr, start + tl.arange(0, BLOCK), V, S, BOUND_BY_V) - m), 0)
    return m, t


@triton.jit
def _write_gradient(row_ptr, drow_ptr, y, m, t, g, V, S, BOUND_BY_V: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        p = tl.exp(_load(row_ptr, cols, V, S, BOUND_BY_V) - m) / t
        tl.store(drow_ptr + cols, (p - (cols == y).to(tl.float32)) * g, cols < V)


@triton.jit
def _loss(
    logits_ptr, targets_ptr, loss_ptr, stats_ptr, V, S,
    BOUND_BY_V: tl.constexpr, ONLINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    m, t = _max_and_sum(row_ptr, V, S, BOUND_BY_V, ONLINE, BLOCK)
    l_y = tl.load(row_ptr + tl.load(targets_ptr + row)).to(tl.float32)
    tl.store(loss_ptr + row, (m - l_y) + tl.log(t))
    tl.store(stats_ptr + 2 * row, m)
    tl.store(stats_ptr + 2 * row + 1, t)


@triton.jit
def _gradient(
    logits_ptr, targets_ptr, count_ptr, stats_ptr, dlogits_ptr, V, S,
    BOUND_BY_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    m, t = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
    y, g = tl.load(targets_ptr + row), 1.0 / tl.load(count_ptr)
    _write_gradient(logits_ptr + row * V, dlogits_ptr + row * V, y, m, t, g, V, S, BOUND_BY_V, BLOCK)


def two_kernels(bound_by_v: bool, online: bool) -> Callable[..., Results]:
    def run(logits: Tensor, targets: Tensor, S: int) -> Results:
        rows, width = logits.shape
        block, warps = NARROW
        losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
        stats, dlogits = losses.new_empty(rows, 2), torch.empty_like(logits)
        count = count_rows(targets, IGNORED)
        options = {"BOUND_BY_V": bound_by_v, "BLOCK": block, "num_warps": warps}
        launch(_loss, (rows,), logits, targets, losses, stats, width, S, ONLINE=online, **options)
        loss = sum_losses(losses, count)
        launch(_gradient, (rows,), logits, targets, count, stats, dlogits, width, S, **options)
        return loss, dlogits

    return run


# -- 5 and 6. the gradient in the same kernel ----------------------------------------------------------------


@triton.jit
def _both(
    logits_ptr, targets_ptr, count_ptr, loss_ptr, dlogits_ptr, V, S, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    m, t = _max_and_sum(row_ptr, V, S, True, True, BLOCK)
    y, g = tl.load(targets_ptr + row), 1.0 / tl.load(count_ptr)
    tl.store(loss_ptr + row, (m - tl.load(row_ptr + y).to(tl.float32)) + tl.log(t))
    _write_gradient(row_ptr, dlogits_ptr + row * V, y, m, t, g, V, S, True, BLOCK)


def one_kernel(
    kernel: Any, blocks: Callable[[int], tuple[int, int]], *, grouped: bool = False
) -> Callable[..., Results]:
    """`blocks`: from the columns of a row those of a block, and the warps. `grouped`: by 16 bytes."""

    def run(logits: Tensor, targets: Tensor, S: int) -> Results:
        rows, width = logits.shape
        block, warps = blocks(width)
        losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
        dlogits, count = torch.empty_like(logits), count_rows(targets, IGNORED)
        args = (logits, targets, count, losses, dlogits, width, S)
        group = {"GROUP": 16 // logits.element_size()} if grouped else {}
        launch(kernel, (rows,), *args, BLOCK=block, **group, num_warps=warps)
        return sum_losses(losses, count), dlogits

    return run


# -- 7. a row in registers -----------------------------------------------------------------------------------


@triton.jit
def _row_in_registers(
    logits_ptr, targets_ptr, count_ptr, loss_ptr, dlogits_ptr, V, S, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    cols = tl.arange(0, BLOCK)
    x = _load(row_ptr, cols, V, S, True)
    m = tl.max(x, 0)
    p = tl.exp(x - m)
    t = tl.sum(p, 0)
    y, g = tl.load(targets_ptr + row), 1.0 / tl.load(count_ptr)
    tl.store(loss_ptr + row, (m - tl.load(row_ptr + y).to(tl.float32)) + tl.log(t))
    tl.store(dlogits_ptr + row * V + cols, (p / t - (cols == y).to(tl.float32)) * g, cols < V)


# -- 8. a maximum for each lane ------------------------------------------------------------------------------


@triton.jit
def _add_block(row_ptr, cols, V, S, top, total, MASKED: tl.constexpr):
    """Take a block into each lane's maximum and sum."""
    if MASKED:
        x = _load(row_ptr, cols, V, S, True)
    else:
        x = tl.load(row_ptr + cols).to(tl.float32)
    greater = tl.maximum(top, tl.max(x, 1))
    total = total * tl.exp2((top - greater) * 1.4426950408889634)
    total += tl.sum(tl.exp2((x - greater[:, None]) * 1.4426950408889634), 1)
    return greater, total


@triton.jit
def _lanes(
    logits_ptr, targets_ptr, count_ptr, loss_ptr, dlogits_ptr, V, S, BLOCK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """m and t of the 16 bytes that a thread loads at once: lanes meet once, at the end of the row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    within = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    top = tl.full([BLOCK // GROUP], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    full = S // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        top, total = _add_block(row_ptr, start + within, V, S, top, total, False)
    for start in range(full, S, BLOCK):
        top, total = _add_block(row_ptr, start + within, V, S, top, total, True)
    m = tl.max(top, 0)
    t = tl.sum(total * tl.exp2((top - m) * 1.4426950408889634), 0)
    y, g = tl.load(targets_ptr + row), 1.0 / tl.load(count_ptr)
    l_y = tl.load(row_ptr + y).to(tl.float32)
    tl.store(loss_ptr + row, (m - l_y) + tl.log(t))
    scale = g / t
    for start in range(0, full, BLOCK):
        dl = tl.exp2((tl.load(row_ptr + start + within).to(tl.float32) - m) * 1.4426950408889634) * scale
        if (y >= start) & (y < start + BLOCK):  # one block of the row
            dl = tl.where(start + within == y, dl - g, dl)
        tl.store(dlogits_ptr + row * V + start + within, dl)
    for start in range(full, V, BLOCK):
        cols = start + within
        dl = tl.exp2((_load(row_ptr, cols, V, S, True) - m) * 1.4426950408889634) * scale
        dl = tl.where(cols == y, dl - g, dl)
        tl.store(dlogits_ptr + row * V + cols, dl, cols < V)


# -- 9 -------------------------------------------------------------------------------------------------------


def shipped(logits: Tensor, targets: Tensor, S: int) -> Results:
    loss, _, dlogits = cross_entropy_forward(logits, targets, IGNORED, 0.0, 0.0, "mean", S, True)
    return loss, dlogits


# -- on a CPU ------------------------------------------------------------------------------------------------


def cpu_two_sweeps(logits: Tensor, targets: Tensor, S: int) -> Results:
    """lse by few rows at a time, then the gradient by few rows at a time: no log-probabilities of all."""
    lse = torch.empty(len(logits))
    for rows in slices(len(logits), ROWS_AT_A_TIME):
        lse[rows] = logits[rows, :S].logsumexp(1)
    dlogits = torch.zeros_like(logits)
    for rows in slices(len(logits), ROWS_AT_A_TIME):
        _cpu_gradient(logits[rows, :S], targets[rows], lse[rows], dlogits[rows, :S], len(logits))
    return (lse - logits.gather(1, targets[:, None])[:, 0]).mean(), dlogits


def cpu_one_sweep(logits: Tensor, targets: Tensor, S: int) -> Results:
    """The gradient of few rows while they are in the cache."""
    lse = torch.empty(len(logits))
    dlogits = torch.empty_like(logits)
    dlogits[:, S:] = 0.0
    for rows in slices(len(logits), ROWS_AT_A_TIME):
        lse[rows] = logits[rows, :S].logsumexp(1)
        _cpu_gradient(logits[rows, :S], targets[rows], lse[rows], dlogits[rows, :S], len(logits))
    return (lse - logits.gather(1, targets[:, None])[:, 0]).mean(), dlogits


def _cpu_gradient(x: Tensor, targets: Tensor, lse: Tensor, dx: Tensor, rows: int) -> None:
    torch.sub(x, lse[:, None], out=dx).exp_()
    dx.scatter_add_(1, targets[:, None], torch.full((len(x), 1), -1.0))
    dx /= rows


def cpu_shipped(logits: Tensor, targets: Tensor, S: int) -> Results:
    loss, _, dlogits = torch.ops.fastgpt_native.cross_entropy_forward(
        logits, targets, IGNORED, 0.0, 0.0, "mean", S, True
    )
    return loss, dlogits


# -- the study -----------------------------------------------------------------------------------------------


def _work(call: Call) -> Work | None:
    """Of `_pick`, one log-probability a row, a sector of 32 bytes; of others every tensor once."""
    return Work(bytes=R * (32 + 8 + 4)) if call.kernel is _pick else None


def _again(call: Call) -> Again | None:
    """The looks at a row beyond the first: two, one, or none."""
    given = call.arguments()
    looks = 0 if given.get("ONLINE") else _LATER_LOOKS.get(call.name, 0)
    return Again(held=2 * V, bytes=looks * PASS) if looks else None


_LATER_LOOKS = {"_log_softmax": 2, "_loss": 1, "_both": 1, "_lanes": 1, "_row": 1}


def _step(name: str, change: str, prediction: Prediction, run: Any, cpu: Any = None, form: str = "") -> Step:
    return Step(name, change, prediction, run, cpu, form, work=_work, again=_again, aside=("_count", "_sum"))


STUDY = Study(
    name="cross_entropy",
    sizes=f"{R} rows of {V} bf16 columns, of which {S} count",
    inputs=inputs,
    reference=reference,
    steps=[
        _step(
            "an operation, a kernel",
            "log-softmax in fp32, the target's entry, and the gradient from the log-probabilities.",
            Prediction(
                "an element is looked at three times for log-softmax (6 bytes), written as fp32 (4), read by "
                "the gradient (4), which is written (2): 16 bytes of 412 million, 6.6 GB.",
                bytes=8 * PASS,
                launches=5,
            ),
            operations,
            reference,
            "eager PyTorch: all rows at once, and autograd",
        ),
        _step(
            "no log-probabilities",
            "of each row only m and t are kept, and the gradient makes the probabilities again.",
            Prediction(
                "two looks for m and t (4 bytes), one for the gradient (2), which is written (2): 8 bytes, "
                "3.3 GB. On the CPU 9 passes of fp32 over memory become 3.",
                bytes=4 * PASS,
                launches=4,
                cpu=3.0,
            ),
            two_kernels(bound_by_v=False, online=False),
            cpu_two_sweeps,
            f"logsumexp, then the gradient, {ROWS_AT_A_TIME} rows at a time",
        ),
        _step(
            "loads of 16 bytes",
            f"accesses are bounded by {V}, a multiple of 16, and what is beyond {S} is replaced after the "
            "load: a mask that may end anywhere made each load one of 2 bytes.",
            Prediction(
                "the same bytes by an eighth of the load instructions. Memory binds before and after, so no "
                "time is saved.",
                bytes=4 * PASS,
                launches=4,
            ),
            two_kernels(bound_by_v=True, online=False),
        ),
        _step(
            "m and t in one look",
            "online softmax: where a block has a greater maximum, the sum so far is scaled down to it.",
            Prediction(
                "one look less: 6 bytes an element, 2.5 GB, for one exponential more in a block.",
                bytes=3 * PASS,
                launches=4,
            ),
            two_kernels(bound_by_v=True, online=True),
        ),
        _step(
            "the gradient in the same kernel",
            "a program goes through its row again as soon as it has m and t, and writes the gradient for an "
            "upstream gradient of 1.",
            Prediction(
                "the second look finds the row in L2: 4 bytes an element, 1.6 GB, the least there is. On the "
                "CPU 3 passes become 2.",
                bytes=2 * PASS,
                launches=3,
                cpu=1.5,
            ),
            one_kernel(_both, lambda width: NARROW),
            cpu_one_sweep,
            f"both, {ROWS_AT_A_TIME} rows at a time",
        ),
        _step(
            "fewer rows at a time",
            "programs of 16 warps and blocks of 8192 columns: an SM has two to four rows under way instead "
            "of 16.",
            Prediction(
                "4 rows of 100 KB in each of an H100's 132 SMs would be 53 MB and too much for its 50 MB of "
                "L2, but at 16 elements a thread registers leave room for 2 or 3: 1.6 GB.",
                bytes=2 * PASS,
                launches=3,
            ),
            one_kernel(_both, lambda width: WIDE),
        ),
        _step(
            "a row in registers",
            "no second look at all: 32 warps hold the row.",
            Prediction(
                "the same 1.6 GB, and no loop. But 50304 columns are a block of 65536, 64 fp32 numbers for "
                "each of 1024 threads, which have 64 registers each: they spill.",
                bytes=2 * PASS,
                launches=3,
            ),
            one_kernel(_row_in_registers, lambda width: (triton.next_power_of_2(width), 32)),
        ),
        _step(
            "a maximum for each lane",
            "back to blocks of 8192, with m and t for each 16 bytes that a thread loads, which meet at the "
            "end of the row; exp2; a mask in the last block alone.",
            Prediction(
                "no exchange between warps in the loop, and about half of the instructions. The bytes stay: "
                "this counts where memory is fast, on a B200, where 1.6 GB take 206 us.",
                bytes=2 * PASS,
                launches=3,
            ),
            one_kernel(_lanes, lambda width: WIDE, grouped=True),
        ),
        _step(
            "the second look in reverse",
            "the shipped kernel: the blocks that were read last come first; on a B200 half the block and at "
            "most 48 registers, for five programs an SM; label smoothing, z-loss, ignored rows.",
            Prediction(
                "the same bytes and times: what it adds is compiled out or done once a row. On the CPU, C++ "
                "goes through blocks that L1 holds, without a tensor for each operation: twice as fast.",
                bytes=2 * PASS,
                launches=3,
                cpu=2.0,
            ),
            shipped,
            cpu_shipped,
            "native, C++",
        ),
    ],
)

if __name__ == "__main__":
    main(STUDY)
