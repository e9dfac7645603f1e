"""What launchers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgpt.kernels.launch import Chip, capture, chip, launch, tile


def test_capture() -> None:
    """Launches go to the function, chosen for its chip; an empty grid, an error on CUDA, is none."""
    seen: list[Any] = []
    before = chip(torch.device("cpu"))
    with capture(Chip(90, 132), lambda *call: seen.append(call)):
        assert chip(torch.device("cpu")) == Chip(90, 132)
        launch("kernel", (3, 0), 1, num_warps=4)
        launch("kernel", (3, 1), 1, num_warps=4)
    assert seen == [("kernel", (3, 1), (1,), {"num_warps": 4, "enable_fp_fusion": False})]
    assert chip(torch.device("cpu")) == before


@pytest.mark.parametrize("width", [0, 1, 33, 768, 1024, 1025, 8192, 50257])
def test_tile(width: int) -> None:
    """Powers of 2 that hold a row, where the widest tile does, and no more warps than there is work for."""
    t = tile(width, elements=4096, per_thread=16, widest=8192)
    assert t.columns >= min(width, 8192) and t.columns < max(2 * width, 2)
    assert t.rows * t.columns == max(4096, t.columns)
    assert t.warps in (8, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_chip() -> None:
    major, _ = torch.cuda.get_device_capability()
    assert chip(torch.device("cuda", torch.cuda.current_device())).family // 10 <= major


MUTANTS = {
    "kernels/launch.py": [
        ("    if 0 in grid:\n        return\n", ""),
        ('options.setdefault("enable_fp_fusion", False)', "pass"),
        ("triton.next_power_of_2(max(width, 1))", "triton.next_power_of_2(width)"),
    ],
}
