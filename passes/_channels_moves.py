"""What ops that move numbers say about channels: reshapes, transposes, joins and cuts of axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._channels_axes import (
    ONE,
    Axis,
    Rule,
    Walk,
    dims_of,
    integer,
    merged,
    whole_numbers,
)

Axes = list[list[Axis]]
Dims = Sequence[int | onnx_ir.SymbolicDim]


def _first(node: onnx_ir.Node) -> onnx_ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _says(node: onnx_ir.Node, what: str) -> str:
    return f"{node.op_type} {ir.title_of(node)} {what}"


def transpose(walk: Walk, node: onnx_ir.Node) -> Axes:
    """Axes in another order."""
    axes = walk.of(_first(node))
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(axes))[::-1]
    return [[axes[k] for k in order]]


def squeeze(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Axes of 1 go."""
    x = _first(node)
    given = whole_numbers(node, 1, "axes")
    if given is None and len(node.inputs) > 1:
        return None
    dims = dims_of(x)
    gone = {a % len(dims) for a in given} if given is not None else {k for k, d in enumerate(dims) if d == 1}
    return [[axis for k, axis in enumerate(walk.of(x)) if k not in gone]]


def unsqueeze(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Axes of 1 come."""
    given = whole_numbers(node, 1, "axes")
    if given is None:
        return None
    rank = len(dims_of(node.outputs[0]))
    places = {a % rank for a in given}
    axes = iter(walk.of(_first(node)))
    return [[ONE if k in places else next(axes) for k in range(rank)]]


def flatten(walk: Walk, node: onnx_ir.Node) -> Axes:
    """Two axes: all before one, all from it on."""
    x = _first(node)
    cut = integer(node, "axis", 1)
    cut += len(dims_of(x)) if cut < 0 else 0
    why = _says(node, "mixes it with another axis")
    parts = (slice(None, cut), slice(cut, None))
    return [[merged(walk, walk.of(x)[part], dims_of(x)[part], why) for part in parts]]


def reshape(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Axes that stay, axes that become one, and axes that are cut up."""
    x = _first(node)
    if whole_numbers(node, 1) is None:
        return walk.opaque(node, _says(node, "computes its shape; run fold-constants first"))
    made: list[Axis] = []
    for old, new in _blocks(dims_of(x), dims_of(node.outputs[0])):
        axes, dims = walk.of(x)[old], dims_of(x)[old]
        target = dims_of(node.outputs[0])[new]
        wide = [d for d in target if d != 1]
        if len(wide) <= 1:
            axis = merged(walk, axes, dims, _says(node, "mixes it with another axis"))
            made += [ONE if d == 1 else axis for d in target]
            continue
        made += _cut_up(walk, node, axes, target)
    return [made]


def _cut_up(walk: Walk, node: onnx_ir.Node, axes: Sequence[Axis], target: Dims) -> list[Axis]:
    """One axis becomes several: what lies under one position of the first, a head of attention, goes as a whole."""
    why = _says(node, "cuts it up")
    lead = next((d for d in target if d != 1), 1)
    if len(axes) > 1 or isinstance(axes[0], ir.Skip) or not isinstance(lead, int):
        for axis in axes:
            walk.fix(axis, why)
        return [ir.Skip(why) for _ in target]
    parts = axes[0].reshape(lead, -1)
    for column in parts.T[1:]:
        walk.tie(parts[:, 0], column)
    first = next(k for k, d in enumerate(target) if d != 1)
    return [parts[:, 0] if k == first else ir.Skip(why) for k in range(len(target))]


def _blocks(old: Dims, new: Dims) -> Iterator[tuple[slice, slice]]:
    """The shortest runs of axes that hold the same numbers before and after."""
    i = j = 0
    while i < len(old) or j < len(new):
        di, dj = i, j
        if di < len(old) and dj < len(new) and old[di] == new[dj]:
            i, j = i + 1, j + 1
        else:
            i, j = _run(old, new, i, j)
        yield slice(di, i), slice(dj, j)


def _run(old: Dims, new: Dims, i: int, j: int) -> tuple[int, int]:
    a = b = 1
    while True:
        if a <= b and i < len(old) and (a < b or a == 1 or j >= len(new)):
            dim, i = old[i], i + 1
            if not isinstance(dim, int):
                return len(old), len(new)
            a *= dim
        elif j < len(new):
            dim, j = new[j], j + 1
            if not isinstance(dim, int):
                return len(old), len(new)
            b *= dim
        else:
            return len(old), len(new)
        if a == b:
            return i, j


def concat(walk: Walk, node: onnx_ir.Node) -> Axes:
    """Positions one after the other along an axis; the others meet as elementwise."""
    values = [v for v in node.inputs if v is not None]
    dims = dims_of(node.outputs[0])
    joined = integer(node, "axis") % len(dims)
    made: list[Axis] = []
    for k in range(len(dims)):
        if k != joined:
            axis: Axis | None = None
            for value in values:
                axis = walk.tie(axis, walk.of(value)[k])
            made.append(ONE if axis is None else axis)
            continue
        made.append(_joined(walk, [(walk.of(v)[k], dims_of(v)[k]) for v in values]))
    return [made]


def _joined(walk: Walk, parts: list[tuple[Axis, int | onnx_ir.SymbolicDim]]) -> Axis:
    why = next((a.reason for a, _ in parts if isinstance(a, ir.Skip) and a is not ONE), ONE.reason)
    if all(isinstance(a, ir.Skip) for a, _ in parts):
        return ir.Skip(why)
    if not all(isinstance(d, int) for _, d in parts):
        for axis, _ in parts:
            walk.fix(axis, why)
        return ir.Skip(why)
    return np.concatenate([walk.vector(a, int(d)) for a, d in parts if isinstance(d, int)])


def split(walk: Walk, node: onnx_ir.Node) -> Axes:
    """Runs of positions along an axis."""
    x = _first(node)
    axes = walk.of(x)
    cut = integer(node, "axis") % len(axes)
    whole = axes[cut]
    made: Axes = []
    start = 0
    for value in node.outputs:
        size = dims_of(value)[cut]
        part = whole
        if not isinstance(whole, ir.Skip) and isinstance(size, int):
            part = whole[start : start + size]
            start += size
        made.append([*axes[:cut], part, *axes[cut + 1 :]])
    return made


def same_size(walk: Walk, node: onnx_ir.Node) -> Axes:
    """Axes of the size that they had stay as they are, the others stay whole: Expand, Resize, Slice, Tile."""
    x = _first(node)
    dims, axes = dims_of(node.outputs[0]), walk.of(x)
    why = _says(node, "changes it")
    lead = len(dims) - len(axes)
    made: list[Axis] = [ir.Skip(why)] * max(lead, 0)
    for axis, old, new in zip(axes, dims_of(x), dims[lead:], strict=True):
        made.append(axis if old == new else walk.fix(axis, why))
    return [made]


def expand(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Axes of 1 are repeated."""
    return None if whole_numbers(node, 1) is None else same_size(walk, node)


def resize(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Space is sampled anew."""
    mode = node.attributes.get("coordinate_transformation_mode")
    computed = len(node.inputs) > 3 and node.inputs[3] is not None and whole_numbers(node, 3) is None
    if computed or (mode is not None and mode.as_string() == "tf_crop_and_resize"):
        return None
    return same_size(walk, node)


def slices(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Axes that are not named stay as they are."""
    x = _first(node)
    rank = len(dims_of(x))
    axes = whole_numbers(node, 3, "axes")
    if axes is None:
        starts = whole_numbers(node, 1, "starts")
        if starts is None or len(node.inputs) > 3:
            return None
        axes = tuple(range(len(starts)))
    cut = {a % rank for a in axes}
    for k in cut:
        walk.fix(walk.of(x)[k], _says(node, "cuts it"))
    return [[ir.Skip(_says(node, "cuts it")) if k in cut else a for k, a in enumerate(walk.of(x))]]


def pad(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Axes without padding stay as they are."""
    x = _first(node)
    pads = whole_numbers(node, 1, "pads")
    rank = len(dims_of(x))
    axes = whole_numbers(node, 3)
    if pads is None or (axes is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    named = [a % rank for a in axes] if axes is not None else list(range(rank))
    padded = {a for k, a in enumerate(named) if pads[k] or pads[k + len(named)]}
    for k in padded:
        walk.fix(walk.of(x)[k], _says(node, "pads it"))
    return [[ir.Skip(_says(node, "pads it")) if k in padded else a for k, a in enumerate(walk.of(x))]]


def shape(walk: Walk, node: onnx_ir.Node) -> Axes:
    """The sizes that are read stay: those that the Gathers of it take, or all."""
    x = _first(node)
    rank = len(dims_of(x))
    begin, end, _ = slice(integer(node, "start"), integer(node, "end", rank)).indices(rank)
    read: set[int] = set()
    for use in node.outputs[0].uses():
        indices = whole_numbers(use.node, 1) if use.node.op_type == "Gather" and use.idx == 0 else None
        read |= set(range(begin, end)) if indices is None else {begin + i % max(end - begin, 1) for i in indices}
    if node.outputs[0].is_graph_output():
        read = set(range(begin, end))
    for k in read:
        walk.fix(walk.of(x)[k], _says(node, "reads its size; run fold-constants first"))
    return [[ir.Skip("a size")]]


MOVES: Mapping[str, Rule] = {
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Flatten": flatten,
    "Reshape": reshape,
    "Concat": concat,
    "Split": split,
    "Expand": expand,
    "Resize": resize,
    "Slice": slices,
    "Pad": pad,
    "Shape": shape,
}
