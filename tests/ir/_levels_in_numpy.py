"""The training forms with levels in numpy, written without their bodies."""

from __future__ import annotations

import numpy as np

from mc_opt import ir
from mc_opt.ir.op import Example


def draw_to_levels(example: Example) -> np.ndarray:
    """FakeProx, element by element."""
    x, sharpness, *factors = example.inputs
    x = x * example.attributes.get("gain", 1)
    transform, levels = example.attributes.get("transform", 0), np.linspace(-1, 1, example.attributes.get("levels", 2))
    y, k, h = np.empty_like(x), float(sharpness), 1 / (levels.size - 1)
    for place, value in np.ndenumerate(x.astype(float)):
        z = min(max(value / 2, -1), 1)
        t = (value, min(max(value, -1), 1), 2 * z - z * abs(z))[transform]
        inner = min(max(t, -1), 1)
        a = levels[min(int(np.searchsorted(levels, inner, side="right")) - 1, levels.size - 2)]
        if inner == 1:
            drawn = 1.0
        elif k == 1:
            drawn = a if inner < a + h else a + 2 * h
        else:
            drawn = a + 2 * h * min(max((inner - a - k * h) / (2 * h * (1 - k)), 0), 1)
        y[place] = drawn + (1 - k) * (t - inner)
    return _scaled(y, factors, example)


def swish_to_levels(example: Example) -> np.ndarray:
    """FakeSwishSign by σ, as the papers write it."""
    x, sharpness, hard, *factors = example.inputs
    x = x * example.attributes.get("gain", 1)
    n = example.attributes.get("levels", 2)
    levels, h = np.linspace(-1, 1, n), 1 / (n - 1)
    middle = (levels[1:] + levels[:-1]) / 2
    if hard:
        return _scaled(levels[np.searchsorted(middle, x, side="right")].astype(np.float32), factors, example)
    y = np.full(x.shape, -1.0)
    for m in middle:
        z = np.clip(float(sharpness) / h * (x.astype(float) - m), -700, 700)
        sigmoid = 1 / (1 + np.exp(-z))
        y += h * (2 * sigmoid * (1 + z * (1 - sigmoid)))
    return _scaled(y.astype(np.float32), factors, example)


def cut_below_threshold(example: Example) -> np.ndarray:
    """FakeThreshold, element by element."""
    x, beta, *factors = example.inputs
    x = x * example.attributes.get("gain", 1)
    held = min(max(float(beta), np.pi / 4), np.pi / 2 - 1e-3)
    delta = 1 / (1 + np.sqrt(np.tan(held)))
    if beta > np.pi / 2 - 0.05 or (np.abs(x) < delta).mean() < 0.05:
        delta = 0
    y = np.array([0 if abs(v) < delta else (1 if v >= 0 else -1) for v in x.reshape(-1)], np.float32)
    return _scaled(y.reshape(x.shape), factors, example)


def _scaled(y: np.ndarray, factors: list[np.ndarray | None], example: Example) -> np.ndarray:
    if not factors:
        return y
    axes, (scale, unit) = example.attributes.get("axes", (0,)), factors
    return ir.restore(ir.canonical(y, axes) * (scale * unit), y.shape, axes)
