"""Every example runs, in the folder of its reader and with small budgets."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import library

from .blocks import ROOT
from .runner import environment

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "fastgpt.ipynb"
NATIVE = ["native"] if library.native_missing("layer_norm", torch.device("cpu")) is None else []
ARGUMENTS = {
    "train_on_your_text.py": ["input.txt", "--steps", "3", "--out", "run", "--length", "20"],
    "patch_gpt2.py": [],
    "one_kernel.py": ["--steps", "3", "--ops", *(NATIVE or ["eager"])],
}
SAYS = {
    "train_on_your_text.py": "validation loss",
    "patch_gpt2.py": "gradients agree on",
    "one_kernel.py": "the loss is that of F.cross_entropy",
}
PARAMETERS = 'CORPUS, STEPS = "input.txt", 3'


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)
    assert {path.name for path in EXAMPLES.iterdir()} - set(ARGUMENTS) - {NOTEBOOK.name} == {
        "nanogpt-char-cpu.yaml"  # which tests/train/test_char_cpu.py trains
    }


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
    with ops.use():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def cells(*tags: str) -> list[dict[str, Any]]:
    """Code cells of the notebook that have one of the tags, or without tags all."""
    found = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in found if not tags or set(tags) & set(cell["metadata"].get("tags", []))]


def test_notebook_is_clean_and_installs_what_is_published() -> None:
    """No outputs and counts of anyone's run; the first cell installs from where the site says the code is."""
    (repo_url,) = [
        line.split(": ")[1] for line in (ROOT / "mkdocs.yml").read_text().splitlines() if "repo_url:" in line
    ]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())
    assert cells("install") == cells()[:1]
    assert f"git clone -q --depth 1 {repo_url}\n" in "".join(cells("install")[0]["source"])
    badge = "".join(json.loads(NOTEBOOK.read_text())["cells"][0]["source"])
    place = f"{repo_url.removeprefix('https://')}/blob/main/examples/{NOTEBOOK.name}"
    assert f"https://colab.research.google.com/{place.replace('github.com', 'github')}" in badge


def test_notebook(here: Path) -> None:
    """All cells but the one that installs, three steps of training."""
    nbclient = pytest.importorskip("nbclient", reason="make install brings nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = PARAMETERS
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(here)}})
    client.execute(env=environment())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    assert "validation loss" in said
    assert "eager: " in said and "ms forward and backward" in said
    assert "_gelu_forward on h100 (sm_90)" in said and "computed ceiling" in said
    assert any("image/png" in output.get("data", {}) for output in outputs), "the loss is drawn"
