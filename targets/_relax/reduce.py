"""Ops that reduce axes: sums, means, norms, extremes, and where they are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
from tvm import te, tirx

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler, Layout, to_nhwc
from mc_opt.targets._relax.mapped import constant, held, reader
from mc_opt.targets._relax.shape import first, ints
from mc_opt.targets.kernels import row_reduce
from mc_opt.targets.kernels._math import type_of

Expr = Any
# What is reduced of an element, the reduction, and what is made of its result and the number of elements.
Recipe = tuple[Callable[[Expr], Expr], Callable[..., Expr], Callable[[Expr, Dim], Expr] | None]


def _same(x: Expr) -> Expr:
    return x


def _square(x: Expr) -> Expr:
    return x * x


def _mean(total: Expr, count: Dim) -> Expr:
    dtype = type_of(total)
    if not isinstance(count, int):
        return total / count.astype(dtype) if "float" in dtype else tirx.truncdiv(total, count.astype(dtype))
    if "float" in dtype:
        return total * constant(1.0 / count, dtype)
    return tirx.truncdiv(total, constant(count, dtype))


def _root(total: Expr, _count: Dim) -> Expr:
    return tirx.sqrt(total)


def _logarithm(total: Expr, _count: Dim) -> Expr:
    return tirx.log(total)


_RECIPES: dict[str, Recipe] = {
    "ReduceL1": (lambda x: tirx.abs(x), te.sum, None),
    "ReduceL2": (_square, te.sum, _root),
    "ReduceLogSum": (_same, te.sum, _logarithm),
    "ReduceMax": (_same, row_reduce.greatest, None),
    "ReduceMean": (_same, te.sum, _mean),
    "ReduceMin": (_same, row_reduce.least, None),
    "ReduceSum": (_same, te.sum, None),
    "ReduceSumSquare": (_square, te.sum, None),
}


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


# How two partial results of a row become one, and with what a row begins.
_FOLDS: dict[str, tuple[Callable[[Expr, Expr], Expr], float]] = {
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceMean", "ReduceSum", "ReduceSumSquare"), (_add, 0.0)
    ),
    "ReduceMax": (tirx.max, -math.inf),
    "ReduceMin": (tirx.min, math.inf),
}


def _axes(e: Emitter, node: onnx_ir.Node, rank: int) -> tuple[int, ...]:
    axes = ints(e, node, 1, "the axes") if len(node.inputs) > 1 else e.attribute(node, "axes", None)
    if not axes:
        return () if e.attribute(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(a % rank for a in axes))


def _reduce(e: Emitter, node: onnx_ir.Node) -> None:
    x, output = first(node), node.outputs[0]
    shape = e.shape(x)
    axes = _axes(e, node, len(shape))
    if not axes:
        e.alias(output, x)
        return
    take, reduction, finish = (_same, _product, None) if node.op_type == "ReduceProd" else _RECIPES[node.op_type]
    keeps = bool(e.attribute(node, "keepdims", 1))
    expr, layout = held(e, x)
    kept = [k for k in range(len(shape)) if k not in axes]
    result = [1 if k in axes else s for k, s in enumerate(shape)] if keeps else [shape[k] for k in kept]
    stored: Layout = layout if keeps else "plain"
    count = dims.product(shape[k] for k in axes)
    order = to_nhwc(len(shape)) if layout == "nhwc" else range(len(shape))
    trails = set(order[len(shape) - len(axes) :]) == set(axes)
    if trails and node.op_type in _FOLDS and row_reduce.takes(e, e.dtype(x), count):
        combine, start = _FOLDS[node.op_type]
        flat = [shape[k] for k in order if k not in axes]
        fold = functools.partial(row_reduce.folded, take=take, combine=combine, start=start, finish=finish)
        y = fold(e, expr, flat, count, name=node.op_type.lower())
        e.set(output, e.reshape(y, _stored(result, stored)), stored)
        return

    def fn(a: te.Tensor) -> te.Tensor:
        read = reader(a, layout)
        # Reduce in the order of memory, so that the innermost loop walks along it.
        order = [k for k in (to_nhwc(len(shape)) if layout == "nhwc" else range(len(shape))) if k in axes]
        along = {k: te.reduce_axis((0, shape[k]), name=f"r{k}") for k in order}

        def element(*i: Expr) -> Expr:
            logical = (i[0], i[-1], *i[1:-1]) if stored == "nhwc" else i
            free = {k: logical[k if keeps else kept.index(k)] for k in kept}
            item = read(*(along[k] if k in along else free[k] for k in range(len(shape))))
            return reduction(take(item), axis=[along[k] for k in order])

        extents = _stored(result, stored)
        total = te.compute(extents, element, name="reduce")
        if finish is None:
            return total
        return te.compute(extents, lambda *i: finish(total(*i), count), name="finish")

    e.set(output, e.te(fn, expr, name=node.op_type.lower()), stored)


def _product(x: Expr, axis: Sequence[Any]) -> Expr:
    one = constant(1, type_of(x))
    return te.comm_reducer(lambda a, b: a * b, lambda _dtype: one, name="product")(x, axis=axis)


def _stored(shape: Sequence[Dim], layout: Layout) -> tuple[Dim, ...]:
    return tuple(shape[k] for k in to_nhwc(len(shape))) if layout == "nhwc" else tuple(shape)


def _log_sum_exp(e: Emitter, node: onnx_ir.Node) -> None:
    x = first(node)
    shape = e.shape(x)
    axes = _axes(e, node, len(shape))
    keeps = bool(e.attribute(node, "keepdims", 1))
    kept = [k for k in range(len(shape)) if k not in axes]
    result = [1 if k in axes else s for k, s in enumerate(shape)] if keeps else [shape[k] for k in kept]

    def fn(a: te.Tensor) -> te.Tensor:
        def over(reduction: Callable[..., Expr], item: Callable[..., Expr], name: str) -> te.Tensor:
            along = {k: te.reduce_axis((0, shape[k]), name=f"{name}{k}") for k in axes}

            def element(*i: Expr) -> Expr:
                free = {k: i[k if keeps else kept.index(k)] for k in kept}
                at = [along[k] if k in along else free[k] for k in range(len(shape))]
                return reduction(item(at, i), axis=list(along.values()))

            return te.compute(tuple(result), element, name=name)

        top = over(row_reduce.greatest, lambda at, _i: a(*at), "top")

        def shift(*i: Expr) -> Expr:
            return tirx.Select(tirx.isinf(top(*i)), constant(0, type_of(top(*i))), top(*i))

        total = over(te.sum, lambda at, i: tirx.exp(a(*at) - shift(*i)), "total")
        return te.compute(tuple(result), lambda *i: shift(*i) + tirx.log(total(*i)), name="finish")

    e.set(node.outputs[0], e.te(fn, e.plain(x), name="reducelogsumexp"))


def _arg(e: Emitter, node: onnx_ir.Node) -> None:
    """ArgMax and ArgMin: one reduction of (index, value) pairs; the first extreme wins, or the last."""
    x = first(node)
    shape = e.shape(x)
    axis = e.attribute(node, "axis", 0) % len(shape)
    keeps, takes_last = bool(e.attribute(node, "keepdims", 1)), bool(e.attribute(node, "select_last_index", 0))
    sign = -1 if node.op_type == "ArgMin" else 1
    result = [1 if k == axis else s for k, s in enumerate(shape) if keeps or k != axis]
    if axis == len(shape) - 1 and row_reduce.takes(e, e.dtype(x), shape[axis]):
        what = row_reduce.Extreme(node.op_type.lower(), is_least=sign < 0, is_last=takes_last)
        y = row_reduce.place(e, e.plain(x), shape[:axis], shape[axis], what)
        e.set(node.outputs[0], e.reshape(y, tuple(result)))
        return

    def better(a: Any, b: Any) -> Any:
        ahead = a[1] > b[1] if sign > 0 else a[1] < b[1]
        nearer = a[0] > b[0] if takes_last else a[0] < b[0]
        # Index -1 stands for "nothing yet" and loses against everything.
        wins = tirx.any(b[0] < 0, tirx.all(a[0] >= 0, tirx.any(ahead, tirx.all(tirx.EQ(a[1], b[1]), nearer))))
        return tirx.Select(wins, a[0], b[0]), tirx.Select(wins, a[1], b[1])

    def nothing(_index: str, value: str) -> Any:
        return constant(-1, "int64"), tirx.min_value(value) if sign > 0 else tirx.max_value(value)

    def fn(a: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, shape[axis]), name="k")
        pick = te.comm_reducer(better, nothing, name="arg")

        def element(*i: Expr) -> Expr:
            rest = i[axis + 1 :] if keeps else i[axis:]
            return pick((k.var.astype("int64"), a(*i[:axis], k, *rest)), axis=k)

        index, _ = te.compute(tuple(result), element, name="arg")
        return te.compute(tuple(result), lambda *i: index(*i), name="index")

    e.set(node.outputs[0], e.te(fn, e.plain(x), name=node.op_type.lower()))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_RECIPES, _reduce),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceProd": _reduce,
}
