"""Ops that read or write elements at indices computed at run time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import onnx_ir
from tvm import te, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax import dims, scatter
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets._relax.mapped import constant, held, mapped
from mc_opt.targets._relax.scatter import at_index
from mc_opt.targets._relax.shape import first
from mc_opt.targets.kernels import _loops, lookup

Expr = Any


def _second(node: onnx_ir.Node) -> onnx_ir.Value:
    value = node.inputs[1]
    assert value is not None
    return value


def _gather(e: Emitter, node: onnx_ir.Node) -> None:
    x, indices = first(node), _second(node)
    shape, picked = e.shape(x), e.shape(indices)
    axis = e.attribute(node, "axis", 0) % len(shape)
    packed = e.lookup(x)
    if packed is not None:
        e.set(node.outputs[0], lookup.gather(e, packed, e.plain(indices), axis))
        return
    result = (*shape[:axis], *picked, *shape[axis + 1 :])

    known = e.constant(indices)
    if known is not None and known.size == 1 and isinstance(shape[axis], int):
        place = int(known.reshape(-1)[0]) % shape[axis]

        def fixed(r: Any, i: Any) -> Expr:
            return r[0](*i[:axis], place, *i[axis + len(picked) :])

        mapped(e, node.outputs[0], result, [held(e, x)], fixed, name="gather")
        return

    def element(r: Any, i: Any) -> Expr:
        index = r[1](*i[axis : axis + len(picked)])
        return r[0](*i[:axis], at_index(index, shape[axis]), *i[axis + len(picked) :])

    mapped(e, node.outputs[0], result, [held(e, x), (e.plain(indices), "plain")], element, name="gather")


def _gather_elements(e: Emitter, node: onnx_ir.Node) -> None:
    x, indices = first(node), _second(node)
    shape = e.shape(x)
    axis = e.attribute(node, "axis", 0) % len(shape)

    def element(r: Any, i: Any) -> Expr:
        return r[0](*i[:axis], at_index(r[1](*i), shape[axis]), *i[axis + 1 :])

    operands = [held(e, x), held(e, indices)]
    mapped(e, node.outputs[0], e.shape(indices), operands, element, name="gather_elements")


def _gather_nd(e: Emitter, node: onnx_ir.Node) -> None:
    x, indices = first(node), _second(node)
    shape, picked = e.shape(x), e.shape(indices)
    batch, depth = e.attribute(node, "batch_dims", 0), picked[-1]
    result = (*picked[:-1], *shape[batch + depth :])

    def element(r: Any, i: Any) -> Expr:
        at = [at_index(r[1](*i[: len(picked) - 1], k), shape[batch + k]) for k in range(depth)]
        return r[0](*i[:batch], *at, *i[len(picked) - 1 :])

    mapped(e, node.outputs[0], result, [held(e, x), (e.plain(indices), "plain")], element, name="gather_nd")


def _scatter_nd(e: Emitter, node: onnx_ir.Node) -> None:
    """Rows written one after the other, or, on a GPU and for sums, each element looking for what hits it."""
    x, indices = first(node), _second(node)
    updates = node.inputs[2]
    assert updates is not None
    reduction = e.attribute(node, "reduction", "none")
    if reduction not in ("none", "add"):
        raise TargetError(f"ScatterND {node.name!r}: no kernel for reduction={reduction}; use --target onnx")
    if reduction == "none" and e.machine.kind != "cuda":
        scatter.rows(e, x, indices, updates, node.outputs[0])
        return
    shape, picked = e.shape(x), e.shape(indices)
    depth, rows = picked[-1], math.prod(picked[:-1])
    flat = e.reshape(e.plain(indices), (rows, depth))
    values = e.reshape(e.plain(updates), (rows, *shape[depth:]))
    e.set(
        node.outputs[0],
        e.te(
            functools.partial(_looked_for, adds=reduction == "add", depth=depth),
            e.plain(x),
            flat,
            values,
            name="scatter_nd",
        ),
    )


def _looked_for(a: te.Tensor, index: te.Tensor, value: te.Tensor, *, adds: bool, depth: int) -> te.Tensor:
    """Each element of `a` finds the sum, or the last, of the updates that hit it: no order of writes, no race."""
    shape = dims.sizes(a)
    k = te.reduce_axis((0, dims.sizes(index)[0]), name="k")

    def hit(i: Any) -> Expr:
        return tirx.all(
            *(tirx.EQ(at_index(index(k, d), shape[d]).astype("int64"), i[d].astype("int64")) for d in range(depth))
        )

    def added(*i: Expr) -> Expr:
        return te.sum(tirx.Select(hit(i), value(k, *i[depth:]), constant(0, str(a.dtype))), axis=k)

    if adds:
        total = te.compute(shape, added, name="added")
        return te.compute(shape, lambda *i: a(*i) + total(*i), name="scatter_nd")
    nothing = tirx.const(-1, "int32")
    winner = te.compute(
        shape[:depth],
        lambda *i: te.max(tirx.Select(hit(i), k.var.astype("int32"), nothing), axis=k),
        name="winner",
    )

    def element(*i: Expr) -> Expr:
        row = winner(*i[:depth])
        return tirx.if_then_else(row >= 0, value(tirx.max(row, 0), *i[depth:]), a(*i))

    return te.compute(shape, element, name="scatter_nd")


def _scatter_elements(e: Emitter, node: onnx_ir.Node) -> None:
    """The updates one after the other: of two that hit one element the last stays, or both count."""
    x, indices, updates = first(node), _second(node), node.inputs[2]
    assert updates is not None
    reduction = str(e.attribute(node, "reduction", "none"))
    shape, picked, dtype = e.shape(x), e.shape(indices), e.dtype(x)
    axis = e.attribute(node, "axis", 0) % len(shape)
    size, count = math.prod(shape), math.prod(picked)
    if count == 0:
        e.alias(node.outputs[0], x)
        return

    def body(a: Any, index: Any, value: Any, y: Any) -> None:
        with T.serial(0, size) as k:
            T.buffer_store(y, a[k], [k])
        with T.serial(0, count) as k:
            place, rest, step = tirx.const(0, "int64"), k.astype("int64"), 1
            for d in reversed(range(len(shape))):
                along = at_index(index[k].astype("int64"), shape[d]) if d == axis else rest % picked[d]
                place, rest, step = place + along * step, rest // picked[d], step * shape[d]
            T.buffer_store(y, _REDUCTIONS[reduction](y[place], value[k]), [place])

    arguments = [((size,), dtype), ((count,), e.dtype(indices)), ((count,), dtype), ((size,), dtype)]
    inputs = [e.reshape(e.plain(v), (math.prod(e.shape(v)),)) for v in (x, indices, updates)]
    y = e.call(_loops.kernel(arguments, body), inputs, [((size,), dtype)], name="scatter_elements")[0]
    e.set(node.outputs[0], e.reshape(y, shape))


_REDUCTIONS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "none": lambda _old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": tirx.max,
    "min": tirx.min,
}


HANDLERS: dict[str, Handler] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}
