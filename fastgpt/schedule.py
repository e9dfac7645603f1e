"""The learning rate at a step."""

from __future__ import annotations

import math

from fastgpt.config import TrainConfig


def learning_rate(step: int, config: TrainConfig, peak: float | None = None) -> float:
    """The learning rate of optimizer step `step` (counted from 0).

    A linear warmup over `warmup_steps` to the peak, by default config.learning_rate, then config.schedule
    down to `min_lr_fraction` of it, reached at `max_steps`.
    """
    peak, warmup = config.learning_rate if peak is None else peak, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, config.max_steps - warmup))  # 0 .. 1 after the warmup
    floor = config.min_lr_fraction
    return peak * (floor + (1 - floor) * _remaining(progress, config))


def _remaining(progress: float, config: TrainConfig) -> float:
    """How much of the way from peak to floor is left, 1 .. 0."""
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "wsd":
        return min(1.0, (1 - progress) / config.decay_fraction) if config.decay_fraction else 1.0
    return 1.0
