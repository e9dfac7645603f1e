"""Learning rates against the values worked out by hand."""

from __future__ import annotations

import pytest

from fastgpt.config import TrainConfig
from fastgpt.schedule import learning_rate


def rates(**changes: object) -> list[float]:
    config = TrainConfig(learning_rate=1.0, warmup_steps=3, max_steps=11, min_lr_fraction=0.1, **changes)
    return [learning_rate(step, config) for step in range(13)]


def test_warmup_is_linear_and_never_zero() -> None:
    assert rates()[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_passes_the_middle_and_ends_on_the_floor() -> None:
    cosine = rates(schedule="cosine")
    assert cosine[7] == pytest.approx(0.55)  # half way between 1 and 0.1
    assert cosine[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2**-0.5))
    assert cosine[11:] == pytest.approx([0.1, 0.1])  # and stays there


def test_linear_constant_and_wsd() -> None:
    assert rates(schedule="linear")[3:] == pytest.approx([1 - 0.9 * i / 8 for i in range(9)] + [0.1])
    assert rates(schedule="constant")[3:] == pytest.approx([1.0] * 10)
    wsd = rates(schedule="wsd", decay_fraction=0.5)
    assert wsd[3:8] == pytest.approx([1.0] * 5)
    assert wsd[8:] == pytest.approx([1 - 0.9 * i / 4 for i in range(1, 5)] + [0.1])
    assert rates(schedule="wsd", decay_fraction=0.0)[3:11] == pytest.approx([1.0] * 8)


def test_no_warmup_starts_at_the_peak() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=0, max_steps=1)
    assert learning_rate(0, config) == 1.0
