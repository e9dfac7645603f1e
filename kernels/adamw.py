"""AdamW over many tensors in one launch, and the norm of their gradients.

For a tensor in group j at its step t, in fp32:

    s  = clip / grad_scale,  clip = min(1, max_norm / (norm / grad_scale + 1e-6))
    g  = s * grad
    m' = m + (1 - beta1) (g - m)
    v' = beta2 v + (1 - beta2) g^2
    p' = (1 - lr wd) p - lr / (1 - beta1^t) * m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)

    norm = sqrt(sum over all elements of grad^2)

and nothing at all, not even t, where found_inf is not 0. Every operation is rounded on its own and in
PyTorch's order. beta^t is taken in fp64: 1 - beta2 = 0.001 at t = 1 would keep 16 bits of fp32's 24.

Bytes an element: p, m, v read and written and grad read, 28 in fp32; with bf16 gradients and the bf16 copy of
fp32 master weights 28 too (4 and 4 for p, 16 for m and v, 2 for grad, 2 for the copy). The norm reads grad.

Launch: tensors are cut into chunks of CHUNK elements, one program each, whatever tensor they are of. A table
on the device says where each tensor is, a list of chunks which part of which tensor a program has; both are
built when the tensors or their places change, and reused while they stay. Before it, `_prepare` computes what
the elements of a tensor share, in fp64, a thread for each tensor, and counts the step: hyperparameters,
steps, norm, scale and found_inf are read on the device, and the host never waits.

Stochastic rounding: fp32 bits plus 16 random bits, cut to bf16, is the lower neighbour or the upper one with
the probabilities that make the mean exact. Philox with the chunk and the place in it as its counter: four
words, one for each of the PARTS of a chunk.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.kernels.examples import Example, meta
from fastgpt.kernels.launch import launch

# 4 warps x 8 elements: one 16-byte load a thread of bf16, two of fp32, 10 to 16 KB in flight a program. By
# their registers an SM holds 9 programs, 5 with master weights and 3 with random rounding: 30 KB or more,
# enough but for a B200 (see layer_norm.py). Four parts share the loads that find the tensor, and a Philox.
BLOCK, WARPS = 1024, 4
PARTS = tl.constexpr(4)
CHUNK = BLOCK * PARTS.value
TENSORS = 128  # a program of _prepare: a thread for each
SUM_BLOCK = 1024
ALIGNMENT = 16  # bytes of the widest access

# Columns of the table, int64: addresses, the number of elements, and the row of hyperparameters.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP, COPY, NUMEL, GROUP = (tl.constexpr(i) for i in range(8))
COLUMNS = tl.constexpr(8)
HYPER = tl.constexpr(5)  # columns of hyper, fp64: lr, beta1, beta2, eps, weight decay
DECAY, STEP_SIZE, ROOT, WEIGHT1, BETA2, WEIGHT2, EPS, SCALE = (tl.constexpr(i) for i in range(8))
COEFFICIENTS = tl.constexpr(8)  # of a tensor, fp32


@triton.jit
def _prepare(
    table_ptr,
    hyper_ptr,
    coefficients_ptr,
    norm_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    max_norm,
    N,
    TENSORS: tl.constexpr,
):
    tensors = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    mask = tensors < N
    row_ptr = table_ptr + tensors * COLUMNS
    step_ptr = tl.load(row_ptr + STEP, mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask, other=0.0)
    if found_inf_ptr is None:
        step += 1.0
    else:
        step += tl.where(tl.load(found_inf_ptr) == 0.0, 1.0, 0.0)
    tl.store(step_ptr, step, mask)

    scale = 1.0
    if grad_scale_ptr is not None:
        scale = tl.div_rn(1.0, tl.load(grad_scale_ptr))
    if norm_ptr is not None:
        clip = tl.div_rn(max_norm, tl.load(norm_ptr) * scale + 1e-6)
        scale *= tl.where(clip > 1.0, 1.0, clip)  # a NaN stays

    t = step.to(tl.float64)
    group_ptr = hyper_ptr + tl.load(row_ptr + GROUP, mask, other=0) * HYPER
    lr = tl.load(group_ptr, mask, other=0.0)
    beta1 = tl.load(group_ptr + 1, mask, other=0.5)
    beta2 = tl.load(group_ptr + 2, mask, other=0.5)
    eps = tl.load(group_ptr + 3, mask, other=0.0)
    decay = tl.load(group_ptr + 4, mask, other=0.0)
    correction1 = 1.0 - tl.exp(t * tl.log(beta1))
    correction2 = 1.0 - tl.exp(t * tl.log(beta2))
    out_ptr = coefficients_ptr + tensors * COEFFICIENTS
    tl.store(out_ptr + DECAY, 1.0 - lr * decay, mask)
    tl.store(out_ptr + STEP_SIZE, lr / correction1, mask)
    tl.store(out_ptr + ROOT, tl.sqrt(correction2), mask)
    tl.store(out_ptr + WEIGHT1, 1.0 - beta1, mask)
    tl.store(out_ptr + BETA2, beta2, mask)
    tl.store(out_ptr + WEIGHT2, 1.0 - beta2, mask)
    tl.store(out_ptr + EPS, eps, mask)
    tl.store(out_ptr + SCALE, tl.zeros([TENSORS], tl.float32) + scale, mask)


@triton.jit
def _pointer(table_ptr, tensor, column, like_ptr, ALIGNED: tl.constexpr):
    """Where a tensor of the table begins, as a pointer of the type of `like_ptr`."""
    pointer = tl.load(table_ptr + tensor * COLUMNS + column).to(like_ptr.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _update_part(pointers, copy_ptr, at, mask, coefficients, bits):
    """Elements `at` of a tensor; bits are random ones for stochastic rounding, or None."""
    p_ptr, g_ptr, m_ptr, v_ptr = pointers
    decay, step_size, root, weight1, beta2, weight2, eps, scale = coefficients
    g = tl.load(g_ptr + at, mask).to(tl.float32) * scale
    p = tl.load(p_ptr + at, mask).to(tl.float32) * decay
    m = tl.load(m_ptr + at, mask)
    v = tl.load(v_ptr + at, mask)
    m += (g - m) * weight1
    v = v * beta2 + g * g * weight2
    tl.store(m_ptr + at, m, mask)
    tl.store(v_ptr + at, v, mask)
    # Correctly rounded: the approximations would flush small v to 0, and memory is slower than these.
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root) + eps
    p -= step_size * tl.div_rn(m, denominator)
    if bits is None:
        tl.store(p_ptr + at, p, mask)
        if copy_ptr is not None:
            tl.store(copy_ptr + at, p, mask)
    else:
        rounded = ((p.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) >> 16).to(tl.uint16)
        rounded = rounded.to(tl.bfloat16, bitcast=True)
        tl.store(p_ptr + at, tl.where(p == p, rounded, p.to(tl.bfloat16)), mask)  # a NaN might wrap around


@triton.jit
def _update(
    chunks_ptr,
    table_ptr,
    coefficients_ptr,
    found_inf_ptr,
    seed_ptr,
    any_p_ptr,
    any_g_ptr,
    any_m_ptr,
    any_copy_ptr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The any_ pointers are to any tensor of that kind: what counts is the type."""
    if found_inf_ptr is not None:  # noqa: SIM102, the outer `if` is decided when compiling
        if tl.load(found_inf_ptr) != 0.0:
            return
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + program * 2)
    chunk = tl.load(chunks_ptr + program * 2 + 1)
    numel = tl.load(table_ptr + tensor * COLUMNS + NUMEL)
    p_ptr = _pointer(table_ptr, tensor, PARAM, any_p_ptr, ALIGNED)
    g_ptr = _pointer(table_ptr, tensor, GRAD, any_g_ptr, ALIGNED)
    m_ptr = _pointer(table_ptr, tensor, EXP_AVG, any_m_ptr, ALIGNED)
    v_ptr = _pointer(table_ptr, tensor, EXP_AVG_SQ, any_m_ptr, ALIGNED)
    copy_ptr = None
    if any_copy_ptr is not None:
        copy_ptr = _pointer(table_ptr, tensor, COPY, any_copy_ptr, ALIGNED)
    pointers = (p_ptr, g_ptr, m_ptr, v_ptr)
    coefficients_ptr += tensor * COEFFICIENTS
    coefficients = (
        tl.load(coefficients_ptr + DECAY),
        tl.load(coefficients_ptr + STEP_SIZE),
        tl.load(coefficients_ptr + ROOT),
        tl.load(coefficients_ptr + WEIGHT1),
        tl.load(coefficients_ptr + BETA2),
        tl.load(coefficients_ptr + WEIGHT2),
        tl.load(coefficients_ptr + EPS),
        tl.load(coefficients_ptr + SCALE),
    )
    lanes = tl.arange(0, BLOCK)
    if seed_ptr is not None:
        r0, r1, r2, r3 = tl.philox(
            tl.load(seed_ptr), lanes, tl.zeros_like(lanes) + tl.program_id(0), lanes * 0, lanes * 0
        )
    for part in range(PARTS):
        first = (chunk * PARTS + part) * BLOCK
        at = first + lanes
        bits = None
        if seed_ptr is not None:
            bits = tl.where(part < 2, tl.where(part == 0, r0, r1), tl.where(part == 2, r2, r3))
        if first + BLOCK <= numel:  # without a mask, whose edge could be anywhere, accesses are 16 bytes wide
            _update_part(pointers, copy_ptr, at, None, coefficients, bits)
        elif first < numel:
            _update_part(pointers, copy_ptr, at, at < numel, coefficients, bits)


@triton.jit
def _sum_squares(
    chunks_ptr,
    table_ptr,
    partials_ptr,
    any_g_ptr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + program * 2)
    chunk = tl.load(chunks_ptr + program * 2 + 1)
    numel = tl.load(table_ptr + tensor * COLUMNS + NUMEL)
    g_ptr = _pointer(table_ptr, tensor, GRAD, any_g_ptr, ALIGNED)
    sums = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        first = (chunk * PARTS + part) * BLOCK
        at = first + tl.arange(0, BLOCK)
        if first + BLOCK <= numel:
            g = tl.load(g_ptr + at).to(tl.float32)
            sums += g * g
        elif first < numel:
            g = tl.load(g_ptr + at, at < numel, other=0.0).to(tl.float32)
            sums += g * g
    tl.store(partials_ptr + program, tl.sum(sums, 0))


@triton.jit
def _root_of_sum(partials_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """In fp64: a tenth of a millisecond's worth of elements per partial sum, but only thousands of those."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + at, at < N, other=0.0).to(tl.float64)
    tl.store(out_ptr, tl.sqrt(tl.sum(sums, 0)))


class Table(NamedTuple):
    """What the kernels read to find their tensors."""

    rows: Tensor  # (N, COLUMNS) int64
    chunks: Tensor  # (programs, 2) int64: which row, and which chunk of that tensor
    aligned: bool  # every tensor begins at a multiple of ALIGNMENT bytes


_REMEMBERED = 64  # tables: those of a few optimizers, when gradients move between a few places
_tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
_captured: list[Table] = []  # CUDA graphs read these for as long as they live


def _table(columns: dict[int, Sequence[Tensor]], groups: Sequence[int]) -> Table:
    """The table of tensors given by column. It holds addresses and sizes only: while those are the same, so
    is the table, whatever tensors they are of by now."""
    first = next(iter(columns.values()))
    device = first[0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    addresses = {column: tuple(t.data_ptr() for t in tensors) for column, tensors in columns.items()}
    numels = tuple(t.numel() for t in first)
    key = (device, numels, tuple(groups), tuple(addresses.items()))
    if key in _tables:
        _tables.move_to_end(key)
    else:
        if capturing:
            raise InputError(
                "the gradients are not where they were in the step before: take a step before capturing a "
                "CUDA graph, and keep gradients in place, zero_grad(set_to_none=False)"
            )
        _tables[key] = _build(addresses, numels, groups, device)
        if len(_tables) > _REMEMBERED:
            _tables.popitem(last=False)
    if capturing:
        _captured.append(_tables[key])
    return _tables[key]


def _build(
    addresses: dict[int, tuple[int, ...]], numels: Sequence[int], groups: Sequence[int], device: torch.device
) -> Table:
    rows = torch.zeros(len(numels), COLUMNS.value, dtype=torch.int64)
    for column, values in addresses.items():
        rows[:, column] = torch.tensor(values)
    rows[:, NUMEL.value] = torch.tensor(numels)
    rows[:, GROUP.value] = torch.tensor(groups)
    aligned = all(
        value % ALIGNMENT == 0 for c, values in addresses.items() if c != STEP.value for value in values
    )
    return Table(_send(rows, device), _chunks(tuple(numels), device), aligned)


@functools.lru_cache(maxsize=16)
def _chunks(numels: tuple[int, ...], device: torch.device) -> Tensor:
    """The list of chunks, which stays when gradients move."""
    counts = (torch.tensor(numels, dtype=torch.int64) + CHUNK - 1) // CHUNK
    which = torch.repeat_interleave(counts)
    within = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    return _send(torch.stack([which, within], 1), device)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, from pinned memory: then the copy is in the stream and the host does not wait for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill one block of memory, in whatever order."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _same_order(tensor: Tensor, param: Tensor) -> bool:
    return tensor.stride() == param.stride() or (tensor.is_contiguous() and param.is_contiguous())


def _like(tensor: Tensor, param: Tensor) -> Tensor:
    """The same values in the memory order of `param`."""
    if _same_order(tensor, param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def adamw__forward(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor],
    hyper: Tensor,
    groups: Sequence[int],
    grad_norm: Tensor | None,
    max_grad_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> None:
    for i, param in enumerate(params):
        written = (exp_avgs[i], exp_avg_sqs[i], *(copies[i : i + 1]))
        if not _dense(param) or not all(_same_order(t, param) for t in written):
            raise InputError(
                f"params[{i}] has strides {param.stride()}: it must fill one block of memory, and its "
                "moments and copy must have the same strides"
            )
    grads = [_like(grad, param) for grad, param in zip(grads, params, strict=True)]
    columns = {
        PARAM.value: params,
        GRAD.value: grads,
        EXP_AVG.value: exp_avgs,
        EXP_AVG_SQ.value: exp_avg_sqs,
        STEP.value: steps,
    }
    if copies:
        columns[COPY.value] = copies
    table = _table(columns, groups)
    count = len(params)
    coefficients = torch.empty((count, COEFFICIENTS.value), dtype=torch.float32, device=hyper.device)
    launch(
        _prepare,
        (triton.cdiv(count, TENSORS),),
        *(table.rows, hyper, coefficients, grad_norm, grad_scale, found_inf, max_grad_norm, count),
        TENSORS=TENSORS,
        num_warps=TENSORS // 32,
    )
    launch(
        _update,
        (len(table.chunks),),
        *(table.chunks, table.rows, coefficients, found_inf, seed),
        *(params[0], grads[0], exp_avgs[0], copies[0] if copies else None),
        ALIGNED=table.aligned,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def grad_norm_forward(grads: Sequence[Tensor]) -> Tensor:
    grads = [grad if _dense(grad) else grad.contiguous() for grad in grads]
    table = _table({GRAD.value: grads}, [0] * len(grads))
    programs = len(table.chunks)
    partials = torch.empty(programs, dtype=torch.float32, device=grads[0].device)
    out = torch.empty((), dtype=torch.float32, device=grads[0].device)
    launch(
        _sum_squares,
        (programs,),
        *(table.chunks, table.rows, partials, grads[0]),
        ALIGNED=table.aligned,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    launch(_root_of_sum, (1,), partials, out, programs, BLOCK=SUM_BLOCK, num_warps=4)
    return out


def examples() -> Iterator[Example]:
    """fp32 parameters; bf16 training with master weights, clipping and a GradScaler; stochastic rounding."""
    fp32, bf16 = torch.float32, torch.bfloat16
    one, seed = meta(dtype=fp32), meta(1, dtype=torch.int64)
    shape, requires = (50304, 768), ("vector_load", "vector_store", "wide_offsets")
    for name, dtype, grad_dtype, copies, scalar, random in [
        ("fp32", fp32, fp32, [], None, None),
        ("master", fp32, bf16, [meta(*shape)], one, None),
        ("stochastic", bf16, bf16, [], None, seed),
    ]:
        param, grad = meta(*shape, dtype=dtype), meta(*shape, dtype=grad_dtype)
        moment, hyper = meta(*shape, dtype=fp32), meta(2, HYPER.value, dtype=torch.float64)
        step = partial(
            adamw__forward,
            *([param], [grad], [moment], [moment], [one], copies, hyper, [1]),
            *(scalar, 1.0, scalar, scalar, random),
        )
        norm = partial(grad_norm_forward, [grad])
        yield Example(f"adamw-{name}", step, {"_prepare": (), "_update": requires}, every_chip=True)
        yield Example(
            f"grad-norm-{name}", norm, {"_sum_squares": ("vector_load", "wide_offsets")}, name == "fp32"
        )
