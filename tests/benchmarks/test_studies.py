"""The worked studies: steps are right, a wrong one is refused, and pages have what is computed."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastgpt.benchmarks.check import Wrong
from fastgpt.benchmarks.studies import rendering, run
from fastgpt.benchmarks.studies.check import check_on_cpu, check_steps
from fastgpt.benchmarks.studies.study import Prediction, Step, Study
from fastgpt.chips import chip
from fastgpt.errors import InputError
from fastgpt.kernels.launch import Chip, capture

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks/studies"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "\nSTUDY = Study(" in path.read_text())
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def study(name: str) -> Study:
    found = importlib.import_module(f"fastgpt.benchmarks.studies.{name}").STUDY
    assert isinstance(found, Study) and found.name == name
    return found


def test_there_are_studies() -> None:
    assert {"adamw", "attention_forward", "cross_entropy", "layer_norm_backward"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_right(name: str) -> None:
    check_steps(study(name), DEVICE)


@pytest.mark.parametrize("name", NAMES)
def test_every_cpu_form_is_right(name: str) -> None:
    check_on_cpu(study(name), "small")


@pytest.mark.parametrize("name", NAMES)
def test_ends_at_the_shipped_kernel(name: str) -> None:
    """Launched by the package itself, and the steps before it by the study, whose page tells all of them."""
    steps, modules = study(name).steps, []
    for step in steps:
        found: list[str] = []
        with capture(Chip(90, 132), lambda kernel, *_, found=found: found.append(kernel.fn.__module__)):
            step.run(*study(name).inputs("gpt2", torch.device("meta")))
        modules.append(set(found))
    assert all(module.startswith("fastgpt.kernels.") for module in modules[-1])
    assert f"fastgpt.benchmarks.studies.{name}" in modules[0]
    told = rendering.page_of(study(name)).read_text()
    for number, step in enumerate(steps, 1):
        assert f"## {number}. {step.name}".lower() in told.lower()


# -- a check that can fail -----------------------------------------------------------------------------------


def double(right: Any = lambda x: [2 * x], cpu: Any = None, **changes: Any) -> Study:
    """A study of y = 2 x, whose only step is `right`."""
    step = Step("twice", "none", Prediction("none"), right, cpu, **changes)
    return Study(
        "double",
        "a hundred numbers",
        lambda size, device: [torch.randn(100, device=device)],
        lambda x: [2 * x],
        [step],
    )


def lazy(x: torch.Tensor) -> list[torch.Tensor]:
    y = torch.empty_like(x)
    y[:-1] = 2 * x[:-1]
    return [y]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: [2.001 * x], r"twice: result 0 .* exceeds"),
        (lambda x: [2 * x * torch.nan], "twice: result 0"),
        (lambda x: [2 * x[:-1]], "twice: results have shapes"),
        (lazy, "twice: result 0"),
        (None, "twice: two runs differ"),
    ],
    ids=["off by little", "nan", "shape", "unwritten", "by chance"],
)
def test_a_wrong_step_is_refused(wrong: Any, message: str) -> None:
    if wrong is None:  # errors below the bound, but other ones each time
        turn = iter([0.0, 1e-7])
        wrong = lambda x: [2 * x + next(turn) * x]  # noqa: E731
    with pytest.raises(Wrong, match=message):
        check_steps(double(wrong), torch.device("cpu"))


def test_new_memory_is_poisoned() -> None:
    """Otherwise what nobody writes might be right by chance."""
    found = []
    check_steps(double(lambda x: [found.append(torch.empty_like(x)) or 2 * x]), torch.device("cpu"))
    assert found[0].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_right_steps_pass() -> None:
    turn = iter([0.0, 1e-7])
    check_steps(double(), torch.device("cpu"))
    check_steps(double(lambda x: [2 * x + next(turn) * x], deterministic=False), torch.device("cpu"))


@pytest.mark.parametrize("size", ["small", "gpt2"])
def test_a_wrong_cpu_form_is_refused(size: Any) -> None:
    check_on_cpu(double(cpu=lambda x: [x + x]), size)
    calls = iter([2.0, 2.001])  # right on small inputs, wrong on those that are measured
    wrong = (lambda x: [2.001 * x]) if size == "small" else (lambda x: [next(calls) * x])
    with pytest.raises(Wrong, match="twice: "):
        check_on_cpu(double(cpu=wrong), size)


def test_nothing_is_said_of_a_wrong_step(capsys: pytest.CaptureFixture[str]) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("the steps are no kernels, and CUDA has the same check")
    with pytest.raises(SystemExit, match="double: twice: result 0"):
        run.main(double(lambda x: [3 * x]), [])
    assert "computed" not in capsys.readouterr().out.lower()
    with pytest.raises(SystemExit, match="--rounds -1: it must not be negative"):
        run.main(double(), ["--rounds", "-1"])


# -- pages ---------------------------------------------------------------------------------------------------


LOOK = """
import importlib, sys
from fastgpt.benchmarks.studies import microscope, rendering
from fastgpt.chips import chip
name, *chips = sys.argv[1:]
study = importlib.import_module(f"fastgpt.benchmarks.studies.{name}").STUDY
print(rendering.computed(study, [microscope.look(study, chip(one)) for one in chips]))
"""


def computed(name: str, *chips: str) -> str:
    """In a process of its own, where Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, name, *chips],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare(name: str, *chips: str) -> None:
    """What is computed now, of these chips, with the page."""
    page = rendering.section(rendering.page_of(study(name)).read_text(), rendering.COMPUTED)
    now = computed(name, *chips)
    versions = [re.findall(r"Triton ([\d.]+) compiles", text) for text in (now, page)]
    kept = rendering.cells(page)
    assert len(kept) == len(rendering.cells(now)) == 2
    for found, known in zip(rendering.cells(now), kept, strict=True):
        assert list(found) == list(known)
        if versions[0] == versions[1]:  # what another compiler makes of them may differ
            for row, columns in found.items():
                assert columns == {column: known[row][column] for column in columns}, row
    for one in chips:
        _ceilings_fall(study(name), rendering.cells(now)[0], one)


def _ceilings_fall(of: Study, rows: dict[str, dict[str, str]], name: str) -> None:
    """No step has a much lower ceiling than the last one, but one that differs from run to run or is refused.

    Up to a tenth is what a shipped kernel may pay for taking any strides, sizes and options.
    """
    ceilings = {
        step.name: float(rows[step.name][f"{name}, computed us"].split()[0])
        for step in of.steps
        if step.deterministic and not step.refused
    }
    assert ceilings[of.steps[-1].name] <= 1.1 * min(ceilings.values()), ceilings


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_what_is_computed(name: str) -> None:
    compare(name, "h100")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_what_is_computed_for_all_chips(name: str) -> None:
    compare(name, "a100", "h100", "b200")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_what_was_measured(name: str) -> None:
    """The table is that of a record which is kept, and the record has every CPU form."""
    page = rendering.section(rendering.page_of(study(name)).read_text(), rendering.MEASURED)
    records = [path.parent.name for path in ROOT.glob(f"benchmarks/results/*/study-{name}.json")]
    assert page in [rendering.recorded(study(name), machine) for machine in records]
    for machine in records:
        rows = json.loads(rendering.record_of(study(name), machine).read_text())["rows"]
        assert [row["step"] for row in rows] == list(study(name).on_cpu())
        assert all(row["status"] == "ok" for row in rows)


def test_tables_are_written_into_pages(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- computed -->\nold\n<!-- /computed -->\nb\n")
    rendering.write(page, "computed", "| step | us |\n| --- | --- |\n| x | 1 |")
    assert rendering.cells(page.read_text()) == [{"x": {"step": "x", "us": "1"}}]
    assert "old" not in page.read_text() and page.read_text().endswith("b\n")
    with pytest.raises(InputError, match="the page has no <!-- measured -->"):
        rendering.write(page, "measured", "")
    with pytest.raises(InputError, match="no such file"):
        rendering.write(tmp_path / "none.md", "computed", "")


def test_predictions_in_microseconds() -> None:
    h100 = chip("h100")
    assert Prediction("", bytes=h100.bandwidth).microseconds(h100) == 1e6
    assert Prediction("", bytes=1.0, launches=4).microseconds(h100) == pytest.approx(12.0)
    assert Prediction("", us=lambda chip: chip.sms / 2).microseconds(h100) == 66
    assert Prediction("").microseconds(h100) is None


MUTANTS = {
    "benchmarks/studies/check.py": [
        ("torch.equal(a, b)", "True"),
        ("torch.use_deterministic_algorithms(True, warn_only=True)", "pass"),
        ('        oracle.verify(results, _unit(inputs))\n', ""),
    ],
    "benchmarks/studies/microscope.py": [
        ("(found[key][0] + 1, found[key][1])", "found[key]"),
        ("limits is None:\n        return", "True:\n        return"),
        ("if again is not None and", "if False and"),
    ],
}  # fmt: skip
