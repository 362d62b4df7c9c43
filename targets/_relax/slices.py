"""Slices and splits of an axis, whose ends may depend on the open dimensions."""

from __future__ import annotations

from typing import Any

import onnx_ir
from tvm import tirx

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets._relax.mapped import held, mapped
from mc_opt.targets._relax.shape import extents, first, ints, kept

# First element, number of elements, step.
_Range = tuple[Dim, Dim, int]


def _slice(e: Emitter, node: onnx_ir.Node) -> None:
    x = first(node)
    shape = list(e.shape(x))
    starts, ends = extents(e, node, 1, "starts"), extents(e, node, 2, "ends")
    assert starts is not None and ends is not None
    axes = ints(e, node, 3, "axes") or list(range(len(starts)))
    steps = ints(e, node, 4, "steps") or [1] * len(starts)
    ranges = {
        axis % len(shape): _range(e, shape[axis], start, end, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }
    _ranges(e, x, node.outputs[0], ranges, name="slice")


def _range(e: Emitter, extent: Dim, start: Dim, end: Dim, step: int) -> _Range:
    """What a slice takes of an axis."""
    if dims.is_static((extent, start, end)):
        taken = range(extent)[_slice_of(start, end, step)]
        return taken.start, len(taken), taken.step
    if step < 0:
        raise ValueError(f"a slice of {dims.text(extent)} elements backwards needs a fixed size")
    low, high = _bound(extent, start), _bound(extent, end)
    if isinstance(extent, int) and str(getattr(high, "name", "")) in e.names:
        # As of a table of positions: a longer sequence than the table is refused when it is run.
        name = str(high.name)
        e.limits[name] = min(extent, e.limits.get(name, extent))
    elif not dims.same(extent, high):
        high = tirx.min(high, extent) if _may_exceed(high, extent) else high
    length = dims.simple(high - low)
    if not dims.is_natural(length):
        length = tirx.max(length, 0)
    return low, length if step == 1 else dims.tiles(length, step), step


def _bound(extent: Dim, at: Dim) -> Dim:
    """A start or end, counted from the first element."""
    if not isinstance(at, int):
        return at
    if at >= 0:
        return extent if at >= 2**31 - 1 else at
    counted = dims.simple(extent + at)
    # Every size is 1 or more.
    return counted if at == -1 or isinstance(counted, int) else tirx.max(counted, 0)


def _may_exceed(high: Dim, extent: Dim) -> bool:
    return not dims.is_natural(dims.simple(extent - high)) and not dims.same(high, 1)


def _slice_of(start: int, end: int, step: int) -> slice:
    # ONNX writes "before the first element" as a huge negative end; Python as None.
    return slice(start, None if step < 0 and end < -(2**31) else end, step)


def _ranges(e: Emitter, x: onnx_ir.Value, output: onnx_ir.Value, ranges: dict[int, _Range], *, name: str) -> None:
    """Emit the elements of x at the given ranges of some axes."""
    shape = [ranges[k][1] if k in ranges else s for k, s in enumerate(e.shape(x))]
    if dims.same_shape(shape, e.shape(x)) and all(step == 1 for _, _, step in ranges.values()):
        e.alias(output, x)
        return

    def element(r: Any, i: Any) -> Any:
        at = (ranges[k][0] + p * ranges[k][2] if k in ranges else p for k, p in enumerate(i))
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
            _ranges(e, x, output, {axis: (start, size, 1)}, name="split")
        start += size


HANDLERS: dict[str, Handler] = {"Slice": _slice, "Split": _split}
