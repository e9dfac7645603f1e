"""The optimizer of a run."""

from __future__ import annotations

import torch
from torch import nn

from fastgpt.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) as GPT-2 and GPT-3 were trained with.

    Weight decay pulls on matrices and embeddings only: a bias or a LayerNorm gain has no scale to control.
    """
    decay = [p for p in model.parameters() if p.dim() >= 2]
    keep = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
