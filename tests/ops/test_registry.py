from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InputError
from fastgpt.ops import registry

X = torch.tensor([1.0, 2.0])


def ran() -> str:
    """Which implementation of gelu runs now; those below return constants of their own."""
    return {0.0: "zero", 1.0: "one"}.get(float(ops.gelu(X).sum()), "eager")


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two more implementations of gelu, and one more of dropout_add that cannot run on a CPU."""
    monkeypatch.setattr(registry, "_table", {name: dict(row) for name, row in registry._table.items()})

    def zero(x: Tensor, *, approximate: str) -> Tensor:
        return torch.zeros_like(x)

    def one(x: Tensor, *, approximate: str) -> Tensor:
        return torch.ones_like(x) / x.numel()

    registry.register("gelu", "zero", zero)
    registry.register("gelu", "one", one)
    registry.register("dropout_add", "one", one, lambda device: "no toys: buy some")
    yield


def test_table_lists_every_row_once() -> None:
    keys = [(row.operation, row.name) for row in ops.table()]
    assert len(keys) == len(set(keys))
    assert ("gelu", "zero") in keys
    assert ("attention", "eager") in keys


def test_default_is_eager() -> None:
    assert ran() == "eager"


def test_backend_argument_wins_over_the_choice() -> None:
    ops.use(gelu="one")
    assert ops.gelu(X, backend="zero").sum() == 0
    torch.testing.assert_close(ops.gelu(X, backend="auto"), ops.gelu(X, backend="eager"))


def test_global_choice_stays() -> None:
    ops.use(gelu="zero")
    assert ran() == "zero"
    ops.use("auto")
    assert ran() == "eager"


def test_choice_for_all_leaves_out_operations_without_it() -> None:
    ops.use(attention="eager")
    ops.use("zero")
    assert ran() == "zero"
    assert registry._choice["attention"] == "eager"


def test_named_operation_wins_over_all() -> None:
    ops.use("one", gelu="zero")
    assert ran() == "zero"


def test_nested_blocks_restore_in_turn() -> None:
    with ops.use(gelu="zero"):
        with ops.use("one"):
            assert ran() == "one"
            with ops.use(gelu="eager"):
                assert ran() == "eager"
            assert ran() == "one"
        assert ran() == "zero"
    assert ran() == "eager"


def test_block_restores_on_exception() -> None:
    with pytest.raises(KeyError), ops.use(gelu="zero"):
        raise KeyError
    assert ran() == "eager"


def test_block_restores_over_global_choices_inside() -> None:
    with ops.use(gelu="zero"):
        ops.use(gelu="one")
    assert ran() == "eager"


def test_same_object_can_be_entered_again() -> None:
    """A benchmark may keep its contenders: each block must run what it names, not what ran last."""
    zero = ops.use(gelu="zero")
    one = ops.use(gelu="one")
    ops.use(gelu="eager")
    for _ in range(2):
        with zero:
            assert ran() == "zero"
            with one, zero:
                assert ran() == "zero"
            assert ran() == "zero"
        with one:
            assert ran() == "one"


def test_entering_again_restores_the_choice_at_that_time() -> None:
    zero = ops.use(gelu="zero")
    with zero:
        pass
    assert ran() == "eager"
    ops.use(gelu="one")
    with zero:
        assert ran() == "zero"
    assert ran() == "one"


@pytest.mark.parametrize(
    ("arguments", "operations", "message"),
    [
        (["nope"], {}, "no implementation 'nope': choose one of auto, eager, .*one, triton, zero"),
        ([], {"nope": "eager"}, "no operation 'nope': choose from .*attention, bias_gelu"),
        ([], {"gelu": "nope"}, "gelu has no implementation 'nope': choose one of auto, eager, .*zero, one"),
        ([], {"attention": "zero"}, "attention has no implementation 'zero': choose one of auto, eager"),
        ([], {"gelu": ""}, "gelu has no implementation ''"),
    ],
)
def test_unknown_names(arguments: list[str], operations: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.use(*arguments, **operations)
    assert ran() == "eager"


def test_a_bad_name_changes_nothing() -> None:
    with pytest.raises(InputError):
        ops.use("zero", attention="nope")
    assert ran() == "eager"


def test_an_implementation_that_cannot_run_says_why() -> None:
    with ops.use("one"), pytest.raises(InputError, match="dropout_add cannot run as 'one' on cpu: no toys"):
        ops.dropout_add(X, X, p=0.5)


def test_compiled_code_follows_the_choice() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.gelu(x), fullgraph=True, backend="eager")
    expected = ops.gelu(X)
    torch.testing.assert_close(compiled(X), expected)
    with ops.use(gelu="zero"):
        assert compiled(X).sum() == 0
    torch.testing.assert_close(compiled(X), expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "eager"),
        ("zero", "zero"),
        ("gelu=one", "one"),
        (" zero , gelu = one ,", "one"),
        ("auto", "eager"),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("FASTGPT_OPS", value)
    registry.use_environment()
    assert ran() == expected


@pytest.mark.parametrize("value", ["nope", "nope=eager", "gelu=nope", "zero,one", "gelu="])
def test_environment_errors_name_the_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FASTGPT_OPS", value)
    with pytest.raises(InputError, match=f"FASTGPT_OPS='{value}'"):
        registry.use_environment()
    assert ran() == "eager"


def test_environment_is_read_on_import() -> None:
    code = "import fastgpt.ops; from fastgpt.ops.registry import _choice; print(sorted(_choice.items()))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTGPT_OPS": "attention=eager,gelu=auto"},
        cwd=Path(registry.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[('attention', 'eager'), ('gelu', 'auto')]"
