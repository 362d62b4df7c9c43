"""Which ops a per-channel scale and shift can pass, and what is known of a value's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _affine
from mc_opt.passes._affine import Affine
from mc_opt.passes._refold import int_attribute, ints_attribute, is_constant, string_attribute, value_at


def through(node: onnx_ir.Node, affine: Affine, *, backwards: bool) -> Affine | ir.Skip:
    """The affine on the other side of an op that it can pass; or why it cannot."""
    title = f"its input comes from {title_of(node)}" if backwards else f"its result goes to {title_of(node)}"
    rank = rank_of(value_at(node, 0)) if node.inputs and node.inputs[0] is not None else None
    if rank is None:
        return ir.Skip(f"{title}, and the rank there is not known")
    match node.op_type:
        case "Identity" | "Dropout":
            trains = len(node.inputs) > 2 and node.inputs[2] is not None
            return ir.Skip(f"{title}, which may be training") if trains else affine
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze":
            ends = (node.outputs[0], value_at(node, 0))
            before, after = (dims_of(v) for v in (ends if backwards else reversed(ends)))
            moved = None if before is None or after is None else _affine.reshaped(affine, before, after)
            return moved or ir.Skip(f"{title}, after which no one axis holds the channels")
        case "Transpose":
            perm = ints_attribute(node, "perm", list(reversed(range(rank))))
            return replace(affine, axis=perm[affine.axis] if backwards else perm.index(affine.axis))
        case "GlobalAveragePool" | "AveragePool" | "GlobalMaxPool" | "MaxPool":
            return _through_pool(node, affine, title)
        case "ReduceMean" | "ReduceMax":
            return _through_reduction(node, affine, title, rank, backwards=backwards)
        case "Relu" | "LeakyRelu":
            if affine.shifts:
                return ir.Skip(f"{title}: a shift cannot pass through it")
            return affine if (affine.s > 0).all() else ir.Skip(f"{title}: a scale that is not positive cannot pass")
        case "Pad":
            return _through_pad(node, affine, title, rank)
        case "Resize":
            same = dim_of(value_at(node, 0), affine.axis) == dim_of(node.outputs[0], affine.axis) == affine.s.size
            crops = string_attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
            return affine if same and not crops else ir.Skip(f"{title}, which resizes channels or crops")
        case _:
            return ir.Skip(f"{title}: a scale and a shift cannot pass through it")


def _through_pool(node: onnx_ir.Node, affine: Affine, title: str) -> Affine | ir.Skip:
    if affine.axis != 1:
        return ir.Skip(f"{title}, which pools over axis {affine.axis} of its channels")
    if node.op_type in ("GlobalMaxPool", "MaxPool"):
        return affine if (affine.s > 0).all() else ir.Skip(f"{title}: a scale that is not positive changes the maximum")
    if affine.shifts and int_attribute(node, "count_include_pad", 0):
        return ir.Skip(f"{title}, which counts padding: there the shift is missing")
    return affine


def _through_reduction(
    node: onnx_ir.Node, affine: Affine, title: str, rank: int, *, backwards: bool
) -> Affine | ir.Skip:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None and not is_constant(given):
        return ir.Skip(f"{title}, whose axes are computed")
    numbers = _numbers(given).tolist() if given is not None else []
    reduced = {a % rank for a in numbers} or (
        set() if int_attribute(node, "noop_with_empty_axes", 0) else {*range(rank)}
    )
    kept = [a for a in range(rank) if a not in reduced or int_attribute(node, "keepdims", 1)]
    axis = kept[affine.axis] if backwards else affine.axis
    if axis in reduced:
        return ir.Skip(f"{title}, which reduces over the channels")
    if node.op_type == "ReduceMax" and not (affine.s > 0).all():
        return ir.Skip(f"{title}: a scale that is not positive changes the maximum")
    return replace(affine, axis=axis if backwards else kept.index(axis))


def _through_pad(node: onnx_ir.Node, affine: Affine, title: str, rank: int) -> Affine | ir.Skip:
    pads = node.inputs[1] if len(node.inputs) > 1 else None
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return ir.Skip(f"{title} of chosen axes")
    if pads is None or not is_constant(pads) or (fill is not None and not is_constant(fill)):
        return ir.Skip(f"{title}, whose padding is computed")
    numbers = _numbers(pads)
    if numbers[affine.axis] or numbers[affine.axis + rank]:
        return ir.Skip(f"{title}, which adds channels")
    if string_attribute(node, "mode", "constant") != "constant":
        return affine
    zero = fill is None or not _numbers(fill).any()
    if affine.shifts or not zero:
        return ir.Skip(f"{title}: what it pads with would be scaled and shifted too")
    return affine


def pads_of(node: onnx_ir.Node, size: Sequence[int | None]) -> list[tuple[int, int]] | None:
    """Zeros before and after each spatial axis; None when they depend on an unknown size."""
    mode = string_attribute(node, "auto_pad", "NOTSET")
    axes = len(size)
    if mode == "VALID":
        return [(0, 0)] * axes
    if mode == "NOTSET":
        flat = ints_attribute(node, "pads", [0] * 2 * axes)
        return list(zip(flat[:axes], flat[axes:], strict=True))
    weight = dims_of(value_at(node, 1)) or ()
    strides, dilations = (ints_attribute(node, name, [1] * axes) for name in ("strides", "dilations"))
    pads = []
    for length, kernel, stride, dilation in zip(size, weight[2:], strides, dilations, strict=True):
        if length is None or kernel is None:
            return None
        total = max((-(-length // stride) - 1) * stride + dilation * (kernel - 1) + 1 - length, 0)
        half = total // 2
        pads.append((half, total - half) if mode == "SAME_UPPER" else (total - half, half))
    return pads


def _numbers(value: onnx_ir.Value) -> np.ndarray:
    tensor = onnx_ir.convenience.get_const_tensor(value)
    assert tensor is not None
    array: np.ndarray = tensor.numpy()
    return array


def dims_of(value: onnx_ir.Value) -> tuple[int | None, ...] | None:
    return None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)


def dim_of(value: onnx_ir.Value, axis: int) -> int | None:
    dims = dims_of(value)
    return dims[axis] if dims is not None and axis < len(dims) else None


def rank_of(value: onnx_ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def title_of(node: onnx_ir.Node) -> str:
    return f"{node.op_type} {next((o.name for o in node.outputs if o.name), node.name)!r}"
