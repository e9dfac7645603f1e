"""Rows of results go to a file and come back."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from fastgpt.benchmarks.command import SUBCOMMANDS
from fastgpt.benchmarks.results import Row, append, machine_name, newest_run, path_of, read
from fastgpt.benchmarks.summary import summary
from fastgpt.cli import main
from fastgpt.errors import InputError

ROW = Row(
    suite="ops",
    operation="gelu",
    direction="both",
    contender="native",
    dtype="float32",
    shape="B=8 T=1024 C=768",
    shape_class="medium",
    kind="measured",
    status="ok",
    note='with "quotes", commas\nand lines',
    median_us=12.5,
    p20_us=0.1 + 0.2,
    p80_us=1e-7,
    rounds=11,
    outliers=0,
    ratio=1.25,
    baseline="eager",
    threads=2,
    run="r1",
)
OTHER = dataclasses.replace(
    ROW, contender="eager", status="oom", kind="computed", note="", median_us=None, ratio=None
)


def test_round_trip(tmp_path: Path) -> None:
    path = path_of(tmp_path, "a-machine", "r1")
    append([ROW, OTHER], path)
    append([ROW], path)
    assert read(path) == [ROW, OTHER, ROW]
    assert read(tmp_path) == [ROW, OTHER, ROW]
    assert path == tmp_path / "a-machine" / "r1.csv"


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("suite,operation\nops,gelu\n")
    for use in (lambda: append([ROW], path), lambda: read(path)):
        with pytest.raises(InputError, match="old.csv has other columns than this version writes"):
            use()
    assert path.read_text() == "suite,operation\nops,gelu\n"


@pytest.mark.parametrize(("old", "new"), [("12.5", "fast"), ("measured", "guessed"), ("ok", "okay")])
def test_a_value_of_another_type_is_named(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "r.csv"
    append([dataclasses.replace(ROW, note="")], path)
    path.write_text(path.read_text().replace(f",{old},", f",{new},"))
    with pytest.raises(InputError, match=f"r.csv:2: .* = '{new}': it must be of type"):
        read(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file of results"):
        read(tmp_path / "r.csv")


def test_machines_have_readable_names() -> None:
    assert machine_name("NVIDIA H100 80GB HBM3", 0) == "nvidia-h100-80gb-hbm3"
    assert machine_name("Intel(R) Xeon(R) Processor @ 2.10GHz", 2) == "intel-xeon-2-cores"


def test_the_newest_run(tmp_path: Path) -> None:
    assert newest_run(tmp_path, "m") is None
    for name, when in (("b", 1), ("a", 2)):
        append([ROW], path_of(tmp_path, "m", name))
        os.utime(path_of(tmp_path, "m", name), (when, when))
    assert newest_run(tmp_path, "m") == "a"


def test_summary_shows_losers_first_and_what_was_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = dataclasses.replace(ROW, operation="rms_norm", ratio=0.5)
    slower = dataclasses.replace(slow, shape="B=1", ratio=0.125)
    wrong = dataclasses.replace(OTHER, status="wrong", note="off by one")
    step = dataclasses.replace(ROW, suite="train", operation="gpt2", tokens_per_s=12345.0, ratio=None)
    path = tmp_path / "r.csv"
    append([ROW, slow, slower, wrong, step], path)
    assert main(["bench", "summary", str(path)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    contenders = lines[lines.index(["all", "direction", "contender", "cases", "least", "most"]) + 1 :]
    assert contenders[0] == ["rms_norm", "both", "native", "2", "0.12", "0.50"]
    assert contenders[1] == ["gelu", "both", "native", "1", "1.25", "1.25"]
    assert "wrong: gelu both float32 B=8 T=1024 C=768 eager: off by one" in out
    assert "12,345" in out
    assert summary([OTHER]) == "nothing was timed"


def test_summary_opens_with_the_best_of_each_operation() -> None:
    """By the geometric mean over the cases, of those that ran in all of them."""
    shapes = ("B=1", "B=2")
    ratios = {"native": (4.0, 1.0), "compile": (1.5, 1.5), "eager": (1.0, 1.0)}
    rows = [
        dataclasses.replace(ROW, contender=name, shape=shape, ratio=r, ratio_p20=0.9 * r, ratio_p80=1.1 * r)
        for name, pair in ratios.items()
        for shape, r in zip(shapes, pair, strict=True)
    ]
    rows.append(dataclasses.replace(rows[0], contender="peer", ratio=9.0))
    first, second, *_ = summary(rows).splitlines()
    assert first.split()[0] == "fastest"
    assert second.split() == ["gelu", "both", "native", "2", "2.00", "1.00", "4.00", "+-10%"]


def test_suites_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert all(f"fastgpt bench {name}" in out for name in SUBCOMMANDS)
    assert main(["bench", "opps"]) == 2
    assert "no suite 'opps': did you mean 'ops'?" in capsys.readouterr().err
    for name in SUBCOMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main(["bench", name, "--help"])
        assert stopped.value.code == 0
        assert f"fastgpt bench {name}" in capsys.readouterr().out
