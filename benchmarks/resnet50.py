"""A ResNet-50-sized model, seeded, through `sekron`: seconds, and the sizes and errors of its layers.

    python -m benchmarks.resnet50                 a plain torch definition, 25.6 M parameters, captured
    python -m benchmarks.resnet50 --passes 'sekron{ratio=0.25}'

The weights are drawn with singular values that fall as in trained layers, as 1/√i: white noise would make every choice
of factors alike.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import nn

import mc_opt
from mc_opt import passes


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 with BatchNorm, and the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = project if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50 for 224 x 224 pixels and 1000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(count):
            layers.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def weigh(module: nn.Module, seed: int = 0) -> None:
    """Draw every weight: orthogonal sides and singular values 1/√i, scaled to keep the signal's size."""
    rng = np.random.default_rng(seed)
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            shape = tuple(layer.weight.shape)
            rows, columns = shape[0], int(np.prod(shape[1:]))
            u = np.linalg.qr(rng.standard_normal((rows, min(rows, columns))))[0]
            v = np.linalg.qr(rng.standard_normal((columns, min(rows, columns))))[0]
            w = u * np.arange(1, u.shape[1] + 1) ** -0.5 @ v.T
            w *= np.sqrt(2 * rows) / np.linalg.norm(w)
            layer.weight.data = torch.from_numpy(w.reshape(shape).astype(np.float32))


def model() -> onnx_ir.Model:
    """The captured model."""
    module = resnet50().eval()
    weigh(module)
    captured: onnx_ir.Model = mc_opt.capture(module, (torch.zeros(1, 3, 224, 224),))
    return captured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", default="sekron")
    options = parser.parse_args()
    source = model()
    parameters = sum(v.const_value.size for v in source.graph.initializers.values() if v.const_value is not None)
    print(f"{parameters} parameters", flush=True)

    def tell(done: int, total: int, what: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {done}/{total}  {what}", flush=True)

    context: Any = passes.Context(check="structure", on_progress=tell)
    start, work = time.perf_counter(), time.process_time()
    report = passes.run(source, passes.Pipeline.parse(options.passes), context).report
    seconds, spent = time.perf_counter() - start, time.process_time() - work
    for layer, note in report.passes[0].notes:
        print(f"{layer}: {note}")
    for layer, reason in report.passes[0].skips.items():
        print(f"{layer}: left: {reason}")
    print(
        f"{seconds:.1f} s, {spent:.1f} s of processor time, {report.passes[0].rewrites} layers, "
        f"{report.before.parameters} -> {report.after.parameters} parameters"
    )


if __name__ == "__main__":
    main()
