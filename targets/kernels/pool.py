"""Pooling channels last: maximum, average and Lp over windows, and over everything."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import _math, _tile, _window, row_reduce
from mc_opt.targets.kernels._window import Axis, Sliding, Window, axes_of, shape_of, tap
from mc_opt.targets.kernels.conv import window


def pool(e: Emitter, node: onnx_ir.Node) -> None:
    """MaxPool, AveragePool, LpPool: windows that reach outside see nothing there, or zeros for `count_include_pad`."""
    value = node.inputs[0]
    assert value is not None
    if len(node.outputs) > 1 and node.outputs[1].name and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise TargetError(
            f"{node.op_type} {node.name!r}: output {node.outputs[1].name!r} (indices) is used;"
            " only the pooled values are computed; build --target onnx"
        )
    shape = e.shape(value)
    geometry = window(e, node, e.attribute(node, "kernel_shape", ()), shape[2:])
    ceil = bool(e.attribute(node, "ceil_mode", 0))
    positions = geometry.output(shape[2:], ceil=ceil)
    x = e.nhwc(value)
    match node.op_type:
        case "MaxPool":
            y = _maximum(e, x, geometry, positions)
        case "AveragePool":
            y = _average(e, x, geometry, positions, include=bool(e.attribute(node, "count_include_pad", 0)))
        case _:
            y = _power(e, x, geometry, positions, p=int(e.attribute(node, "p", 2)))
    e.set(node.outputs[0], y, "nhwc")


def _surrounded(
    e: Emitter, x: relax.Expr, w: Window, positions: Sequence[int], fill: float
) -> tuple[relax.Expr, tuple[Axis, ...]]:
    """x [n, *spatial, c] and the axes of the window over it; `fill` around x where the kernel cannot step over it."""
    n, *spatial, c = dims.sizes(x)
    before = [p[0] for p in w.pads]
    size = [
        max((p - 1) * s + d * (k - 1) + 1, b + held)
        for p, s, d, k, b, held in zip(positions, w.strides, w.dilations, w.kernel, before, spatial, strict=True)
    ]
    axes = axes_of(w, dims.sizes(x), before)
    is_stepped_over = e.machine.kind != "cuda" and _window.steps_over(axes[-1], positions[-1], e.machine)
    if is_stepped_over or (size == spatial and not any(before)):
        return x, axes

    def surround(a: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            limits = []
            for q, b, held, extent in zip(i[1:-1], before, spatial, size, strict=True):
                limits += [q >= b] if b else []
                limits += [q < b + held] if b + held < extent else []
            inner = [q - b for q, b in zip(i[1:-1], before, strict=True)]
            return tirx.if_then_else(tirx.all(*limits), a(i[0], *inner, i[-1]), tirx.const(fill, a.dtype))

        return te.compute((n, *size, c), element, name="pad")

    return e.te(surround, x, name="pad"), axes_of(w, (n, *size, c))


def _reduced(
    a: te.Tensor,
    axes: tuple[Axis, ...],
    positions: Sequence[int],
    reducer: Any,
    *,
    e: Emitter,
    fill: float = 0,
    term: Any = None,
) -> te.Tensor:
    n, *_, c = dims.sizes(a)
    machine = e.machine
    family = "max_pool" if reducer is row_reduce.greatest else "sum_pool" if term is None else "power_pool"
    called = shape_of(family, dims.sizes(a), (n, *positions, c), axes, str(a.dtype))
    wide = e.choices.pick(called, _window.channelwise_widths(axes[-1], positions[-1], machine))
    steps = [te.reduce_axis((0, axis.kernel), name=f"k{i}") for i, axis in enumerate(axes)]
    vector = _tile.vector_width(c, machine)

    def element(*i: Any) -> Any:
        value = tap(a, i, steps, axes=axes, positions=positions, fill=fill)
        return reducer(value if term is None else term(value), axis=steps)

    sliding = Sliding(vector, vector, channelwise=True, axes=axes, wide=wide, shape=called)
    return te.compute((n, *positions, c), element, name="mc_pool", attrs=sliding.annotation(machine))


def _maximum(e: Emitter, x: relax.Expr, w: Window, positions: Sequence[int]) -> relax.Expr:
    dtype = str(x.ty.dtype)
    fill, greatest = row_reduce.lowest(dtype), row_reduce.greatest
    source, axes = _surrounded(e, x, w, positions, fill)
    maximum = functools.partial(_reduced, axes=axes, positions=positions, reducer=greatest, e=e, fill=fill)
    return e.te(maximum, source, name="max_pool")


def _average(e: Emitter, x: relax.Expr, w: Window, positions: Sequence[int], *, include: bool) -> relax.Expr:
    spatial = dims.sizes(x)[1:-1]
    source, axes = _surrounded(e, x, w, positions, 0.0)

    def average(a: te.Tensor) -> te.Tensor:
        total = _reduced(a, axes, positions, te.sum, e=e)

        def element(*i: Any) -> Any:
            return total(*i) / _count(i[1:-1], w, spatial, include=include).astype(a.dtype)

        return te.compute(total.shape, element, name="average")

    return e.te(average, source, name="average_pool")


def _count(position: Sequence[Any], w: Window, spatial: Sequence[int], *, include: bool) -> Any:
    """Elements that the window at a position averages over: those inside the input, or inside input and padding."""
    count: Any = tirx.const(1, "int32")
    for q, s, k, d, (before, after), held in zip(
        position, w.strides, w.kernel, w.dilations, w.pads, spatial, strict=True
    ):
        low, high = (-before, held + after) if include else (0, held)
        start = q * s - before
        # Steps t in [0, k) with low <= start + t * d < high.
        first = tirx.max((tirx.const(low, "int32") - start + d - 1) // d, tirx.const(0, "int32"))
        beyond = tirx.min((tirx.const(high, "int32") - start + d - 1) // d, tirx.const(k, "int32"))
        count = count * tirx.max(beyond - first, tirx.const(0, "int32"))
    return tirx.max(count, tirx.const(1, "int32"))


def _power(e: Emitter, x: relax.Expr, w: Window, positions: Sequence[int], *, p: int) -> relax.Expr:
    source, axes = _surrounded(e, x, w, positions, 0.0)

    def norm(a: te.Tensor) -> te.Tensor:
        total = _reduced(a, axes, positions, te.sum, e=e, term=lambda v: _raised(v, p))
        return te.compute(total.shape, lambda *i: _root(total(*i), p), name="nth_root")

    return e.te(norm, source, name="lp_pool")


def _raised(value: Any, p: int) -> Any:
    match p:
        case 1:
            return tirx.abs(value)
        case 2:
            return value * value
        case _:
            return tirx.power(tirx.abs(value), _math.constant(p, value))


def _root(value: Any, p: int) -> Any:
    match p:
        case 1:
            return value
        case 2:
            return tirx.sqrt(value)
        case _:
            return tirx.power(value, _math.constant(1.0 / p, value))


def _pool_rows(e: Emitter, node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    """The mean of each channel where its positions stand side by side; False where another kernel is better."""
    n, c, *spatial = e.shape(value)
    if not dims.is_static(spatial) or not row_reduce.takes(e, e.dtype(value), math.prod(spatial)):
        return False

    def mean(total: Any, count: Any) -> Any:
        return total * tirx.const(1.0 / count, "float32")

    fold = functools.partial(row_reduce.folded, take=lambda v: v, combine=lambda a, b: a + b, start=0.0, finish=mean)
    y = fold(e, e.plain(value), [n, c], dims.product(spatial), name="global_pool")
    e.set(node.outputs[0], e.reshape(y, (n, c, *[1] * len(spatial))))
    return True


def global_pool(e: Emitter, node: onnx_ir.Node) -> None:
    """GlobalAveragePool, GlobalMaxPool, GlobalLpPool: one value a channel."""
    value = node.inputs[0]
    assert value is not None
    if e.layout(value) == "plain" and node.op_type == "GlobalAveragePool" and _pool_rows(e, node, value):
        return
    x = e.nhwc(value)
    n, *spatial, c = dims.sizes(x)
    count = math.prod(spatial)
    p = int(e.attribute(node, "p", 2))

    def reduce(a: te.Tensor) -> te.Tensor:
        steps = [te.reduce_axis((0, s), name=f"k{i}") for i, s in enumerate(spatial)]

        def element(*i: Any) -> Any:
            held = a(i[0], *steps, i[-1])
            if node.op_type == "GlobalMaxPool":
                return row_reduce.greatest(held, axis=steps)
            return te.sum(_raised(held, p) if node.op_type == "GlobalLpPool" else held, axis=steps)

        shape = (n, *[1] * len(spatial), c)
        total = te.compute(shape, element, name="mc_pool")
        match node.op_type:
            case "GlobalMaxPool":
                return total
            case "GlobalLpPool":
                return te.compute(shape, lambda *i: _root(total(*i), p), name="nth_root")
            case _:
                return te.compute(shape, lambda *i: total(*i) * tirx.const(1.0 / count, a.dtype), name="average")

    e.set(node.outputs[0], e.te(reduce, x, name="global_pool"), "nhwc")


HANDLERS: dict[str, Handler] = {
    "MaxPool": pool,
    "AveragePool": pool,
    "LpPool": pool,
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "GlobalLpPool": global_pool,
}
