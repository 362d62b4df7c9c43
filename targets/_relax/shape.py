"""Ops that move elements and compute nothing: views, slices, joins, padding, tiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import te, tirx

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax.emitter import Emitter, Handler, Layout, to_nhwc
from mc_opt.targets._relax.mapped import constant, held, mapped

Expr = Any


def known(e: Emitter, node: onnx_ir.Node, k: int, what: str) -> np.ndarray | None:
    """Input k as data, None when it is absent.

    Raises:
        TargetError: when it is computed at run time.
    """
    value = node.inputs[k] if k < len(node.inputs) else None
    if value is None:
        return None
    array = e.constant(value)
    if array is None:
        raise TargetError(
            f"{node.op_type} {node.name!r}: {what} {value.name!r} is computed at run time, and kernels are built for"
            " one shape; fix what it depends on with specialize{input=value} and fold-constants, or use --target onnx"
        )
    return array


def ints(e: Emitter, node: onnx_ir.Node, k: int, what: str) -> list[int] | None:
    """Input k as a list of integers, None when it is absent."""
    array = known(e, node, k, what)
    return None if array is None else [int(x) for x in array.reshape(-1)]


def first(node: onnx_ir.Node) -> onnx_ir.Value:
    """The first input, which every op here requires."""
    value = node.inputs[0]
    assert value is not None
    return value


def kept(e: Emitter, value: onnx_ir.Value) -> Layout:
    """The layout in which an op that may keep any layout leaves its result."""
    return e.layout(value)


def _view(e: Emitter, node: onnx_ir.Node, shape: Sequence[int]) -> None:
    x, output = first(node), node.outputs[0]
    if e.shape(x) == tuple(shape):
        e.alias(output, x)
    elif e.layout(x) == "nhwc" and _is_flat(e.shape(x), shape):
        # [N, C, 1, 1] to [N, C]: channels last or first, the bytes are the same.
        e.set(output, e.reshape(e.nhwc(x), shape))
    else:
        e.set(output, e.reshape(e.plain(x), shape))


def _is_flat(shape: Sequence[int], _new: Sequence[int]) -> bool:
    return math.prod(shape[2:]) == 1 or shape[1] == 1


def _reshape(e: Emitter, node: onnx_ir.Node) -> None:
    shape = ints(e, node, 1, "the new shape")
    assert shape is not None
    old = e.shape(first(node))
    if not e.attribute(node, "allowzero", 0):
        shape = [old[k] if s == 0 else s for k, s in enumerate(shape)]
    if -1 in shape:
        rest = math.prod(s for s in shape if s != -1)
        shape[shape.index(-1)] = math.prod(old) // rest if rest else 0
    _view(e, node, shape)


def _flatten(e: Emitter, node: onnx_ir.Node) -> None:
    shape = e.shape(first(node))
    axis = e.attribute(node, "axis", 1)
    axis += len(shape) if axis < 0 else 0
    _view(e, node, [math.prod(shape[:axis]), math.prod(shape[axis:])])


def _squeeze(e: Emitter, node: onnx_ir.Node) -> None:
    shape = e.shape(first(node))
    axes = ints(e, node, 1, "the axes")
    gone = {a % len(shape) for a in axes} if axes is not None else {k for k, s in enumerate(shape) if s == 1}
    _view(e, node, [s for k, s in enumerate(shape) if k not in gone])


def _unsqueeze(e: Emitter, node: onnx_ir.Node) -> None:
    axes = ints(e, node, 1, "the axes")
    assert axes is not None
    rest = list(e.shape(first(node)))
    for axis in sorted(a % (len(rest) + len(axes)) for a in axes):
        rest.insert(axis, 1)
    _view(e, node, rest)


def _transpose(e: Emitter, node: onnx_ir.Node) -> None:
    x, output = first(node), node.outputs[0]
    rank = len(e.shape(x))
    perm = e.attribute(node, "perm", tuple(reversed(range(rank))))
    if e.layout(x) == "nhwc" and tuple(perm) == to_nhwc(rank):
        e.set(output, e.nhwc(x))  # the transpose that the layout already did
        return
    shape = [e.shape(x)[axis] for axis in perm]
    moved = [axis for axis in perm if e.shape(x)[axis] != 1]
    if moved == sorted(moved):
        _view(e, node, shape)
        return
    inverse = [perm.index(axis) for axis in range(rank)]
    mapped(e, output, shape, [held(e, x)], lambda r, i: r[0](*(i[k] for k in inverse)), name="transpose")


def _slice(e: Emitter, node: onnx_ir.Node) -> None:
    x = first(node)
    shape = list(e.shape(x))
    starts, ends = ints(e, node, 1, "starts"), ints(e, node, 2, "ends")
    assert starts is not None and ends is not None
    axes = ints(e, node, 3, "axes") or list(range(len(starts)))
    steps = ints(e, node, 4, "steps") or [1] * len(starts)
    ranges = {
        axis % len(shape): range(shape[axis])[_slice_of(start, end, step)]
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }
    _ranges(e, x, node.outputs[0], ranges, name="slice")


def _slice_of(start: int, end: int, step: int) -> slice:
    # ONNX writes "before the first element" as a huge negative end; Python as None.
    return slice(start, None if step < 0 and end < -(2**31) else end, step)


def _ranges(e: Emitter, x: onnx_ir.Value, output: onnx_ir.Value, ranges: dict[int, range], *, name: str) -> None:
    """Emit the elements of x at the given ranges of some axes."""
    shape = [len(ranges[k]) if k in ranges else s for k, s in enumerate(e.shape(x))]
    if tuple(shape) == e.shape(x) and all(r.step == 1 for r in ranges.values()):
        e.alias(output, x)
        return

    def element(r: Any, i: Any) -> Expr:
        at = (ranges[k].start + p * ranges[k].step if k in ranges else p for k, p in enumerate(i))
        return r[0](*at)

    mapped(e, output, shape, [held(e, x)], element, name=name, layout=kept(e, x))


def _split(e: Emitter, node: onnx_ir.Node) -> None:
    x = first(node)
    axis = e.attribute(node, "axis", 0) % len(e.shape(x))
    extent = e.shape(x)[axis]
    sizes = ints(e, node, 1, "the sizes")
    if sizes is None:
        step = -(-extent // len(node.outputs))
        sizes = [min(step, extent - k * step) for k in range(len(node.outputs))]
    start = 0
    for output, size in zip(node.outputs, sizes, strict=True):
        if output.uses() or output.is_graph_output():
            _ranges(e, x, output, {axis: range(start, start + size)}, name="split")
        start += size


def _concat(e: Emitter, node: onnx_ir.Node) -> None:
    values = [v for v in node.inputs if v is not None and 0 not in e.shape(v)]
    values = values or [first(node)]
    shapes = [e.shape(v) for v in values]
    axis = e.attribute(node, "axis", 0) % len(shapes[0])
    layout: Layout = "nhwc" if any(e.layout(v) == "nhwc" for v in values) else "plain"
    starts = [0, *np.cumsum([s[axis] for s in shapes]).tolist()]
    shape = [starts[-1] if k == axis else s for k, s in enumerate(shapes[0])]

    def element(r: Any, i: Any) -> Expr:
        at = [(*i[:axis], i[axis] - start, *i[axis + 1 :]) for start in starts[:-1]]
        result = r[-1](*at[-1])
        for k in reversed(range(len(values) - 1)):
            result = tirx.if_then_else(i[axis] < starts[k + 1], r[k](*at[k]), result)
        return result

    operands = [(e.nhwc(v), layout) if layout == "nhwc" else (e.plain(v), layout) for v in values]
    mapped(e, node.outputs[0], shape, operands, element, name="concat", layout=layout)


def _pad(e: Emitter, node: onnx_ir.Node) -> None:
    x = first(node)
    shape = e.shape(x)
    pads = ints(e, node, 1, "the pads")
    assert pads is not None
    axes = [a % len(shape) for a in ints(e, node, 3, "the axes") or range(len(shape))]
    low, high = [0] * len(shape), [0] * len(shape)
    for k, axis in enumerate(axes):
        low[axis], high[axis] = pads[k], pads[k + len(axes)]
    mode = e.attribute(node, "mode", "constant")
    value = known(e, node, 2, "the value")
    fill = constant(0 if value is None else value.reshape(-1)[0].item(), e.dtype(x))
    result = [s + a + b for s, a, b in zip(shape, low, high, strict=True)]

    def element(r: Any, i: Any) -> Expr:
        at = [p - a for p, a in zip(i, low, strict=True)]
        if mode != "constant":
            return r[0](
                *(_mirrored(p, s, mode) if a or b else p for p, s, a, b in zip(at, shape, low, high, strict=True))
            )
        inside = [c for p, s, a in zip(at, shape, low, strict=True) if a for c in (p >= 0,)]
        inside += [p < s for p, s, b in zip(at, shape, high, strict=True) if b > 0]
        return tirx.if_then_else(tirx.all(*inside), r[0](*at), fill) if inside else r[0](*at)

    mapped(e, node.outputs[0], result, [held(e, x)], element, name="pad", layout=kept(e, x))


def _mirrored(at: Expr, extent: int, mode: str) -> Expr:
    match mode:
        case "edge":
            return tirx.max(0, tirx.min(at, extent - 1))
        case "wrap":
            return tirx.floormod(at, extent)
        case _:  # reflect, a saw of period 2(n - 1)
            if extent == 1:
                return 0
            saw = tirx.floormod(at, 2 * (extent - 1))
            return tirx.min(saw, 2 * (extent - 1) - saw)


def _expand(e: Emitter, node: onnx_ir.Node) -> None:
    target = ints(e, node, 1, "the shape")
    assert target is not None
    x = first(node)
    own = e.shape(x)
    shape = np.broadcast_shapes(own, tuple(target))
    if shape == own:
        e.alias(node.outputs[0], x)
        return
    skip = len(shape) - len(own)

    def element(r: Any, i: Any) -> Expr:
        return r[0](*(0 if s == 1 else p for p, s in zip(i[skip:], own, strict=True)))

    layout = kept(e, x) if skip == 0 else "plain"
    mapped(e, node.outputs[0], shape, [held(e, x)], element, name="expand", layout=layout)


def _tile(e: Emitter, node: onnx_ir.Node) -> None:
    repeats = ints(e, node, 1, "the repeats")
    assert repeats is not None
    x = first(node)
    own = e.shape(x)
    shape = [s * k for s, k in zip(own, repeats, strict=True)]

    def element(r: Any, i: Any) -> Expr:
        return r[0](*(p if k == 1 else tirx.floormod(p, s) for p, s, k in zip(i, own, repeats, strict=True)))

    mapped(e, node.outputs[0], shape, [held(e, x)], element, name="tile", layout=kept(e, x))


def _trilu(e: Emitter, node: onnx_ir.Node) -> None:
    shift = ints(e, node, 1, "the diagonal")
    k = shift[0] if shift else 0
    x = first(node)
    is_upper = e.attribute(node, "upper", 1)
    zero = constant(0, e.dtype(x))

    def element(r: Any, i: Any) -> Expr:
        keep = i[-1] - i[-2] >= k if is_upper else i[-1] - i[-2] <= k
        return tirx.Select(keep, r[0](*i), zero)

    mapped(e, node.outputs[0], e.shape(x), [held(e, x)], element, name="trilu")


def _depth_to_space(e: Emitter, node: onnx_ir.Node) -> None:
    x, block = first(node), e.attribute(node, "blocksize", 1)
    n, c, h, w = e.shape(x)
    depth = c // block**2
    is_crd = e.attribute(node, "mode", "DCR") == "CRD"

    def element(r: Any, i: Any) -> Expr:
        at = tirx.floormod(i[2], block) * block + tirx.floormod(i[3], block)
        channel = i[1] * block**2 + at if is_crd else at * depth + i[1]
        return r[0](i[0], channel, tirx.floordiv(i[2], block), tirx.floordiv(i[3], block))

    shape = (n, depth, h * block, w * block)
    mapped(e, node.outputs[0], shape, [held(e, x)], element, name="depth_to_space", layout=kept(e, x))


def _space_to_depth(e: Emitter, node: onnx_ir.Node) -> None:
    x, block = first(node), e.attribute(node, "blocksize", 1)
    n, c, h, w = e.shape(x)

    def element(r: Any, i: Any) -> Expr:
        at = tirx.floordiv(i[1], c)
        row, column = tirx.floordiv(at, block), tirx.floormod(at, block)
        return r[0](i[0], tirx.floormod(i[1], c), i[2] * block + row, i[3] * block + column)

    shape = (n, c * block**2, h // block, w // block)
    mapped(e, node.outputs[0], shape, [held(e, x)], element, name="space_to_depth", layout=kept(e, x))


def _shape(e: Emitter, node: onnx_ir.Node) -> None:
    shape = e.shape(first(node))
    part = slice(e.attribute(node, "start", 0), e.attribute(node, "end", None))
    e.set_constant(node.outputs[0], np.array(shape[part], np.int64))


def _size(e: Emitter, node: onnx_ir.Node) -> None:
    e.set_constant(node.outputs[0], np.array(math.prod(e.shape(first(node))), np.int64))


def _static(e: Emitter, node: onnx_ir.Node) -> None:
    """Range and ConstantOfShape make a shape of data; folding took them when the data is known."""
    for k in range(len(node.inputs)):
        known(e, node, k, "its input")


def _eye_like(e: Emitter, node: onnx_ir.Node) -> None:
    rows, columns = e.shape(first(node))
    kind = onnx_ir.DataType(e.attribute(node, "dtype", first(node).dtype or 1))
    e.set_constant(node.outputs[0], np.eye(rows, columns, k=e.attribute(node, "k", 0), dtype=kind.numpy()))


def _cumsum(e: Emitter, node: onnx_ir.Node) -> None:
    axis = ints(e, node, 1, "the axis")
    assert axis is not None
    x = first(node)
    shape = e.shape(x)
    along = axis[0] % len(shape)
    is_exclusive, is_reversed = e.attribute(node, "exclusive", 0), e.attribute(node, "reverse", 0)
    extent = shape[along]

    def fn(a: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, extent), name="k")

        def element(*i: Expr) -> Expr:
            at, own = k, i[along]
            ahead = at > own if is_exclusive else at >= own
            behind = at < own if is_exclusive else at <= own
            item = a(*i[:along], at, *i[along + 1 :])
            return te.sum(tirx.Select(ahead if is_reversed else behind, item, constant(0, str(a.dtype))), axis=k)

        return te.compute(shape, element, name="cumsum")

    e.set(node.outputs[0], e.te(fn, e.plain(x), name="cumsum"))


HANDLERS: dict[str, Handler] = {
    "Concat": _concat,
    "ConstantOfShape": _static,
    "CumSum": _cumsum,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Pad": _pad,
    "Range": _static,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
