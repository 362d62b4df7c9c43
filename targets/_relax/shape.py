"""Ops that move elements and compute nothing: views, slices, joins, padding, tiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import te, tirx

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
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


def extents(e: Emitter, node: onnx_ir.Node, k: int, what: str) -> list[Dim] | None:
    """Input k as a list of extents, which may depend on the open dimensions; None when it is absent."""
    value = node.inputs[k] if k < len(node.inputs) else None
    sizes = e.sizes(value)
    return ints(e, node, k, what) if sizes is None else [dims.dim(x) for x in sizes.reshape(-1)]


def first(node: onnx_ir.Node) -> onnx_ir.Value:
    """The first input, which every op here requires."""
    value = node.inputs[0]
    assert value is not None
    return value


def kept(e: Emitter, value: onnx_ir.Value) -> Layout:
    """The layout in which an op that may keep any layout leaves its result."""
    return e.layout(value)


def _view(e: Emitter, node: onnx_ir.Node, shape: Sequence[Dim]) -> None:
    x, output = first(node), node.outputs[0]
    if dims.same_shape(e.shape(x), shape):
        e.alias(output, x)
    elif e.layout(x) == "nhwc" and _is_flat(e.shape(x), shape):
        # [N, C, 1, 1] to [N, C]: channels last or first, the bytes are the same.
        e.set(output, e.reshape(e.nhwc(x), shape))
    elif e.layout(x) == "nhwc" and _keeps_channels(e.shape(x), shape):
        e.set(output, e.reshape(e.nhwc(x), [shape[0], *shape[2:], shape[1]]), "nhwc")
    else:
        e.set(output, e.reshape(e.plain(x), shape))


def _is_flat(shape: Sequence[Dim], _new: Sequence[Dim]) -> bool:
    return dims.same(dims.product(shape[2:]), 1) or dims.same(shape[1], 1)


def _keeps_channels(shape: Sequence[Dim], new: Sequence[Dim]) -> bool:
    """Whether a view arranges positions alone: [N, C, H, W] to [N, C, L], or back."""
    return len(new) > 2 and dims.same_shape(shape[:2], new[:2])


def _reshape(e: Emitter, node: onnx_ir.Node) -> None:
    _view(e, node, _reshaped(e, node, e.shape(first(node))))


def _reshaped(e: Emitter, node: onnx_ir.Node, old: Sequence[Dim]) -> list[Dim]:
    """The shape that a Reshape gives a value of another."""
    shape = extents(e, node, 1, "the new shape")
    assert shape is not None
    if not e.attribute(node, "allowzero", 0):
        shape = [old[k] if dims.same(s, 0) else s for k, s in enumerate(shape)]
    free = [k for k, s in enumerate(shape) if dims.same(s, -1)]
    if free:
        rest = dims.product(s for s in shape if not dims.same(s, -1))
        shape[free[0]] = 0 if dims.same(rest, 0) else dims.divide(dims.product(old), rest)
    return shape


def _flatten(e: Emitter, node: onnx_ir.Node) -> None:
    shape = e.shape(first(node))
    axis = e.attribute(node, "axis", 1)
    axis += len(shape) if axis < 0 else 0
    _view(e, node, [dims.product(shape[:axis]), dims.product(shape[axis:])])


def _squeeze(e: Emitter, node: onnx_ir.Node) -> None:
    shape = e.shape(first(node))
    axes = ints(e, node, 1, "the axes")
    gone = {a % len(shape) for a in axes} if axes is not None else {k for k, s in enumerate(shape) if dims.same(s, 1)}
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
    if tuple(perm) == to_nhwc(3) and e.layout(x) == "plain" and _become_images(e, output, shape):
        e.set(output, e.plain(x), "nhwc")  # a transformer's tokens are an image's positions, channels last
        return
    moved = [axis for axis in perm if not dims.same(e.shape(x)[axis], 1)]
    if moved == sorted(moved):
        _view(e, node, shape)
        return
    inverse = [perm.index(axis) for axis in range(rank)]
    mapped(e, output, shape, [held(e, x)], lambda r, i: r[0](*(i[k] for k in inverse)), name="transpose")


def _become_images(e: Emitter, tokens: onnx_ir.Value, shape: Sequence[Dim]) -> bool:
    """Whether all that is done with [N, C, L] is to arrange its positions: [N, C, H, W]."""
    nodes = [use.node for use in tokens.uses()]
    if not nodes or any(node.op_type != "Reshape" or e.constant(node.inputs[1]) is None for node in nodes):
        return False
    images = [_reshaped(e, node, shape) for node in nodes]
    return all(len(image) > len(shape) and _keeps_channels(shape, image) for image in images)


def _concat(e: Emitter, node: onnx_ir.Node) -> None:
    values = [v for v in node.inputs if v is not None and 0 not in e.shape(v)]
    values = values or [first(node)]
    shapes = [e.shape(v) for v in values]
    axis = e.attribute(node, "axis", 0) % len(shapes[0])
    layout: Layout = "nhwc" if any(e.layout(v) == "nhwc" for v in values) else "plain"
    starts = [0]
    for s in shapes:
        starts.append(dims.simple(starts[-1] + s[axis]))
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
    target = extents(e, node, 1, "the shape")
    assert target is not None
    x = first(node)
    own = e.shape(x)
    shape = dims.broadcast(own, target)
    if dims.same_shape(shape, own):
        e.alias(node.outputs[0], x)
        return
    skip = len(shape) - len(own)

    def element(r: Any, i: Any) -> Expr:
        return r[0](*(0 if dims.same(s, 1) else p for p, s in zip(i[skip:], own, strict=True)))

    layout = kept(e, x) if skip == 0 else "plain"
    mapped(e, node.outputs[0], shape, [held(e, x)], element, name="expand", layout=layout)


def _tile(e: Emitter, node: onnx_ir.Node) -> None:
    repeats = extents(e, node, 1, "the repeats")
    assert repeats is not None
    x = first(node)
    own = e.shape(x)
    shape = [dims.simple(s * k) for s, k in zip(own, repeats, strict=True)]

    def element(r: Any, i: Any) -> Expr:
        return r[0](*(p if dims.same(k, 1) else tirx.floormod(p, s) for p, s, k in zip(i, own, repeats, strict=True)))

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
    sizes = np.empty(len(shape[part]), object)
    sizes[:] = shape[part]
    e.set_sizes(node.outputs[0], sizes)


def _size(e: Emitter, node: onnx_ir.Node) -> None:
    size = np.empty((), object)
    size[()] = dims.product(e.shape(first(node)))
    e.set_sizes(node.outputs[0], size)


def _constant_of_shape(e: Emitter, node: onnx_ir.Node) -> None:
    """Folding took it when the shape is known; an open one is filled at run time."""
    shape = extents(e, node, 0, "its input")
    assert shape is not None
    value = np.asarray(e.attribute(node, "value", np.zeros(1, np.float32)))
    fill = constant(value.reshape(-1)[0].item(), str(value.dtype))
    mapped(e, node.outputs[0], shape, [], lambda _r, _i: fill, name="fill")


def _count_up(e: Emitter, node: onnx_ir.Node) -> None:
    """Range: folding took it when its ends are known; open ones count up at run time."""
    ends = [extents(e, node, k, "its input") for k in range(3)]
    start, limit, delta = (end[0] for end in ends if end)
    length = dims.simple(limit - start)
    if not isinstance(delta, int) or delta < 1 or not dims.is_natural(length):
        raise ValueError(f"it counts from {dims.text(start)} to {dims.text(limit)}; expected to count up")
    kind = e.dtype(first(node))
    mapped(
        e,
        node.outputs[0],
        [length if delta == 1 else dims.tiles(length, delta)],
        [],
        lambda _r, i: (start + i[0] * delta).astype(kind),
        name="range",
    )


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
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Pad": _pad,
    "Range": _count_up,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "SpaceToDepth": _space_to_depth,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
