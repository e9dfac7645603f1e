"""Whole steps: recipes agree, wrong ones are refused, too little memory is a row, and where time goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import profile

from fastgpt import config, ops
from fastgpt.benchmarks import contest, ladder, results, train
from fastgpt.benchmarks.attribution import GROUPS, attribute, attribution_of, busy
from fastgpt.benchmarks.contest import ORACLE, Case, Entry, Reference, eager_losses
from fastgpt.benchmarks.steps import BATCHES, Recipe, Step, initial_model, random_batches, unpadded
from fastgpt.benchmarks.timing import Timing
from fastgpt.config import GPTConfig, TrainConfig
from fastgpt.errors import InputError
from fastgpt.ops import registry

MUTANTS = {
    "fastgpt/benchmarks/steps.py": [
        ("ops.use(recipe.ops,", 'ops.use("eager",'),
        (
            "with sdpa_kernel(SDPBackend.MATH):",
            "with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):",
        ),
    ],
    "fastgpt/benchmarks/contest.py": [
        ("if not abs(mine - wanted) <= allowed:", "if abs(mine - wanted) > allowed:"),
        ("allowed[precision] = 2 * off[yardstick] + floor", "allowed[precision] = 1.0"),
        ("* (len(x) / len(idx))", ""),
        ("                other.step = None\n            release_memory()", "                pass"),
    ],
    "fastgpt/benchmarks/attribution.py": [("reached = max(reached, end)", "reached = end")],
}

CPU = torch.device("cpu")
# Two layers and heads, and a vocabulary that is padded.
TINY = GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32)
SETTINGS = TrainConfig(model=TINY, tokenizer="char")
EAGER = Recipe("eager-fp32", "fp32", padded=False)
NATIVE = Recipe("native-fp32", "fp32", ops="native", optimizer="fastgpt")
needs_native = pytest.mark.skipif(
    NATIVE.missing(CPU) is not None, reason=f"native kernels: {NATIVE.missing(CPU)}"
)


def case(batch: int = 2, **options: Any) -> Case:
    batches = random_batches(TINY, batch, CPU)
    return Case(
        initial_model(TINY), SETTINGS, batches, **{"check_steps": 3, "seconds": lambda: 0.0, **options}
    )


def reference_of(given: Case) -> Reference:
    return Reference.of(given, ("fp32", "tf32", "autocast", "bf16"))


def first(entries: list[Entry]) -> Entry:
    return entries[0]


@pytest.fixture
def planted() -> Iterator[None]:
    """An implementation `planted` of some operations; taken out of the table again."""
    yield
    for rows in registry._table.values():
        rows.pop("planted", None)


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.PRESETS, "tiny", SETTINGS)


# -- agreement -----------------------------------------------------------------------------------------------


def test_recipes_agree_and_are_timed() -> None:
    recipes = [
        EAGER,
        Recipe("padded", "fp32", flash=False, optimizer="torch"),
        Recipe("autocast", "autocast"),
        Recipe("tf32", "tf32"),
        Recipe("graph", "fp32", graph=True),
    ]
    if NATIVE.missing(CPU) is None:
        recipes += [NATIVE, Recipe("native-bf16", "bf16", ops="native", optimizer="fastgpt")]
    given = case(check_steps=6)
    reference = reference_of(given)
    assert (
        reference.losses[-1] < reference.losses[0] - 0.1
    )  # it learns: agreement says something about gradients
    found = {e.recipe.name: e for e in contest.contest(recipes, given, reference, baseline=first)}
    assert found.pop("tf32").status == "missing"
    assert found.pop("graph").note == "CUDA graphs need an NVIDIA GPU"
    where = {"run": "r", "device": "cpu"}
    for name, entry in found.items():
        assert (entry.status, entry.note) == ("ok", ""), name
        row = contest.row_of(entry, given, where, suite="train", operation="tiny", contender=name)
        assert row.rounds == 7
        assert row.baseline == "eager-fp32"
        assert row.tokens_per_s == pytest.approx(32 / row.median_us * 1e6)
        assert row.shape == "B=2 T=16 C=32 L=2 V=65"
        assert row.loss == entry.losses[-1]
        weights = 4 * sum(p.numel() for p in given.initial.parameters())
        assert row.peak_memory_bytes > (2 if name == "native-bf16" else 3) * weights
        assert row.mfu is None
        assert row.flops == 32 * given.initial.flops_per_token()


def test_the_oracle_is_the_same_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = eager_losses(case(batch=3), ORACLE)
    monkeypatch.setattr(contest, "ORACLE_TOKENS", 32)  # two sequences, then one
    assert eager_losses(case(batch=3), ORACLE) == pytest.approx(whole, rel=1e-6)


def _sees_the_future(*qkv: Tensor, dropout_p: float, scale: None, window: None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv[0].unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@pytest.mark.parametrize("tied_head", [True, False])
def test_without_padding_it_computes_the_same(tied_head: bool) -> None:
    model = initial_model(dataclasses.replace(TINY, tied_head=tied_head))
    idx = torch.arange(8)[None]
    bare = unpadded(model)
    assert len(bare.token_embedding) == len(bare.classifier) == TINY.vocab_size < len(model.classifier)
    assert torch.equal(bare(idx)[0], model(idx)[0])


def _another_activation(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    return F.silu(F.linear(x, weight, bias))


def _one_percent_more(params: Any, *rest: Any, **options: Any) -> None:
    hyper = rest[4].clone()
    hyper[:, 0] *= 1.01
    ops.adamw_(params, *rest[:4], hyper, *rest[5:], **options, backend="eager")


@pytest.mark.parametrize(
    ("operation", "function", "precision"),
    [
        ("attention", _sees_the_future, "bf16"),
        ("linear_gelu", _another_activation, "fp32"),
        ("adamw_", _one_percent_more, "fp32"),
    ],
)
def test_a_wrong_contender_is_not_timed(operation: str, function: Any, precision: Any, planted: None) -> None:
    registry.register(operation, "planted", function)
    recipe = Recipe("wrong", precision, ops="planted", optimizer="fastgpt")
    given = case(check_steps=10)
    wrong, right = contest.contest([recipe, EAGER], given, reference_of(given), baseline=first)
    assert right.status == "ok"
    assert wrong.status == "wrong"
    assert wrong.timing is None
    assert wrong.step is None
    assert "it must be" in wrong.note


def test_disagreement() -> None:
    reference = Reference([4.0, 3.0], {"fp32": 1e-5, "autocast": 1e-2})
    assert reference.disagreement(EAGER, [4.0, 3.0 + 9e-6]) is None
    assert "step 2 is 3.00005: it must be 3" in (reference.disagreement(EAGER, [4.0, 3.00005]) or "")
    assert reference.disagreement(Recipe("a", "autocast"), [4.0, 3.00005]) is None
    assert "nan" in (reference.disagreement(EAGER, [float("nan"), 3.0]) or "")


def test_what_rounding_does_is_allowed_twice() -> None:
    given = case()
    reference = reference_of(given)
    bf16 = eager_losses(given, Recipe("bf16", "bf16", optimizer="fastgpt"))
    off = max(abs(a - b) for a, b in zip(bf16, reference.losses, strict=True))
    floor = reference.allowed["fp32"]
    assert floor == pytest.approx(16 * 2**-23 * reference.losses[0])
    assert reference.allowed["bf16"] == reference.allowed["autocast"] == pytest.approx(2 * off + floor)
    assert off > 10 * floor
    assert "tf32" not in reference.allowed  # a CPU has none


def test_attention_without_flash_compiled_after_one_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile must not run for one what it compiled for the other."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: compiler(f, backend="aot_eager"))
    torch._dynamo.reset()
    names = {}
    for flash in (True, False):
        step = Step(Recipe("compiled", "fp32", compile="default", flash=flash), *_parts())
        step()
        with profile() as profiler:
            step()
        names[flash] = {event.name for event in profiler.events() if "flash" in event.name}
    assert names[True]
    assert not names[False]


def _parts() -> tuple[Any, ...]:
    given = case()
    return given.initial, given.config, given.batches


@needs_native
def test_the_choice_of_implementations_is_the_steps_own() -> None:
    step = Step(NATIVE, *_parts())
    assert registry._choice == {}
    with profile() as profiler:
        step()
    assert registry._choice == {}
    assert any(event.name.startswith("fastgpt_native::attention") for event in profiler.events())


def test_steps_go_round_the_batches() -> None:
    step = Step(EAGER, *_parts())
    seen: list[Tensor] = []
    step._run = lambda idx, targets: seen.append(idx) or torch.zeros(())
    for _ in range(BATCHES + 1):
        step()
    assert torch.equal(seen[0], seen[BATCHES])
    assert not torch.equal(seen[0], seen[1])


# -- memory --------------------------------------------------------------------------------------------------


class Crowded:
    """Memory that holds one step at a time, and none of a large batch."""

    alive = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
        crowd = self

        class Scarce(Step):
            def __init__(self, recipe: Recipe, *parts: Any) -> None:
                super().__init__(recipe, *parts)
                crowd.alive += recipe.name not in ("oracle", "yardstick")
                self.counted = recipe.name not in ("oracle", "yardstick")

            def take(self, idx: Tensor, targets: Tensor) -> Tensor:
                if crowd.alive > 1 or len(idx) > largest:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().take(idx, targets)

            def __del__(self) -> None:
                crowd.alive -= self.counted

        monkeypatch.setattr(contest, "Step", Scarce)


def test_steps_that_do_not_fit_together_are_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Crowded(monkeypatch, largest=2)
    given = case()
    other = dataclasses.replace(EAGER, name="other")
    entries = contest.contest([EAGER, other], given, reference_of(given), baseline=first)
    assert [e.status for e in entries] == ["ok", "ok"]
    assert "alone" in entries[0].note
    assert entries[0].timing is not None
    assert entries[0].timing.baseline is None
    assert len(entries[0].timing.samples_us) == 7


def test_a_cpu_tries_nothing_that_cannot_fit() -> None:
    given = case()
    entry = contest.contest(
        [EAGER], given, reference_of(given), baseline=first, expected={"eager-fp32": 1 << 60}
    )
    assert (entry[0].status, entry[0].kind) == ("oom", "computed")


# -- where time goes -----------------------------------------------------------------------------------------


def event(name: str, start: float, end: float, parent: Any = None, **fields: Any) -> Any:
    return SimpleNamespace(
        **{
            "name": name,
            "device_type": DeviceType.CPU,
            "time_range": SimpleNamespace(start=start, end=end),
            "self_cpu_time_total": end - start,
            "cpu_parent": parent,
            "kernels": [],
            "input_shapes": [],
            **fields,
        }
    )


def test_attribution_on_a_cpu() -> None:
    node = event("autograd::engine::evaluate_function: MmBackward0", 0, 4)
    native = event("fastgpt_native::linear_cross_entropy_forward", 0, 3)
    gelu_op = event("fastgpt_native::linear_gelu_backward", 0, 9)
    update = event("Optimizer.step#AdamW.step", 0, 5)
    events = [
        *(node, native, gelu_op, update),
        event("aten::mm", 0, 10, node, input_shapes=[[32, 64], [64, 32]]),
        event("aten::mm", 0, 20, node, input_shapes=[[32, 65], [65, 32]]),  # 65: the vocabulary
        event("aten::mm", 0, 30, native),
        event("aten::addmm", 0, 40, gelu_op),
        event("aten::t", 0, 2, node),
        event("aten::add_", 0, 6, update),
        event("aten::sum", 0, 7, node),
        event("aten::copy_", 0, 8, node),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 0, 11),
    ]
    found = attribution_of(events, 400.0, {65, 128}, steps=2)
    expected = {"matmul": 50, "classifier": 53, "gelu": 9, "optimizer": 6, "other": 7, "copies": 8}
    expected |= {"attention": 11, "overhead": 400 - 144}
    assert found.wall_us == 200
    assert found.groups == {group: expected.get(group, 0) / 2 for group in GROUPS}


def test_attribution_on_a_gpu() -> None:
    """Kernels count under the operator that launched them; what no operator launched is `other`."""

    def kernel(name: str, start: float, end: float) -> Any:
        return event(name, start, end, device_type=DeviceType.CUDA)

    def launched(*kernels: tuple[str, float]) -> list[Any]:
        return [SimpleNamespace(name=name, duration=duration) for name, duration in kernels]

    events = [
        event("aten::mm", 0, 1, kernels=launched(("nvjet_hsh_128", 40))),
        event("fastgpt_native::linear_gelu_forward", 0, 1, kernels=launched(("gemm_gelu", 30))),
        event("CompiledFunction", 0, 1, kernels=launched(("triton_red_fused_native_layer_norm_1", 10))),
        *(kernel("nvjet_hsh_128", 0, 40), kernel("gemm_gelu", 40, 70)),
        *(kernel("triton_red_fused_native_layer_norm_1", 80, 90), kernel("Memcpy DtoD", 90, 95)),
    ]
    groups = attribution_of(events, 120.0, {65}, steps=1).groups
    found = {name: round(us, 6) for name, us in groups.items() if us}
    assert found == {"matmul": 70, "norm": 10, "other": 5, "idle": 35}


def test_busy_counts_overlaps_once() -> None:
    spans = [event("a", 0, 10), event("b", 2, 4), event("c", 3, 12), event("d", 20, 21)]
    assert busy(spans) == 13


@pytest.mark.parametrize("recipe", [EAGER, pytest.param(NATIVE, marks=needs_native)], ids=["eager", "native"])
def test_attribution_of_a_step(recipe: Recipe) -> None:
    found = attribute(Step(recipe, *_parts()))
    assert sum(found.groups.values()) == pytest.approx(found.wall_us)
    for group in ("matmul", "attention", "norm", "gelu", "classifier", "embedding", "optimizer", "overhead"):
        assert found.groups[group] > 0, group
    assert found.groups["idle"] == found.groups["compiled"] == 0


def test_a_model_as_wide_as_its_vocabulary() -> None:
    """128 padded rows, and 128 channels: the products of the blocks are not the classifier's."""
    shape = GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=128)
    batches = random_batches(shape, 8, torch.device("cpu"))
    found = attribute(Step(EAGER, initial_model(shape), config.preset("char-cpu"), batches))
    assert found.groups["matmul"] > found.groups["classifier"]


# -- bench train ---------------------------------------------------------------------------------------------


def run_train(folder: Path, *contenders: str, **options: Any) -> Path:
    given = train.TrainArgs(
        preset="tiny",
        contenders=contenders or ("eager-fp32", "eager-autocast"),
        device="cpu",
        threads=1,
        steps=3,
        case_seconds=0.0,
        out=folder,
        **options,
    )
    return train.run_train(given)


def test_sweep_to_out_of_memory(
    tmp_path: Path, tiny_preset: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Crowded(monkeypatch, largest=2)
    path = run_train(tmp_path, micro_batches=(4, 1, 8), attribution=False, run="sweep")
    rows = results.read(path)
    assert [(r.shape.split()[0], r.kind, r.status) for r in rows if r.contender == "eager-autocast"] == [
        ("B=1", "measured", "ok"),
        ("B=4", "measured", "oom"),
        ("B=8", "computed", "oom"),
    ]
    printed = capsys.readouterr().out
    assert "MFU = tokens/s x (6 N + 12 L C T) / peak, with N = 27," in printed
    assert "fp32 oracle" in printed
    run_train(tmp_path, micro_batches=(1,), run="sweep", resume=True)
    assert results.read(path) == rows
    with pytest.raises(InputError, match="has such rows"):
        run_train(tmp_path, micro_batches=(1,), run="sweep")


def test_losses_and_attribution_are_kept(tmp_path: Path, tiny_preset: None) -> None:
    path = run_train(tmp_path, "eager-fp32", "triton-bf16", micro_batches=(2,))
    eager, triton = (json.loads(line) for line in path.with_name(f"{path.stem}-train.jsonl").open())
    assert len(eager["losses"]) == 3
    assert set(eager["attribution"]["groups"]) == set(GROUPS)
    row = {r.contender: r for r in results.read(path)}["triton-bf16"]
    if triton["status"] == "missing":  # ok on a GPU, or in the interpreter
        assert "TRITON_INTERPRET" in row.note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contenders": ("eager",)}, "contenders has 'eager': choose from eager-fp32"),
        ({"micro_batches": (0,)}, "micro_batches has 0"),
        ({"steps": 1}, "steps = 1"),
        ({"preset": "gpt3"}, "unknown preset"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train.run_train(train.TrainArgs(device="cpu", out=tmp_path, **options))


def test_ratios_are_to_the_fastest_peer() -> None:
    def entry(recipe: Recipe, *samples: float) -> Entry:
        return Entry(recipe, timing=Timing("ok", "", samples, "eager-fp32", tuple(4.0 / s for s in samples)))

    slow = entry(EAGER, 4.0, 4.0)
    fast = entry(Recipe("compile-fp32", "fp32", compile="default"), 2.0, 3.0)
    ours = entry(NATIVE, 1.0, 1.0)
    train.against_fastest([slow, fast, ours])
    assert [e.timing.baseline for e in (slow, fast, ours) if e.timing] == ["compile-fp32"] * 3
    assert ours.timing is not None
    assert ours.timing.ratios == (2.0, 3.0)


# -- bench ladder --------------------------------------------------------------------------------------------


def test_rungs_keep_what_is_below() -> None:
    rungs = {recipe.name: recipe for recipe in ladder.rungs("triton")}
    assert list(rungs)[: len(ladder.LECTURE_MS)] == list(ladder.LECTURE_MS)
    top = rungs["CUDA graph"]
    assert top == Recipe("CUDA graph", "bf16", ops="triton", optimizer="fastgpt", graph=True)
    assert rungs["fused AdamW"] == Recipe("fused AdamW", "autocast", compile="default")
    assert rungs["triton kernels"].eager_ops == ("linear_cross_entropy", "adamw_", "grad_norm")


def test_the_ladder_on_a_cpu(
    tmp_path: Path, tiny_preset: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [recipe for recipe in ladder.rungs("native") if recipe.compile is None and recipe.ops == "eager"]
    monkeypatch.setattr(
        ladder, "rungs", lambda kernels: [*kept, ladder.Recipe("CUDA graph", "fp32", graph=True)]
    )
    monkeypatch.setattr(ladder, "LECTURE_SIZE", ("tiny", 2, 16))
    given = ladder.LadderArgs(
        "tiny", micro_batch=2, device="cpu", threads=1, steps=3, budget=0.0, out=tmp_path
    )
    rows = results.read(ladder.run_ladder(given))
    found = {row.contender: row for row in rows}
    assert [row.operation for row in rows] == list(found)
    assert found["TF32"].status == found["CUDA graph"].status == "missing"
    assert found["TF32"].note.endswith("the lecture, on an A100: 333 ms")
    assert found["bf16 autocast"].baseline == found["fp32"].baseline == "fp32"
    printed = capsys.readouterr().out
    assert "x before" in printed
    assert "1000" in printed


def test_gain_over_the_rung_before() -> None:
    before = Entry(EAGER, timing=Timing("ok", "", (4.0, 6.0, 8.0)))
    after = Entry(EAGER, timing=Timing("ok", "", (2.0, 2.0, 2.0)))
    assert ladder.gain(after, before) == 3.0
