"""Resize: nearest, linear and cubic along each axis, with index and weight tables computed while building."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets._relax.mapped import held, mapped
from mc_opt.targets._relax.shape import first, ints, known

Expr = Any


def _resize(e: Emitter, node: onnx_ir.Node) -> None:
    x, output = first(node), node.outputs[0]
    shape = e.shape(x)
    axes = [a % len(shape) for a in e.attribute(node, "axes", range(len(shape)))]
    scales, result = _sizes(e, node, shape, axes)
    if result == list(shape):
        e.alias(output, x)
        return
    mode = e.attribute(node, "mode", "nearest")
    roi = known(e, node, 1, "the region")
    previous, value = x, x
    # One axis after the other: both linear and cubic interpolation separate.
    for k, axis in enumerate(axes):
        if result[axis] == shape[axis] and scales[k] == 1.0:
            continue
        region = (0.0, 1.0) if roi is None or not roi.size else (float(roi[k]), float(roi[k + len(axes)]))
        at = _coordinates(e, node, shape[axis], result[axis], scale=scales[k], region=region)
        taps, weights = _taps(e, node, at, shape[axis], mode=mode, scale=scales[k])
        value = onnx_ir.Value(name=f"{output.name}.{axis}", type=x.type) if axis != _last(axes, scales) else output
        _apply(e, previous, value, axis, taps, weights)
        previous = value


def _last(axes: list[int], scales: list[float]) -> int:
    return [axis for axis, scale in zip(axes, scales, strict=True) if scale != 1.0][-1]


def _sizes(e: Emitter, node: onnx_ir.Node, shape: tuple[int, ...], axes: list[int]) -> tuple[list[float], list[int]]:
    scales, sizes = known(e, node, 2, "the scales"), ints(e, node, 3, "the sizes")
    result = list(shape)
    policy = e.attribute(node, "keep_aspect_ratio_policy", "stretch")
    if sizes:
        ratios = [size / shape[axis] for size, axis in zip(sizes, axes, strict=True)]
        if policy != "stretch":
            ratios = [min(ratios) if policy == "not_larger" else max(ratios)] * len(axes)
            sizes = [math.floor(r * shape[axis] + 0.5) for r, axis in zip(ratios, axes, strict=True)]
    else:
        assert scales is not None
        ratios = [float(s) for s in scales]
        sizes = [math.floor(r * shape[axis]) for r, axis in zip(ratios, axes, strict=True)]
    for axis, size in zip(axes, sizes, strict=True):
        result[axis] = size
    return ratios, result


def _coordinates(
    e: Emitter, node: onnx_ir.Node, size: int, new: int, *, scale: float, region: tuple[float, float]
) -> np.ndarray:
    """Where each of `new` elements lies on the axis of `size` elements."""
    i: np.ndarray = np.arange(new, dtype=np.float64)
    mode = e.attribute(node, "coordinate_transformation_mode", "half_pixel")
    match mode:
        case "asymmetric":
            return i / scale
        case "align_corners":
            return i * (size - 1) / (new - 1) if new > 1 else i * 0
        case "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5 if new > 1 else i * 0
        case "half_pixel":
            return (i + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            center = size / 2 * (1 - new / (scale * size))
            return center + (i + 0.5) / scale - 0.5
        case "tf_crop_and_resize":
            start, end = region
            if new == 1:
                return i * 0 + 0.5 * (start + end) * (size - 1)
            return start * (size - 1) + i * (end - start) * (size - 1) / (new - 1)
        case _:
            raise TargetError(f"Resize {node.name!r}: unknown coordinate_transformation_mode={mode}")


def _taps(
    e: Emitter, node: onnx_ir.Node, at: np.ndarray, size: int, *, mode: str, scale: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Indices [new, taps] and weights [new, taps] of the elements that make each new one."""
    if e.attribute(node, "antialias", 0) and scale < 1 and mode != "nearest":
        raise TargetError(f"Resize {node.name!r}: no kernel for antialias=1; use --target onnx")
    if mode == "nearest":
        return np.clip(_rounded(e, node, at), 0, size - 1)[:, None].astype(np.int32), None
    base = np.floor(at)
    t = at - base
    if mode == "linear":
        offsets, weights = np.array([0, 1]), np.stack([1 - t, t], 1)
    else:
        a = e.attribute(node, "cubic_coeff_a", -0.75)
        offsets = np.array([-1, 0, 1, 2])
        distance = np.abs(offsets[None, :] - t[:, None])
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, far)
    taps = base[:, None] + offsets[None, :]
    if e.attribute(node, "exclude_outside", 0):
        weights = np.where((taps >= 0) & (taps < size), weights, 0)
        weights = weights / weights.sum(1, keepdims=True)
    return np.clip(taps, 0, size - 1).astype(np.int32), weights.astype(np.float32)


def _rounded(e: Emitter, node: onnx_ir.Node, at: np.ndarray) -> np.ndarray:
    # Positions such as 2.5 carry the error of a division; ONNX Runtime computes them in float32.
    at = at.astype(np.float32)
    match e.attribute(node, "nearest_mode", "round_prefer_floor"):
        case "floor":
            return np.asarray(np.floor(at))
        case "ceil":
            return np.asarray(np.ceil(at))
        case "round_prefer_ceil":
            return np.asarray(np.floor(at + np.float32(0.5)))
        case _:
            return np.asarray(np.ceil(at - np.float32(0.5)))


def _apply(
    e: Emitter, x: onnx_ir.Value, output: onnx_ir.Value, axis: int, taps: np.ndarray, weights: np.ndarray | None
) -> None:
    shape = list(e.shape(x))
    step = shape[axis]
    shape[axis] = new = len(taps)
    if weights is None and new % step == 0 and (taps[:, 0] == np.arange(new) // (new // step)).all():
        factor = new // step  # a whole factor: the index is a division, no table is read

        def repeated(r: Any, i: Any) -> Expr:
            return r[0](*i[:axis], i[axis] // factor, *i[axis + 1 :])

        mapped(e, output, shape, [held(e, x)], repeated, name="resize", layout=e.layout(x))
        return
    operands = [held(e, x), (e.weight(taps), "plain")]
    if weights is not None:
        operands.append((e.weight(weights.astype(e.dtype(x))), "plain"))

    def element(r: Any, i: Any) -> Expr:
        items = [r[0](*i[:axis], r[1](i[axis], k), *i[axis + 1 :]) for k in range(taps.shape[1])]
        if weights is None:
            return items[0]
        terms = [item * r[2](i[axis], k) for k, item in enumerate(items)]
        return sum(terms[1:], terms[0])

    mapped(e, output, shape, operands, element, name="resize", layout=e.layout(x))


HANDLERS: dict[str, Handler] = {"Resize": _resize}
