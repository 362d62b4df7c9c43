"""ResNet-18 in plain torch: seeded weights, BatchNorm statistics randomised so that folding has something to fold."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(nn.Module):
    """The 18-layer network of He et al. 2015 for 224x224 images and 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        inputs = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, 3, 224, 224] -> [n, 1000]."""
        y = self.blocks(self.pool(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]  # a Module's call is untyped


def resnet18(seed: int = 0) -> nn.Module:
    """The network in inference mode."""
    torch.manual_seed(seed)
    return randomise(ResNet18().eval())


def randomise(module: nn.Module) -> nn.Module:
    """Draw the statistics of every BatchNorm, which start as those of nothing: mean 0, variance 1."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]  # typed as optional
            layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return module
