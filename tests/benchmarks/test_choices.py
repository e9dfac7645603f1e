"""From rows of results to what `auto` runs: recorded choices, where they are read, and what they say."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastgpt import ops
from fastgpt.benchmarks.record import choose
from fastgpt.benchmarks.results import Row
from fastgpt.cli import main
from fastgpt.errors import InputError
from fastgpt.ops import choices, registry
from fastgpt.ops.choices import Choice, record, shape_class, user_record
from fastgpt.runtime import device_name

CPU = torch.device("cpu")
NAME = device_name(CPU)
X = torch.tensor([1.0, 2.0])  # tiny
SMALL = torch.ones(1 << 16)
ONE = Choice("one", 1.5, 1.2, 3, "eager", 0.8, 2, "run", "torch 2")


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Implementations of gelu that return constants, and files of choices of this test's own."""
    monkeypatch.setattr(registry, "_table", {name: dict(row) for name, row in registry._table.items()})
    registry.register("gelu", "one", lambda x, *, approximate: torch.ones_like(x))
    registry.register("gelu", "two", lambda x, *, approximate: torch.full_like(x, 2))
    registry.register("gelu", "absent", torch.zeros_like, lambda device: "no toys: buy some")
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "measured.json")
    choices.forget()
    choices.say_once.cache_clear()
    yield
    choices.forget()


def ran(x: torch.Tensor = X, **options: Any) -> str:
    return {1.0: "one", 2.0: "two"}.get(float(ops.gelu(x, **options).float().mean()), "eager")


def test_classes() -> None:
    assert [shape_class(n) for n in (0, (1 << 16) - 1, 1 << 16, 1 << 20, 1 << 24, 1 << 40)] == [
        *("tiny", "tiny", "small", "medium", "large", "large")
    ]


def test_without_a_record_auto_is_eager() -> None:
    assert ran() == "eager"


def test_auto_is_what_was_recorded_for_the_class() -> None:
    record({"gelu": {"tiny": ONE}}, NAME, user_record())
    assert ran() == "one"
    assert ran(SMALL) == "eager"
    assert ran(backend="eager") == "eager"
    with ops.use("eager"):
        assert ran() == "eager"
    with ops.use(gelu="auto"):
        assert ran() == "one"


def test_the_users_record_comes_before_the_table_of_the_package() -> None:
    two = dataclasses.replace(ONE, implementation="two")
    record({"gelu": {"tiny": two, "small": two}}, "cpu", choices.SHIPPED)
    assert ran() == "two"
    record({"gelu": {"tiny": ONE}}, NAME, user_record())
    assert ran() == "one"
    assert ran(SMALL) == "two"


def test_a_record_of_another_device_counts_for_nothing() -> None:
    record({"gelu": {"tiny": ONE}}, "NVIDIA H100 80GB HBM3", user_record())
    record({"gelu": {"tiny": ONE}}, "cpu", user_record())  # the user's own are by name
    assert ran() == "eager"


def test_recording_again_replaces_the_same_class_alone() -> None:
    record({"gelu": {"tiny": ONE, "small": ONE}}, NAME, user_record())
    record({"gelu": {"tiny": dataclasses.replace(ONE, implementation="two")}}, NAME, user_record())
    assert (ran(), ran(SMALL)) == ("two", "one")


def test_what_kernels_do_not_take_is_eager() -> None:
    record({"gelu": {"tiny": ONE}, "attention": {"tiny": ONE}}, NAME, user_record())
    assert ran(X.double()) == "eager"
    registry.register("attention", "one", lambda *args, **options: pytest.fail("it ran"))
    qkv = torch.randn(1, 2, 3, 1, 320)
    ops.causal_attention_qkvpacked(qkv)  # wider heads than any kernel has


def test_a_choice_that_cannot_run_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    absent = dataclasses.replace(ONE, implementation="absent")
    record({"gelu": {"tiny": absent, "small": absent}}, NAME, user_record())
    with caplog.at_level(logging.WARNING, logger="fastgpt"):
        assert [ran(), ran(), ran(SMALL)] == ["eager"] * 3
    (line,) = [entry.getMessage() for entry in caplog.records]
    assert line.startswith("auto: absent was measured fastest on this cpu (")
    assert line.endswith("but cannot run, so eager runs instead: no toys: buy some")


def test_a_choice_of_an_older_version_that_is_gone_is_eager(caplog: pytest.LogCaptureFixture) -> None:
    record({"gelu": {"tiny": dataclasses.replace(ONE, implementation="gone")}}, NAME, user_record())
    assert ran() == "eager"
    assert "there is no such implementation" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", '{"cpu": {"gelu": {"tiny": {}}}}', '{"cpu": 1}'])
def test_a_broken_file_is_named(text: str) -> None:
    user_record().parent.mkdir(parents=True)
    user_record().write_text(text)
    with pytest.raises(InputError, match="choices.json holds no choices of implementations.*delete it"):
        ops.gelu(X)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_code_has_the_choice_for_compiled_code(dynamic: bool) -> None:
    """The one of the largest class, whatever the sizes, without a graph break or a guard on sizes."""
    inside = dataclasses.replace(ONE, compiled="two")
    record({"gelu": {"tiny": ONE, "medium": inside}}, NAME, user_record())
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: ops.gelu(x), fullgraph=True, dynamic=dynamic, backend=counter)
    sizes = (8, 1 << 17) if dynamic else (8,)  # of two classes
    for size in sizes:
        x = torch.ones(size)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        assert float(compiled(x).mean()) == 2.0
    assert counter.frame_count == 1
    assert ran() == "one"


def test_exported_with_a_dynamic_size() -> None:
    class Gelu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.gelu(x)

    record({"gelu": {"large": dataclasses.replace(ONE, compiled="one")}}, NAME, user_record())
    size = torch.export.Dim("size", max=1 << 20)
    program = torch.export.export(Gelu(), (torch.randn(8),), dynamic_shapes=({0: size},), strict=True)
    assert float(program.module()(torch.randn(100)).mean()) == 1.0


def test_every_operation_asks_with_its_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an embedding those of its output, of an optimizer's step those of all parameters."""
    asked = {}

    def find(operation: str, device: torch.device, cls: str | None) -> None:
        asked[operation] = cls

    monkeypatch.setattr(choices, "find", find)
    idx = torch.zeros(1, 1 << 8, dtype=torch.int64)
    ops.embedding(idx, torch.ones(2, 1 << 8), torch.ones(1 << 8, 1 << 8))
    ops.grad_norm([torch.ones(1 << 15), torch.ones(1 << 15)])
    ops.layer_norm(torch.ones(4, 2), torch.ones(2))
    assert asked == {"embedding": "small", "grad_norm": "small", "layer_norm": "tiny"}


# -- from rows -----------------------------------------------------------------------------------------------


def row(contender: str, ratio: float | None, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "suite": "ops",
        "operation": "gelu",
        "direction": "both",
        "contender": contender,
        "dtype": "float32",
        "shape": "B=1",
        "shape_class": "tiny",
        "kind": "measured",
        "status": "ok" if ratio else "wrong",
        "note": "",
        "ratio": ratio,
        "baseline": "eager",
        "run": "r1",
        "versions": "torch 2",
        "threads": 2,
    }
    return Row(**{**values, **changes})


def test_the_fastest_on_average_wins() -> None:
    rows = [row("eager", 1.01), row("one", 2.0), row("two", 1.5), row("compile", 1.7)]
    second = [row("eager", 1.0), row("one", 1.0), row("two", 1.5), row("compile", 1.6)]
    rows += [dataclasses.replace(r, shape="B=2") for r in second]
    two = choose(rows)["gelu"]["tiny"]
    assert (two.implementation, two.ratio, two.worst, two.cases) == ("two", 1.5, 1.5, 2)
    assert (two.compiled, two.run, two.versions, two.threads) == ("eager", "r1", "torch 2", 2)
    assert choose(rows[:4])["gelu"]["tiny"].implementation == "one"
    assert choose(rows[:4])["gelu"]["tiny"].compiled == "one"
    assert choose(rows[:4])["gelu"]["tiny"].compiled_ratio == pytest.approx(2.0 / 1.7, abs=1e-3)


@pytest.mark.parametrize(
    ("ratios", "winner"),
    [
        ([1.02, 1.02], "eager"),  # less than noise
        ([3.0, 0.9], "eager"),  # a case that loses
        ([3.0, None], "eager"),  # a case that is wrong
        ([3.0, 0.96], "one"),
    ],
)
def test_what_wins_too_little_or_loses_somewhere_does_not(ratios: list[float | None], winner: str) -> None:
    rows = []
    for number, ratio in enumerate(ratios):
        shape = {"shape": f"B={number}"}
        rows += [row("eager", 1.0, **shape), row("one", ratio, **shape), row("two", 0.5, **shape)]
    assert choose(rows)["gelu"]["tiny"].implementation == winner


def test_only_forward_and_backward_together_count_where_there_are_both() -> None:
    rows = [row("eager", 1.0), row("one", 0.5)]
    rows += [row("eager", 1.0, direction="forward"), row("one", 9.0, direction="forward")]
    assert choose(rows)["gelu"]["tiny"].implementation == "eager"
    assert choose(rows[2:])["gelu"]["tiny"].implementation == "one"


def test_peers_and_a_class_without_competitors_are_no_choice() -> None:
    assert choose([row("eager", 1.0), row("liger-kernel", 3.0), row("compile", 3.0)]) == {}
    assert choose([row("eager", 1.0), row("one", None)]) == {}
    assert choose([row("one", 3.0)]) == {}
    assert choose([row("eager", 1.0), row("one", 3.0, kind="computed")]) == {}


def test_record_choice_info(capsys: pytest.CaptureFixture[str]) -> None:
    """What a run found is what `auto` runs, and `fastgpt info` shows it with its evidence."""
    record(choose([row("eager", 1.0), row("one", 2.0)]), NAME, user_record())
    assert ran() == "one"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert NAME in out
    assert str(user_record()) in out
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["gelu", "tiny"]]
    assert "one     2.00x as fast as eager (worst of 1: 2.00x)" in line
    assert "your record, run r1, 2 threads, torch 2" in line
    unrecorded = next(line for line in out.splitlines() if "nothing is recorded" in line)
    assert "layer_norm" in unrecorded
    assert " gelu" not in unrecorded


def test_info_says_what_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    record({"gelu": {"tiny": dataclasses.replace(ONE, implementation="absent")}}, NAME, user_record())
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "absent (cannot run: eager runs instead)" in " ".join(out.split())
    assert "0 of 1 operations: no toys: buy some" in out
