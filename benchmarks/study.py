"""What the studies of training share: settings for one judgement, files of results, a machine's record."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt.config import TrainConfig
from fastgpt.errors import InputError
from fastgpt.runtime import environment, resolve_device

ROOT = Path(__file__).resolve().parent.parent  # of the checkout, wherever this module was imported from


def judged_at_the_end(config: TrainConfig, steps: int) -> TrainConfig:
    """`steps` on the CPU in fp32, everywhere alike, and then the loss over the whole validation split."""
    return dataclasses.replace(
        config,
        max_steps=steps,
        device="cpu",
        precision="fp32",
        sample_tokens=0,
        eval_tokens=None,
        eval_every=steps,
        checkpoint_every=steps,
    )


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file of results (.csv), none where there is no file.

    Raises:
        InputError: it is of another kind.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(fields):
            raise InputError(f"{path} has other columns than {', '.join(fields)}: choose another --out")
        return list(reader)


def append_rows(path: Path, fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to what `read_rows` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def record_path(machine: str, name: str) -> Path:
    """Where `record` writes."""
    return ROOT / "benchmarks" / "results" / machine / f"{name}.json"


def record(machine: str, name: str, **found: Any) -> None:
    """Write what was measured, and where, to benchmarks/results/MACHINE/NAME.json."""
    where = environment(resolve_device("cpu"))
    del where["command"]  # it names places on this machine
    path = record_path(machine, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": "measured", "environment": where, **found}, indent=1) + "\n")
