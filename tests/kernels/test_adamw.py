"""What is special to the AdamW kernels: chunks, the table, random rounding. See tests/test_optim.py too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ops.guard import guarded
from ops.helpers import DTYPES, assert_accurate, kernels_of
from torch import Tensor

from fastgpt.errors import InputError
from fastgpt.kernels import adamw as kernels
from fastgpt.ops import adamw_, grad_norm
from fastgpt.ops.adamw import cost, norm_cost

MUTANTS = {
    "kernels/adamw.py": [
        ("1.0 - tl.exp(t * tl.log(beta2))", "1.0 - tl.exp((t * tl.log(beta2)).to(tl.float32))"),
        ("1.0 - tl.exp(t * tl.log(beta1))", "1.0"),
        ("    p -= step_size", "    p = p / decay - step_size"),
        ("m += (g - m) * weight1", "m += g * weight1"),
        ("v = v * beta2 + g * g * weight2", "v = v * beta2 + g * weight2"),
        ("root) + eps", "root + eps)"),  # eps under the root of the correction
        ("tl.where(clip > 1.0, 1.0, clip)", "clip", "tests/test_optim.py -k clips"),
        ("        if tl.load(found_inf_ptr) != 0.0:\n            return", "        pass"),
        ("step += tl.where(tl.load(found_inf_ptr) == 0.0, 1.0, 0.0)", "step += 1.0"),
        ("elif first < numel:\n            _update", "elif first + 1 < numel:\n            _update"),
        ("at, at < numel, coefficients", "at, at <= numel, coefficients"),
        ("first = (chunk * PARTS + part) * BLOCK\n        at = first + lanes",
         "first = (chunk * PARTS + part // 2) * BLOCK\n        at = first + lanes"),
        ("(bits & 0xFFFF)) >> 16", "(bits & 0x7FFF)) >> 16"),  # rounds up half as often
        ("tl.where(p == p, rounded, p.to(tl.bfloat16))", "rounded"),
        ("            tl.store(copy_ptr + at, p, mask)", "            tl.store(copy_ptr + at, m, mask)"),
        ("tl.load(g_ptr + at, at < numel, other=0.0)", "tl.load(g_ptr + at, at < numel - 1, other=0.0)"),
        ("if key in _tables:", "if False:"),
        ("tl.store(out_ptr, tl.sqrt(tl.sum(sums, 0)))", "tl.store(out_ptr, tl.sum(sums, 0))"),
    ]
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", kernels_of("adamw_"))
CHUNK, BLOCK = kernels.CHUNK, kernels.BLOCK
HYPER = [[1e-2, 0.9, 0.999, 1e-8, 0.1], [3e-3, 0.0, 0.95, 1e-6, 0.0]]  # beta1 = 0 too
Lists = dict[str, list[Tensor]]


def lists(sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> Lists:
    """Arguments of adamw_ for tensors of these sizes, each at a step of its own."""
    return {
        "params": [torch.randn(n, device=DEVICE).to(dtype) for n in sizes],
        "grads": [torch.randn(n, device=DEVICE).to(dtype) for n in sizes],
        "exp_avgs": [torch.randn(n, device=DEVICE) for n in sizes],
        "exp_avg_sqs": [torch.randn(n, device=DEVICE).square() for n in sizes],
        "steps": [torch.full((), float(i % 5), device=DEVICE) for i in range(len(sizes))],
    }


def clones(made: Lists, dtype: torch.dtype | None = None) -> Lists:
    """Copies; with a dtype on the CPU and in it, but for the steps."""

    def copy(name: str, t: Tensor) -> Tensor:
        if dtype is None:
            return t.clone()
        return t.to("cpu", t.dtype if name == "steps" else dtype, copy=True)

    return {name: [copy(name, t) for t in tensors] for name, tensors in made.items()}


def step(made: Lists, backend: str, **options: Any) -> None:
    device = made["params"][0].device
    groups = [i % 2 for i in range(len(made["params"]))]
    hyper = torch.tensor(HYPER, dtype=torch.float64, device=device)
    adamw_(*made.values(), hyper, groups, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_chunks(dtype: torch.dtype, backend: str) -> None:
    """Sizes at the edges of parts and chunks, and no elements; steps and groups of their own."""
    made = lists([1, BLOCK - 1, BLOCK, BLOCK + 1, 0, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 33], dtype)
    exact, eager, again = clones(made, torch.float64), clones(made), clones(made)
    norm = torch.tensor(100.0)
    step(exact, "eager", grad_norm=norm, max_grad_norm=30.0)
    for each, name in [(eager, "eager"), (made, backend), (again, backend)]:
        step(each, name, grad_norm=norm.to(DEVICE), max_grad_norm=30.0)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        for actual, other, oracle, second in zip(
            *(each[name] for each in (made, eager, exact, again)), strict=True
        ):
            assert_accurate(actual, other, oracle)
            assert torch.equal(actual, second)
    assert [int(t) for t in made["steps"]] == [i % 5 + 1 for i in range(9)]


@backends
def test_more_tensors_than_a_program_prepares(backend: str) -> None:
    made = lists([3] * (kernels.TENSORS + 2))
    eager = clones(made)
    step(made, backend)
    step(eager, "eager")
    for name in ("params", "steps"):
        torch.testing.assert_close(made[name], eager[name])


@backends
def test_bias_correction_keeps_its_digits(backend: str) -> None:
    """At the first steps 1 - beta2^t is the difference of neighbours; fp32 would be off by 6e-6 here."""
    made = lists([7])
    made["steps"] = [torch.zeros((), device=DEVICE)]
    made["exp_avgs"][0].zero_()
    made["exp_avg_sqs"][0].zero_()
    before = made["params"][0].clone()
    step(made, backend)
    moved = before.double() * (1 - 1e-3) - made["params"][0].double()
    # The first step is lr times the sign of the gradient, whatever its size; p was rounded twice.
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=0, atol=3e-7)


@backends
def test_guard_bands_and_found_inf(backend: str) -> None:
    """Nothing beyond the tensors is written; with found_inf nothing at all, and the step does not count."""
    sizes = [5, CHUNK + 3]
    for found in (0.0, 1.0):
        with guarded() as guard:
            made = {name: [guard.place(t) for t in tensors] for name, tensors in lists(sizes).items()}
            made["copies"] = [guard.empty(t.shape, torch.bfloat16, DEVICE) for t in made["params"]]
            before = clones(made)
            copies = made.pop("copies")
            if found:
                made["grads"][0].fill_(torch.nan)
            step(made, backend, found_inf=torch.tensor([found], device=DEVICE), copies=copies)
            guard.check()
        for i, copy in enumerate(copies):
            if found:
                assert copy.isnan().all()  # the poison
                assert all(torch.equal(made[n][i], before[n][i]) for n in made if n != "grads")
            else:
                assert torch.equal(copy, made["params"][i].bfloat16())
                assert int(made["steps"][i]) == i + 1


@backends
def test_addresses_off_the_vector_width(backend: str) -> None:
    """A tensor that begins in the middle of a 16-byte line makes a launch without wide accesses."""
    made = lists([CHUNK + 1])
    made["grads"] = [torch.cat([made["grads"][0][:1], made["grads"][0]])[1:]]
    expected = clones(made)
    step(made, backend)
    step(expected, "eager")
    torch.testing.assert_close(made["params"], expected["params"])


def test_the_table_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = kernels._build
    monkeypatch.setattr(kernels, "_build", lambda *args: built.append(1) or build(*args))
    kernels._tables.clear()
    made = lists([5, 6])
    for _ in range(3):
        step(made, "triton")
    assert len(built) == 1
    kept = made["grads"]
    made["grads"] = [g.clone() for g in kept]  # elsewhere, as after zero_grad(set_to_none=True)
    step(made, "triton")
    made["grads"] = kept
    step(made, "triton")
    assert len(built) == 2
    for _ in range(kernels._REMEMBERED + 5):
        step(lists([1]) | {"grads": [torch.ones(1, device=DEVICE)]}, "triton")
    assert len(kernels._tables) <= kernels._REMEMBERED


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.0 - 2**-9, 1e-3, -1e-40, 2.0])
@backends
def test_stochastic_rounding(value: float, backend: str) -> None:
    """Only the two neighbours in bf16, with the probabilities that give the value as their mean."""
    n = CHUNK + 500
    made = lists([n])
    wanted = torch.tensor(value).float()
    hyper = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]], dtype=torch.float64, device=DEVICE)
    low = (wanted.view(torch.int32) & -65536).view(torch.float32)  # towards 0
    high = ((wanted.view(torch.int32) & -65536) + 65536).view(torch.float32)
    made["exp_avgs"][0].zero_()
    # From low a step of g / (|g| + 1), without momentum, to the value.
    distance = low - wanted
    made["params"] = [low.bfloat16().expand(n).to(DEVICE).clone()]
    made["grads"] = [(distance / (1 - distance.abs())).expand(n).to(DEVICE).clone()]
    adamw_(*made.values(), hyper, [0], stochastic_rounding=True, backend=backend)
    result = made["params"][0].float().cpu()
    assert set(result.tolist()) <= {float(low), float(high)}
    share = float((wanted - low) / (high - low))
    up = float((result == high).float().mean())
    assert abs(up - share) < 5 * max(share * (1 - share) / n, 1e-9) ** 0.5 + 2**-15


@backends
def test_stochastic_rounding_keeps_nan_and_infinity(backend: str) -> None:
    made = lists([3], torch.bfloat16)
    made["params"] = [torch.tensor([torch.inf, -torch.inf, torch.nan], device=DEVICE).bfloat16()]
    step(made, backend, stochastic_rounding=True)
    assert str(made["params"][0].tolist()) == "[inf, -inf, nan]"
    made = lists([300])
    made["params"] = [p.bfloat16() for p in made["params"]]
    made["grads"][0].view(torch.int32).fill_(0x7FFFFFFF)  # a GPU's own NaN: adding to it gives -0
    step(made, backend, stochastic_rounding=True)
    assert made["params"][0].isnan().all()


@backends
def test_stochastic_rounding_differs_between_calls_and_repeats_by_seed(backend: str) -> None:
    results = []
    for seed in (1, 1, 2):
        made = lists([300], torch.bfloat16)
        made = {name: [torch.full_like(t, 0.5) for t in tensors] for name, tensors in made.items()}
        torch.manual_seed(seed)
        step(made, backend, stochastic_rounding=True)
        results.append(made["params"][0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
def test_norm(dtype: torch.dtype, backend: str) -> None:
    grads = [torch.randn(n).to(dtype) for n in (1, 0, BLOCK + 1, CHUNK, 2 * CHUNK + 33)]
    on_device = [g.to(DEVICE) for g in grads]
    norm = grad_norm(on_device, backend=backend)
    eager = grad_norm(grads, backend="eager")
    assert_accurate(norm, eager, grad_norm([g.double() for g in grads], backend="eager"))
    assert torch.equal(norm, grad_norm(on_device, backend=backend))
    assert torch.equal(norm, grad_norm([g.view(1, -1).t() for g in on_device], backend=backend))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, BLOCK, CHUNK + 2])
@backends
def test_norm_is_not_finite_when_a_gradient_is_not(bad: float, place: int, backend: str) -> None:
    grads = [torch.ones(4, device=DEVICE), torch.ones(CHUNK + 3, device=DEVICE)]
    grads[1][place] = bad
    expected = torch.tensor(bad, device=DEVICE).abs()
    torch.testing.assert_close(grad_norm(grads, backend=backend), expected, equal_nan=True)


@backends
def test_norm_of_nothing(backend: str) -> None:
    assert grad_norm([]) == 0
    assert grad_norm([torch.empty(0, device=DEVICE)], backend=backend) == 0


ONE = lists([3])


def bad(**changes: Any) -> Callable[[str], None]:
    def call(backend: str) -> None:
        made = clones(ONE)
        options = {k: v for k, v in changes.items() if k not in made}
        hyper = options.pop("hyper", torch.tensor(HYPER, dtype=torch.float64, device=DEVICE))
        groups = options.pop("groups", [0])
        made |= {k: v for k, v in changes.items() if k in made}
        adamw_(*made.values(), hyper, groups, backend=backend, **options)

    return call


X = torch.zeros(3, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(grads=[]), r"grads has length 0: it must have 1"),
        (bad(grads=[X[:2]]), r"grads\[0\] has shape \(2,\): it must be \(3,\), the shape of params\[0\]"),
        (bad(grads=[X.long()]), r"grads\[0\] has dtype torch.int64"),
        (bad(grads=[X.to("meta")]), r"grads\[0\] is on meta: it must be on c"),
        (bad(grads=[X.to_sparse()]), r"grads\[0\] is torch.sparse_coo: it must be dense"),
        (bad(exp_avgs=[X.bfloat16()]), r"exp_avgs\[0\] has dtype torch.bfloat16: it must be torch.float32"),
        (bad(steps=[X]), r"steps\[0\] has shape \(3,\): it must be \(\), a scalar"),
        (bad(steps=[X[0].double()]), r"steps\[0\] has dtype torch.float64: it must be torch.float32"),
        (bad(copies=[X, X]), r"copies has length 2"),
        (bad(groups=[2]), r"groups has 2 to 2: hyper has rows 0 to 1"),
        (bad(groups=[0, 1]), r"groups has length 2: it must have 1"),
        (bad(hyper=X.double()), r"hyper has shape \(3,\) and dtype torch.float64: it must be \(groups, 5\)"),
        (bad(found_inf=X), r"found_inf has shape \(3,\): it must hold one element"),
        (bad(stochastic_rounding=True), r"stochastic_rounding is for bfloat16 .*: params have torch.float32"),
        (bad(params=[X[:1].expand(3)]), r"params\[0\] has strides .0,?.: it must fill one block of memory"),
        (lambda _: grad_norm([X, X.half()]), r"grads\[1\] has dtype torch.float16: it must be torch.float32"),
        (lambda _: grad_norm([X, X.to("meta")]), r"grads\[1\] is on meta"),
        (lambda _: grad_norm([X.long()]), r"grads\[0\] has dtype torch.int64"),
    ],
)
@backends
def test_bad_input(call: Callable[[str], Any], message: str, backend: str) -> None:
    with pytest.raises(InputError, match=message):
        call(backend)


def test_cost() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    assert cost(100, fp32, fp32).bytes == 2800
    assert cost(100, fp32, bf16, copy=bf16).bytes == 2800
    assert cost(100, bf16, bf16).bytes == 2200
    assert norm_cost(100, bf16).bytes == 200
