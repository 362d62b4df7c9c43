"""The optimizer of a training, and its learning rate from step to step."""

from __future__ import annotations

import math

import torch

from mc_opt.passes._training import Training

_MOMENTUM = 0.9


def optimizer_of(parameters: list[torch.nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels, not on biases, scales and norms."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    match training.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=training.lr)
        case "adam":
            return torch.optim.Adam(groups, lr=training.lr)
        case "sgd":
            return torch.optim.SGD(groups, lr=training.lr, momentum=_MOMENTUM)


def rate(training: Training, step: int, total: int) -> float:
    """The learning rate of a step as a share of the highest one."""
    rising = round(training.warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    share = (step - rising) / max(total - rising, 1)
    match training.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return 1 - share
        case "constant":
            return 1.0
