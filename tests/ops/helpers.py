"""What the tests of operations share: comparing, and a list of calls that covers every row of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernels_of(operation: str) -> list[str]:
    """The implementations with kernels, all but `eager`, that can run on DEVICE."""
    rows = [row for row in ops.table() if row.operation == operation and row.name != "eager"]
    return [row.name for row in rows if row.missing(DEVICE) is None]


def randn(*shape: int) -> Tensor:
    """Standard normal in float64, recording gradients."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Equal up to float64 rounding: sums of at most hundreds of terms near 1 are off by less than 1e-13."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_accurate(actual: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """The error against the float64 oracle is at most twice PyTorch's in the same dtype, in both norms.

    The floor is one unit in the last place of the largest value, for where PyTorch happens to be exact.

    In float32 the largest error may be four times PyTorch's: it is the luck of one element, and the order of
    PyTorch's sums depends on the processor. Of two equally accurate orders (attention, 9 queries of 40 keys)
    one exceeded 2 and the floor in 3 of 100 draws, and 4 in none of 1200. The 2-norm has no such luck.
    """
    assert actual.shape == oracle.shape
    assert actual.dtype == eager.dtype
    if oracle.numel() == 0:
        return
    wide, torch_wide = actual.double().cpu(), eager.double().cpu()
    assert not wide.isnan().any()
    floor = torch.finfo(actual.dtype).eps
    for norm in (torch.inf, 2):
        size = torch.linalg.vector_norm(oracle, norm)
        error = torch.linalg.vector_norm(wide - oracle, norm)
        factor = 4 if norm == torch.inf and actual.dtype == torch.float32 else 2
        bound = factor * torch.linalg.vector_norm(torch_wide - oracle, norm) + floor * size
        assert error <= bound, f"norm {norm}: error {error:.3e} exceeds {bound:.3e} (size {size:.3e})"


def spread(tensor: Tensor) -> Tensor:
    """The same values with a stride of 2, and poison in the gaps."""
    poison = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return torch.stack([tensor, torch.full_like(tensor, poison)], -1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    """The same values in the opposite order of dimensions: dense, so that `empty_like` keeps that order."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


@dataclass(frozen=True)
class Case:
    """One call of a public function on tensors that `make` makes: float64 or int64, on the CPU."""

    operation: str
    name: str
    call: Callable[..., Any]
    make: Callable[[], Sequence[Tensor]]
    options: dict[str, Any]
    differentiable: bool = True

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        torch.manual_seed(0)
        return [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in self.make()]

    def __call__(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        out = self.call(*inputs, **self.options, backend=backend)
        return list(out) if isinstance(out, tuple) else [out]


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, master: bool = False, backend: str | None = None
) -> tuple[Tensor, ...]:
    """A step of `adamw_`, clipped, on the first row and on the others as two parameters of two groups.

    Returns parameters, moments and with `master` the working copies, which are of the dtype of p.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    hyper = [[1e-2, 0.9, 0.999, 1e-8, 0.1], [3e-3, 0.8, 0.95, 1e-6, 0.0]]

    def parts(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return [part.to(dtype, copy=True).contiguous() for part in (tensor[:1], tensor[1:])]

    written = [parts(p, wide if master else p.dtype), parts(m, wide), parts(v.square(), wide)]
    copies = parts(torch.zeros_like(p), p.dtype) if master else []
    grads = [g[:1], g[1:]]
    steps = [torch.full((), t, device=p.device) for t in (0.0, 4.0)]
    params, exp_avgs, exp_avg_sqs = written
    ops.adamw_(
        *(params, grads, exp_avgs, exp_avg_sqs, steps),
        torch.tensor(hyper, dtype=torch.float64, device=p.device),
        [1, 0],
        copies=copies,
        grad_norm=ops.grad_norm(grads, backend="eager"),
        max_grad_norm=0.5,
        backend=backend,
    )
    return tuple(torch.cat(tensors).detach() for tensors in [*written, copies] if tensors)


def grad_norm(*grads: Tensor, backend: str | None = None) -> Tensor:
    return ops.grad_norm(grads, backend=backend)


def _draw(operation: str, shape: Any) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    if operation == "linear_cross_entropy":
        # Logits are then exact in fp32. Else their rounding, which differs between the matrix products of
        # libraries and machines, is most of the error, and whose is less a matter of luck in so few rows.
        x = (8 * x).round() / 8
    return x


def _case(operation: str, name: str, call: Callable[..., Any], *make: Any, **options: Any) -> Case:
    """`make` holds shapes of normal tensors, or tensors (indices) taken as they are."""
    return Case(
        operation,
        name,
        call,
        lambda: [item if isinstance(item, Tensor) else _draw(operation, item) for item in make],
        options,
        differentiable=operation not in ("adamw_", "grad_norm", "decode_attention"),
    )


def _cases() -> list[Case]:
    cases = []
    # Widths: one element, off every vector width, GPT-2's. Rows: none, one, off every block size.
    for rows, width in [(0, 33), (1, 1), (3, 768), (197, 33)]:
        name = f"{rows}x{width}"
        x, w = (rows, width), (width,)
        cases += [
            _case("layer_norm", name, ops.layer_norm, x, w, w),
            _case("add_layer_norm", name, ops.add_layer_norm, x, x, w, w),
            # At width 1, dx is g * rstd * eps / (x^2 + eps), what is left when two terms cancel: with the
            # usual eps nothing but their rounding errors, in PyTorch too.
            _case("rms_norm", name, ops.rms_norm, x, w, eps=0.1 if width == 1 else 1e-6),
            _case("gelu", name, ops.gelu, x),
            _case("bias_gelu", name, ops.bias_gelu, x, w),
            _case("linear_gelu", name, ops.linear_gelu, x, (7, width), (7,)),
            _case("linear", name, ops.linear, x, (7, width), (7,)),
            _case("dropout_add", name, ops.dropout_add, x, x, p=0.0),
            _case("dropout_add", f"eval-{name}", ops.dropout_add, x, x, p=0.5, training=False),
        ]
    cases += [
        # So small a p drops nothing, and every implementation gives the same; but it is not skipped as 0 is.
        _case("dropout_add", "tiny-p", ops.dropout_add, (7, 900), (7, 900), p=1e-12),
        _case("dropout_add", "eval", ops.dropout_add, (2, 5, 33), (2, 5, 33), p=0.5, training=False),
        _case("layer_norm", "no-bias", ops.layer_norm, (2, 5, 33), (33,), eps=1e-3),
        _case("add_layer_norm", "no-bias", ops.add_layer_norm, (2, 5, 33), (2, 5, 33), (33,), eps=1e-3),
        _case("rms_norm", "eps", ops.rms_norm, (2, 5, 33), (33,), eps=1e-3),
        _case("gelu", "erf", ops.gelu, (2, 5, 33), approximate="none"),
        _case("bias_gelu", "erf", ops.bias_gelu, (2, 5, 33), (33,), approximate="none"),
        _case("linear_gelu", "erf-no-bias", ops.linear_gelu, (2, 5, 33), (9, 33), approximate="none"),
        _case("linear", "no-bias", ops.linear, (2, 5, 33), (9, 33)),
    ]
    # T: either side of a tile of 64 (one key, where q and k have no gradient, has a test of its own).
    # Tq < Tk: decoding, chunked prefill. D: small, 64, no power of 2. A program per head is interpreted: few.
    for b, tq, tk, h, d, window in [
        (0, 3, 3, 2, 16, None),
        (1, 63, 63, 1, 16, None),
        (1, 65, 65, 1, 64, None),
        (1, 17, 17, 2, 80, None),
        (2, 1, 65, 1, 64, None),
        (1, 3, 65, 2, 64, 20),
        (1, 5, 70, 1, 16, None),
        (1, 66, 70, 1, 16, 9),
    ]:
        name = f"{b}-{tq}-{tk}-{h}-{d}-{window}"
        shapes = (b, tq, h, d), (b, tk, h, d), (b, tk, h, d)
        cases.append(_case("attention", name, ops.causal_attention, *shapes, window=window))
    packed = ops.causal_attention_qkvpacked
    cases += [
        _case("attention", "packed", packed, (2, 33, 3, 2, 16)),
        _case("attention", "packed-window", packed, (1, 33, 3, 2, 16), window=4, scale=0.5),
    ]
    # Length: of the whole cache, one less, one; in a share of the keys that ends where it ends.
    for b, s, h, d, length in [
        (0, 3, 2, 16, torch.tensor([2])),
        (2, 65, 1, 64, torch.tensor(65)),
        (1, 65, 2, 80, torch.tensor([64])),
        (1, 300, 1, 16, torch.tensor([257], dtype=torch.int32)),
        (1, 5, 2, 16, torch.tensor([1])),
        (2, 40, 2, 16, torch.tensor([33])),
        (1, 40, 1, 20, torch.tensor([40])),
    ]:
        name = f"{b}-{s}-{h}-{d}-{length.sum()}"
        shapes = (b, 1, h, d), (b, s, h, d), (b, s, h, d)
        cases.append(_case("decode_attention", name, ops.decode_attention, *shapes, length))
    idx = torch.tensor([[3, 0, 3, 10], [3, 5, 5, 9]])
    cases += [
        _case("embedding", "rows-repeated", ops.embedding, idx, (11, 33), (6, 33)),
        _case("embedding", "start", ops.embedding, idx, (11, 33), (6, 33), start=2),
        _case("embedding", "empty", ops.embedding, idx[:0], (11, 33), (6, 33)),
    ]
    targets = torch.arange(6).reshape(2, 3) * 7
    some = targets.clone()
    some[0, 1] = some[1, 2] = -100
    # Longer than a CUDA block takes in three steps: in each of its four groups of copies there is one.
    long = (2, 25008), targets[0, :2]
    cases.append(_case("cross_entropy", "long", ops.cross_entropy, *long, vocab_size=25001))
    options_of: list[tuple[str, Tensor, dict[str, Any]]] = [
        ("plain", targets, {}),
        ("sum", some, {"reduction": "sum"}),
        ("none", some, {"reduction": "none"}),
        ("smooth", some, {"label_smoothing": 0.1}),
        ("z", some, {"z_loss": 0.01}),
        ("padded", some, {"vocab_size": 50, "label_smoothing": 0.1, "z_loss": 0.01}),
    ]
    for name, target, options in options_of:
        cases += [
            _case("cross_entropy", name, ops.cross_entropy, (2, 3, 57), target, **options),
            _case(
                "linear_cross_entropy",
                name,
                ops.linear_cross_entropy,
                (2, 3, 33),
                (57, 33),
                target,
                chunk_rows=4,
                **options,
            ),
        ]
    # Elements: none, off every vector width, more than the chunk of a program and no multiple of it.
    for name, shape in [("empty", (0, 33)), ("master", (5, 1100)), ("rows", (3, 7)), ("one", (1, 1))]:
        cases += [
            _case("adamw_", name, adamw, shape, shape, shape, shape, master=name == "master"),
            _case("grad_norm", name, grad_norm, shape, (5,), (17, 300)),
        ]
    empty = targets[:0]
    cases += [
        _case("cross_entropy", "empty", ops.cross_entropy, (0, 3, 57), empty, reduction="sum"),
        _case(
            "linear_cross_entropy",
            "empty",
            ops.linear_cross_entropy,
            (0, 3, 33),
            (57, 33),
            empty,
            reduction="none",
        ),
    ]
    return cases


CASES = _cases()
