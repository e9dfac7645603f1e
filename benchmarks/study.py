"""What the studies of training share: settings for one judgement at the end, and the record of a machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fastgpt.config import TrainConfig
from fastgpt.runtime import environment, resolve_device

ROOT = Path(__file__).parent.parent


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


def record(machine: str, name: str, **found: Any) -> None:
    """Write what was measured, and where, to results/MACHINE/NAME.json."""
    where = environment(resolve_device("cpu"))
    del where["command"]  # it names places on this machine
    path = ROOT / "benchmarks" / "results" / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": "measured", "environment": where, **found}, indent=1) + "\n")
