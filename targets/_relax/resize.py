"""Resize: the elements and weights that make each new one along an axis, and the general kernel, axis by axis."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, tirx

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax.emitter import Emitter, Layout
from mc_opt.targets._relax.mapped import constant, held, mapped
from mc_opt.targets._relax.shape import first, ints, known

Expr = Any

_HALF, _ONE = np.float32(0.5), np.float32(1)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis that changes: y[i] = Σ_k weights[i, k] · x[taps[i, k]].

    Attributes:
        number: which one, in ONNX's order.
        length: elements that it has.
        taps: [new, k], int32.
        weights: [new, k], float32; None where elements are copied, k = 1.
        outside: [new], where there is nothing to interpolate; None where there is something everywhere.
    """

    number: int
    length: int
    taps: np.ndarray
    weights: np.ndarray | None
    outside: np.ndarray | None = None

    @property
    def new(self) -> int:
        """The elements that it will have."""
        return len(self.taps)

    @property
    def factor(self) -> int:
        """How often each element is repeated, where all are equally often; else 0."""
        factor, rest = divmod(self.new, self.length)
        if self.weights is not None or rest:
            return 0
        return factor if (self.taps[:, 0] == np.arange(self.new) // factor).all() else 0


def axes_of(e: Emitter, node: onnx_ir.Node) -> list[Axis]:
    """The axes that a Resize changes, in order: both linear and cubic interpolation separate."""
    shape = e.shape(first(node))
    numbers = [a % len(shape) for a in e.attribute(node, "axes", range(len(shape)))]
    roi = known(e, node, 1, "the region")
    regions = [(0.0, 1.0)] * len(numbers)
    coordinates = e.attribute(node, "coordinate_transformation_mode", "half_pixel")
    if roi is not None and roi.size and coordinates == "tf_crop_and_resize":
        regions = [(float(start), float(end)) for start, end in zip(*np.split(roi, 2), strict=True)]
    scales, sizes = _sizes(e, node, [shape[a] for a in numbers], regions)
    found = []
    for number, scale, new, region in zip(numbers, scales, sizes, regions, strict=True):
        if new == shape[number] and scale == 1 and region == (0.0, 1.0):
            continue
        at = _coordinates(node, coordinates, shape[number], new, scale=scale, region=region)
        taps, weights = _taps(e, node, at, shape[number], scale=scale)
        outside = (at < 0) | (at > shape[number] - 1) if coordinates == "tf_crop_and_resize" else None
        is_inside = outside is None or not outside.any()
        found.append(Axis(number, shape[number], taps, weights, None if is_inside else outside))
    return found


def _sizes(
    e: Emitter, node: onnx_ir.Node, lengths: list[int], regions: list[tuple[float, float]]
) -> tuple[list[np.float32], list[int]]:
    """The scales and the new lengths; in float32, as ONNX Runtime and shape inference compute them."""
    scales, sizes = known(e, node, 2, "the scales"), ints(e, node, 3, "the sizes")
    if not sizes:
        assert scales is not None
        factors = [np.float32(s) for s in scales]
        spans = [np.float32(end - start) for start, end in regions]
        return factors, [int(np.floor(np.float32(n) * t * f)) for n, t, f in zip(lengths, spans, factors, strict=True)]
    ratios = [np.float32(size) / np.float32(n) for size, n in zip(sizes, lengths, strict=True)]
    policy = e.attribute(node, "keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        ratios = [min(ratios) if policy == "not_larger" else max(ratios)] * len(lengths)
        sizes = [int(np.floor(r * np.float32(n) + _HALF)) for r, n in zip(ratios, lengths, strict=True)]
    return ratios, sizes


def _coordinates(
    node: onnx_ir.Node, mode: str, size: int, new: int, *, scale: np.float32, region: tuple[float, float]
) -> np.ndarray:
    """Where each of `new` elements lies on the axis of `size` elements; in float32, as ONNX Runtime computes it."""
    i: np.ndarray = np.arange(new, dtype=np.float32)
    last = np.float32(size - 1)
    start, end = (np.float32(r) for r in region)
    match mode:
        case "asymmetric":
            return i / scale
        case "align_corners":
            return i * last / np.float32(new - 1) if new > 1 else i * 0
        case "pytorch_half_pixel" if new == 1:
            return i * 0
        case "half_pixel" | "pytorch_half_pixel":
            return (i + _HALF) / scale - _HALF
        case "half_pixel_symmetric":
            center = np.float32(size) / 2 * (_ONE - np.float32(new) / (scale * np.float32(size)))
            return center + (i + _HALF) / scale - _HALF
        case "tf_crop_and_resize":
            if new == 1:
                return i * 0 + _HALF * (start + end) * last
            return start * last + i * (end - start) * last / np.float32(new - 1)
        case _:
            raise TargetError(f"Resize {node.name!r}: unknown coordinate_transformation_mode={mode}")


def _taps(
    e: Emitter, node: onnx_ir.Node, at: np.ndarray, size: int, *, scale: np.float32
) -> tuple[np.ndarray, np.ndarray | None]:
    """Indices [new, taps] and weights [new, taps] of the elements that make each new one."""
    mode = e.attribute(node, "mode", "nearest")
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
    match e.attribute(node, "nearest_mode", "round_prefer_floor"):
        case "floor":
            return np.asarray(np.floor(at))
        case "ceil":
            return np.asarray(np.ceil(at))
        case "round_prefer_ceil":
            return np.asarray(np.floor(at + _HALF))
        case _:
            return np.asarray(np.ceil(at - _HALF))


def general(e: Emitter, node: onnx_ir.Node, axes: list[Axis]) -> None:
    """Emit a kernel for each axis, of any type and in any layout: what comes after the last one may run with it."""
    output, value = node.outputs[0], first(node)
    fill = float(e.attribute(node, "extrapolation_value", 0.0))
    for axis in axes:
        previous = value
        value = output if axis is axes[-1] else onnx_ir.Value(name=f"{output.name}.{axis.number}", type=previous.type)
        _along(e, previous, value, axis, fill)


def _along(e: Emitter, x: onnx_ir.Value, output: onnx_ir.Value, axis: Axis, fill: float) -> None:
    shape = list(e.shape(x))
    shape[axis.number] = axis.new
    factor = axis.factor if axis.outside is None else 0
    tables = [] if factor else [axis.taps]
    if axis.weights is not None:
        tables.append(axis.weights.astype(e.dtype(x)))
    if axis.outside is not None:
        tables.append(axis.outside.astype(np.int32))

    def element(r: Any, i: Any) -> Expr:
        at = i[axis.number]

        def picked(index: Expr) -> Expr:
            return r[0](*i[: axis.number], index, *i[axis.number + 1 :])

        if factor:
            return picked(at // factor)  # no table is read
        items = [picked(r[1](at, k)) for k in range(axis.taps.shape[1])]
        if axis.weights is not None:
            items = [item * r[2](at, k) for k, item in enumerate(items)]
        value = sum(items[1:], items[0])
        if axis.outside is None:
            return value
        return tirx.Select(r[-1](at) != 0, constant(fill, e.dtype(x)), value)

    operands: list[tuple[relax.Expr, Layout]] = [held(e, x), *((e.weight(t), "plain") for t in tables)]
    mapped(e, output, shape, operands, element, name="resize", layout=e.layout(x))
