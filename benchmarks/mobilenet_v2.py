"""MobileNetV2 in plain torch: seeded weights, BatchNorm statistics randomised so that folding has something to fold."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.resnet18 import randomise

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, outputs, number of blocks and stride of the first: table 2 of the paper."""


def _norm(inputs: int, outputs: int, kernel: int, stride: int = 1, group: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=group, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """An inverted residual: 1x1 up, 3x3 a channel, 1x1 down."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        up = [*_norm(inputs, width, 1), nn.ReLU6()] if expansion != 1 else []
        middle = [*_norm(width, width, 3, stride, width), nn.ReLU6()]
        self.body = nn.Sequential(*up, *middle, *_norm(width, outputs, 1))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        y = self.body(x)
        return x + y if self.shortcut else y  # type: ignore[no-any-return]  # a Module's call is untyped


def mobilenet_v2(seed: int = 0) -> nn.Module:
    """The network of Sandler et al. 2018 for 224x224 images and 1000 classes, in inference mode."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [*_norm(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for expansion, outputs, count, stride in _STAGES:
        for block in range(count):
            layers.append(Block(inputs, outputs, 1 if block else stride, expansion))
            inputs = outputs
    layers += [*_norm(inputs, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return randomise(nn.Sequential(*layers).eval())
