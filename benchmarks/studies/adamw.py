"""A step of AdamW, from one kernel for each operation and tensor to one pass over everything.

    python benchmarks/studies/adamw.py

    g  = clip * grad,  clip = min(1, max_norm / (norm + 1e-6))
    m' = m + (1 - beta1) (g - m)
    v' = beta2 v + (1 - beta2) g^2
    p' = (1 - lr wd) p - lr / (1 - beta1^t) * m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)

and a copy of p' in bf16, which the next forward pass computes with. p, m and v are fp32 and grad is bf16, for
GPT-2's 148 tensors. The least: p, m, v read and written, grad read, the copy written, 28 bytes an element.
docs/optimise/adamw.md tells the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.benchmarks.cases import Sizes, parameter_shapes
from fastgpt.benchmarks.studies.run import main
from fastgpt.benchmarks.studies.study import Prediction, Size, Step, Study
from fastgpt.benchmarks.timing import random_tensor
from fastgpt.inspect.bounds import Work
from fastgpt.inspect.shipped import Call
from fastgpt.kernels.adamw import adamw__forward
from fastgpt.kernels.launch import launch
from fastgpt.ops import adamw as operation

GPT2 = Sizes(B=8, T=1024, C=768, H=12, L=12)
SMALL = Sizes(B=1, T=1, C=8, H=1, L=1, V=70)  # the embedding of positions is what has several chunks
TENSORS = len(parameter_shapes(GPT2))
N = sum(torch.Size(shape).numel() for shape in parameter_shapes(GPT2))
HYPER = [[6e-4, 0.9, 0.95, 1e-8, 0.1]]  # lr, beta1, beta2, eps, weight decay
MAX_NORM = 1.0
BLOCK, WARPS = 1024, 4  # of every kernel here: 8 elements a thread

# Of a tensor, fp32, in this order.
DECAY, STEP_SIZE, ROOT, WEIGHT1, BETA2, WEIGHT2, EPS, CLIP = (tl.constexpr(i) for i in range(8))
COEFFICIENTS = tl.constexpr(8)

Tensors = Sequence[Tensor]
Results = tuple[Tensors, ...]  # params, means, squares, steps and copies as they are afterwards


def inputs(size: Size, device: torch.device) -> list[Any]:
    """params, grads, means, squares, steps, hyper, copies and the norm of the gradients: a step's `state`."""
    shapes = parameter_shapes(GPT2 if size == "gpt2" else SMALL)
    on_cpu = device.type == "cpu"

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [random_tensor(*shape, device=device, dtype=dtype, scale=0.02) for shape in shapes]

    params, means = tensors(torch.float32), tensors(torch.float32)
    grads = tensors(torch.float32 if on_cpu else torch.bfloat16)
    squares = [x.square() for x in means]
    steps = [torch.full((), 10.0, device=device) for _ in shapes]
    hyper = torch.tensor(HYPER, dtype=torch.float64).to(device)
    # Triton's interpreter truncates to bf16 where hardware rounds.
    copy = torch.float16 if on_cpu and size == "small" else torch.bfloat16
    norm = torch.full((), 3.0, device=device)
    return [params, grads, means, squares, steps, hyper, [x.to(copy) for x in params], norm]


def reference(*state: Any) -> Results:
    params, grads, means, squares, steps, hyper, copies, norm = state
    groups = [0] * len(params)
    arguments = (params, grads, means, squares, steps, hyper, groups)
    operation.reference(*arguments, copies=copies, grad_norm=norm, max_grad_norm=MAX_NORM)
    return params, means, squares, steps, copies


# -- what the elements of a tensor share ---------------------------------------------------------------------


@triton.jit
def _prepare_tensor(step_ptr, hyper_ptr, norm_ptr, out_ptr, max_norm):
    """Count the step, and write the coefficients; in fp64, since 1 - beta2 would lose bits in fp32."""
    step = tl.load(step_ptr) + 1.0
    tl.store(step_ptr, step)
    t = step.to(tl.float64)
    lr, beta1, beta2 = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
    clip = tl.div_rn(max_norm, tl.load(norm_ptr) + 1e-6)
    tl.store(out_ptr + DECAY, 1.0 - lr * tl.load(hyper_ptr + 4))
    tl.store(out_ptr + STEP_SIZE, lr / (1.0 - tl.exp(t * tl.log(beta1))))
    tl.store(out_ptr + ROOT, tl.sqrt(1.0 - tl.exp(t * tl.log(beta2))))
    tl.store(out_ptr + WEIGHT1, 1.0 - beta1)
    tl.store(out_ptr + BETA2, beta2)
    tl.store(out_ptr + WEIGHT2, 1.0 - beta2)
    tl.store(out_ptr + EPS, tl.load(hyper_ptr + 3))
    tl.store(out_ptr + CLIP, tl.where(clip > 1.0, 1.0, clip))


@triton.jit
def _prepare_one(step_ptr, hyper_ptr, norm_ptr, out_ptr, max_norm):
    _prepare_tensor(step_ptr, hyper_ptr, norm_ptr, out_ptr, max_norm)


def _coefficients(step: Tensor, hyper: Tensor, norm: Tensor) -> Tensor:
    out = torch.empty(COEFFICIENTS.value, dtype=torch.float32, device=hyper.device)
    launch(_prepare_one, (1,), step, hyper, norm, out, MAX_NORM, num_warps=1)
    return out


# -- 1. an operation at a time -------------------------------------------------------------------------------


@triton.jit
def _at(N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < N


@triton.jit
def _scale(grad_ptr, c_ptr, g_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    tl.store(g_ptr + at, tl.load(grad_ptr + at, mask).to(tl.float32) * tl.load(c_ptr + CLIP), mask)


@triton.jit
def _multiply(x_ptr, c_ptr, N, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask) * tl.load(c_ptr + WHICH), mask)


@triton.jit
def _lerp(m_ptr, g_ptr, c_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    m = tl.load(m_ptr + at, mask)
    tl.store(m_ptr + at, m + (tl.load(g_ptr + at, mask) - m) * tl.load(c_ptr + WEIGHT1), mask)


@triton.jit
def _add_square(v_ptr, g_ptr, c_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    g = tl.load(g_ptr + at, mask)
    tl.store(v_ptr + at, tl.load(v_ptr + at, mask) + g * g * tl.load(c_ptr + WEIGHT2), mask)


@triton.jit
def _square_root(v_ptr, d_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    tl.store(d_ptr + at, tl.sqrt_rn(tl.load(v_ptr + at, mask)), mask)


@triton.jit
def _divide(d_ptr, c_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    d = tl.load(d_ptr + at, mask)
    tl.store(d_ptr + at, tl.div_rn(d, tl.zeros_like(d) + tl.load(c_ptr + ROOT)), mask)


@triton.jit
def _add_eps(d_ptr, c_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    tl.store(d_ptr + at, tl.load(d_ptr + at, mask) + tl.load(c_ptr + EPS), mask)


@triton.jit
def _subtract_ratio(p_ptr, m_ptr, d_ptr, c_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    ratio = tl.div_rn(tl.load(m_ptr + at, mask), tl.load(d_ptr + at, mask))
    tl.store(p_ptr + at, tl.load(p_ptr + at, mask) - tl.load(c_ptr + STEP_SIZE) * ratio, mask)


@triton.jit
def _cast(p_ptr, copy_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    tl.store(copy_ptr + at, tl.load(p_ptr + at, mask), mask)


def _over(kernel: Any, like: Tensor, *args: Any, **constants: Any) -> None:
    """A launch over the elements of a tensor."""
    n = like.numel()
    launch(kernel, (triton.cdiv(n, BLOCK),), *args, n, **constants, BLOCK=BLOCK, num_warps=WARPS)


def operations(*state: Any) -> Results:
    params, grads, means, squares, steps, hyper, copies, norm = state
    for p, grad, m, v, step, copy in zip(params, grads, means, squares, steps, copies, strict=True):
        c = _coefficients(step, hyper, norm)
        g, d = torch.empty_like(p), torch.empty_like(p)
        _over(_scale, p, grad, c, g)
        _over(_multiply, p, p, c, WHICH=DECAY.value)
        _over(_lerp, p, m, g, c)
        _over(_multiply, p, v, c, WHICH=BETA2.value)
        _over(_add_square, p, v, g, c)
        _over(_square_root, p, v, d)
        _over(_divide, p, d, c)
        _over(_add_eps, p, d, c)
        _over(_subtract_ratio, p, p, m, d, c)
        _over(_cast, p, p, copy)
    return params, means, squares, steps, copies


# -- 2. one kernel for the update of a tensor ----------------------------------------------------------------


@triton.jit
def _update_at(p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, c_ptr, at, mask, SCALED: tl.constexpr):
    """The update of some elements; with SCALED the gradient has been clipped before."""
    g = tl.load(g_ptr + at, mask).to(tl.float32)
    if not SCALED:
        g *= tl.load(c_ptr + CLIP)
    p = tl.load(p_ptr + at, mask) * tl.load(c_ptr + DECAY)
    m = tl.load(m_ptr + at, mask)
    m += (g - m) * tl.load(c_ptr + WEIGHT1)
    v = tl.load(v_ptr + at, mask) * tl.load(c_ptr + BETA2) + g * g * tl.load(c_ptr + WEIGHT2)
    tl.store(m_ptr + at, m, mask)
    tl.store(v_ptr + at, v, mask)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + tl.load(c_ptr + ROOT)) + tl.load(c_ptr + EPS)
    p -= tl.load(c_ptr + STEP_SIZE) * tl.div_rn(m, denominator)
    tl.store(p_ptr + at, p, mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + at, p, mask)


@triton.jit
def _update_one(p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, N, BLOCK: tl.constexpr):
    at, mask = _at(N, BLOCK)
    _update_at(p_ptr, g_ptr, m_ptr, v_ptr, None, c_ptr, at, mask, True)


def tensor_by_tensor(*state: Any) -> Results:
    params, grads, means, squares, steps, hyper, copies, norm = state
    for p, grad, m, v, step, copy in zip(params, grads, means, squares, steps, copies, strict=True):
        c, g = _coefficients(step, hyper, norm), torch.empty_like(p)
        _over(_scale, p, grad, c, g)
        _over(_update_one, p, p, g, m, v, c)
        _over(_cast, p, p, copy)
    return params, means, squares, steps, copies


# -- 3. one launch for all tensors ---------------------------------------------------------------------------

# Columns of the table, int64: addresses, and the number of elements.
PARAM, GRAD, MEAN, SQUARE, STEP, COPY, SCALED_GRAD, NUMEL = (tl.constexpr(i) for i in range(8))
COLUMNS = tl.constexpr(8)


@functools.lru_cache(maxsize=8)
def _table(rows: tuple[tuple[int, ...], ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table, and (tensor, chunk of it) for each program. Both stay while the addresses do."""
    counts = torch.tensor([triton.cdiv(row[NUMEL.value], chunk) for row in rows])
    which = torch.repeat_interleave(counts)
    within = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    return torch.tensor(rows).to(device), torch.stack([which, within], 1).to(device)


def _rows(*columns: Tensors) -> tuple[tuple[int, ...], ...]:
    sizes = [t.numel() for t in columns[0]]
    addresses = [[t.data_ptr() for t in column] for column in columns]
    return tuple(zip(*addresses, sizes, strict=True))


@triton.jit
def _prepare_all(table_ptr, hyper_ptr, norm_ptr, out_ptr, max_norm):
    """A program for each tensor."""
    tensor = tl.program_id(0)
    step_ptr = tl.load(table_ptr + tensor * COLUMNS + STEP).to(tl.pointer_type(tl.float32))
    _prepare_tensor(step_ptr, hyper_ptr, norm_ptr, out_ptr + tensor * COEFFICIENTS, max_norm)


@triton.jit
def _pointer(table_ptr, tensor, column, like_ptr, ALIGNED: tl.constexpr):
    """Where a tensor of the table begins; the type is that of `like_ptr`."""
    pointer = tl.load(table_ptr + tensor * COLUMNS + column).to(like_ptr.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _place(chunks_ptr, table_ptr, BLOCK: tl.constexpr):
    """The tensor that this program has a part of, that part, and which elements of it there are."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + program * 2)
    at = tl.load(chunks_ptr + program * 2 + 1) * BLOCK + tl.arange(0, BLOCK)
    return tensor, at, at < tl.load(table_ptr + tensor * COLUMNS + NUMEL)


@triton.jit
def _scale_all(chunks_ptr, table_ptr, c_ptr, any_grad_ptr, any_ptr, BLOCK: tl.constexpr):
    tensor, at, mask = _place(chunks_ptr, table_ptr, BLOCK)
    grad_ptr = _pointer(table_ptr, tensor, GRAD, any_grad_ptr, False)
    g = tl.load(grad_ptr + at, mask).to(tl.float32) * tl.load(c_ptr + tensor * COEFFICIENTS + CLIP)
    tl.store(_pointer(table_ptr, tensor, SCALED_GRAD, any_ptr, False) + at, g, mask)


@triton.jit
def _update_all(chunks_ptr, table_ptr, c_ptr, any_ptr, BLOCK: tl.constexpr):
    tensor, at, mask = _place(chunks_ptr, table_ptr, BLOCK)
    p_ptr = _pointer(table_ptr, tensor, PARAM, any_ptr, False)
    g_ptr = _pointer(table_ptr, tensor, SCALED_GRAD, any_ptr, False)
    m_ptr = _pointer(table_ptr, tensor, MEAN, any_ptr, False)
    v_ptr = _pointer(table_ptr, tensor, SQUARE, any_ptr, False)
    _update_at(p_ptr, g_ptr, m_ptr, v_ptr, None, c_ptr + tensor * COEFFICIENTS, at, mask, True)


@triton.jit
def _cast_all(chunks_ptr, table_ptr, any_ptr, any_copy_ptr, BLOCK: tl.constexpr):
    tensor, at, mask = _place(chunks_ptr, table_ptr, BLOCK)
    p = tl.load(_pointer(table_ptr, tensor, PARAM, any_ptr, False) + at, mask)
    tl.store(_pointer(table_ptr, tensor, COPY, any_copy_ptr, False) + at, p, mask)


def _prepared(table: Tensor, hyper: Tensor, norm: Tensor) -> Tensor:
    out = torch.empty((len(table), COEFFICIENTS.value), dtype=torch.float32, device=hyper.device)
    launch(_prepare_all, (len(table),), table, hyper, norm, out, MAX_NORM, num_warps=1)
    return out


def all_at_once(*state: Any) -> Results:
    params, grads, means, squares, steps, hyper, copies, norm = state
    scaled = [torch.empty_like(p) for p in params]
    rows = _rows(params, grads, means, squares, steps, copies, scaled)
    table, chunks = _table(rows, BLOCK, hyper.device)
    c, grid, options = _prepared(table, hyper, norm), (len(chunks),), {"BLOCK": BLOCK, "num_warps": WARPS}
    launch(_scale_all, grid, chunks, table, c, grads[0], params[0], **options)
    launch(_update_all, grid, chunks, table, c, params[0], **options)
    launch(_cast_all, grid, chunks, table, params[0], copies[0], **options)
    return params, means, squares, steps, copies


# -- 4 and 5. one pass ---------------------------------------------------------------------------------------


@triton.jit
def _update_in_one_pass(
    chunks_ptr, table_ptr, c_ptr, any_ptr, any_grad_ptr, any_copy_ptr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """With WIDE, addresses are multiples of 16 bytes, sizes of 8 elements: masks end between accesses."""
    tensor, at, mask = _place(chunks_ptr, table_ptr, BLOCK)
    if WIDE:
        mask = at < tl.multiple_of(tl.load(table_ptr + tensor * COLUMNS + NUMEL), 8)
    p_ptr = _pointer(table_ptr, tensor, PARAM, any_ptr, WIDE)
    g_ptr = _pointer(table_ptr, tensor, GRAD, any_grad_ptr, WIDE)
    m_ptr = _pointer(table_ptr, tensor, MEAN, any_ptr, WIDE)
    v_ptr = _pointer(table_ptr, tensor, SQUARE, any_ptr, WIDE)
    copy_ptr = _pointer(table_ptr, tensor, COPY, any_copy_ptr, WIDE)
    _update_at(p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, c_ptr + tensor * COEFFICIENTS, at, mask, False)


def one_pass(*, wide: bool) -> Callable[..., Results]:
    def run(*state: Any) -> Results:
        params, grads, means, squares, steps, hyper, copies, norm = state
        rows = _rows(params, grads, means, squares, steps, copies, params)
        table, chunks = _table(rows, BLOCK, hyper.device)
        launch(
            _update_in_one_pass,
            (len(chunks),),
            *(chunks, table, _prepared(table, hyper, norm), params[0], grads[0], copies[0]),
            WIDE=wide,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        return params, means, squares, steps, copies

    return run


# -- 6. shipped ----------------------------------------------------------------------------------------------


def shipped(kernel: Callable[..., None]) -> Callable[..., Results]:
    """By the kernel that is shipped for a device."""

    def run(*state: Any) -> Results:
        params, grads, means, squares, steps, hyper, copies, norm = state
        options = ([0] * len(params), norm, MAX_NORM, None, None, None)
        kernel(params, grads, means, squares, steps, copies, hyper, *options)
        return params, means, squares, steps, copies

    return run


# -- on a CPU ------------------------------------------------------------------------------------------------


def cpu_torch(**how: bool) -> Callable[..., Results]:
    """`torch.optim.AdamW` in one of its forms, with the clipping before and the copy after it."""
    from torch.optim.adamw import adamw

    def run(*state: Any) -> Results:
        params, grads, means, squares, steps, hyper, copies, norm = state
        lr, beta1, beta2, eps, decay = hyper[0].tolist()
        clip = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        scaled = [grad * clip for grad in grads]
        adamw(
            *(list(params), scaled, list(means), list(squares), [], list(steps)),
            **how,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=decay,
        )
        for copy, p in zip(copies, params, strict=True):
            copy.copy_(p)
        return params, means, squares, steps, copies

    return run


def _native(*args: Any) -> None:
    torch.ops.fastgpt_native.adamw__forward(*args)


# -- the study -----------------------------------------------------------------------------------------------

# Bytes that each kernel reads and writes for an element: what it updates in place counts twice.
BYTES = {
    "_scale": 6,
    "_multiply": 8,
    "_lerp": 12,
    "_add_square": 12,
    "_square_root": 8,
    "_divide": 8,
    "_add_eps": 8,
    "_subtract_ratio": 16,
    "_cast": 6,
    "_update_one": 28,
    "_scale_all": 6,
    "_update_all": 28,
    "_cast_all": 6,
    "_update_in_one_pass": 28,
    "_update": 28,
}


def _work(call: Call) -> Work | None:
    """Of the tensor that a kernel is launched for, or of all where it finds them in a table."""
    moved = BYTES.get(call.name)
    return None if moved is None else Work(bytes=moved * call.arguments().get("N", N))


STUDY = Study(
    name="adamw",
    sizes="the 148 tensors of GPT-2 124M, bf16 with fp32 master weights",
    inputs=inputs,
    reference=reference,
    peers={"torch: foreach": cpu_torch(foreach=True)},
    steps=[
        Step(
            "an operation at a time",
            "for each tensor, ten kernels that each do one elementwise operation, and one for coefficients.",
            Prediction(
                "6 + 8 + 12 + 8 + 12 + 8 + 8 + 8 + 16 + 6 = 92 bytes an element are 11.5 GB; 11 launches for "
                "each of 148 tensors are 1628, 4.9 ms.",
                bytes=92 * N,
                launches=11 * TENSORS,
            ),
            operations,
            cpu_torch(foreach=False, fused=False),
            "torch.optim, an operation at a time",
            work=_work,
        ),
        Step(
            "one kernel for the update of a tensor",
            "what is between the clipped gradient and the new parameter stays in registers.",
            Prediction(
                "6 + 28 + 6 = 40 bytes an element, 5.0 GB: 1.5 ms on an H100. 4 launches a tensor are 592, "
                "1.8 ms. On the CPU, with fp32 gradients, 42 bytes instead of 94.",
                bytes=40 * N,
                launches=4 * TENSORS,
                cpu=2.2,
            ),
            tensor_by_tensor,
            cpu_torch(foreach=False, fused=True),
            "torch.optim, fused",
            work=_work,
        ),
        Step(
            "one launch for all tensors",
            "programs find their part of a tensor in a table: 148 launches of a kernel become one.",
            Prediction(
                "4 launches cost nothing; the 40 bytes are as before: 1.5 ms on an H100.",
                bytes=40 * N,
                launches=4,
            ),
            all_at_once,
            work=_work,
        ),
        Step(
            "one pass",
            "the gradient is clipped where it is read, and the bf16 copy written where the parameter is.",
            Prediction(
                "28 bytes an element instead of 40, 3.5 GB: 1.04 ms on an H100, the least there is.",
                bytes=28 * N,
                launches=2,
            ),
            one_pass(wide=False),
            work=_work,
        ),
        Step(
            "wide accesses",
            "addresses are promised to be multiples of 16 bytes, and sizes of 8 elements.",
            Prediction(
                "a quarter of the memory instructions, but the same bytes, which bind already: no change.",
                bytes=28 * N,
                launches=2,
            ),
            one_pass(wide=True),
            work=_work,
        ),
        Step(
            "four blocks a program",
            "the shipped kernel: a program has 4096 elements of a tensor of any size, which it finds once.",
            Prediction(
                "the same bytes. Two loads that depend on each other, 1.4 us, come before the data of a "
                "program: a quarter as many programs wait for them. On the CPU 30 bytes instead of 42.",
                bytes=28 * N,
                launches=2,
                cpu=1.4,
            ),
            shipped(adamw__forward),
            shipped(_native),
            "native, C++",
            work=_work,
        ),
    ],
)

if __name__ == "__main__":
    main(STUDY)
