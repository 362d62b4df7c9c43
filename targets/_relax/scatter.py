"""Rows written at places that are computed at run time; a state is written where it lies."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import onnx_ir
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter
from mc_opt.targets._relax.mapped import constant
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._math import type_of

Expr = Any
Buffer = Any


def at_index(index: Expr, extent: Dim) -> Expr:
    """An index that may count from the end, kept inside the axis: a kernel must not read wild memory."""
    size = constant(extent, type_of(index)) if isinstance(extent, int) else extent.astype(type_of(index))
    wrapped = tirx.Select(index < 0, index + size, index)
    low = constant(0, type_of(index))
    high = constant(extent - 1, type_of(index)) if isinstance(extent, int) else size - 1
    return tirx.max(low, tirx.min(high, wrapped))


def rows(e: Emitter, x: onnx_ir.Value, indices: onnx_ir.Value, updates: onnx_ir.Value, result: onnx_ir.Value) -> None:
    """Emit ScatterND, the rows one after the other: of two that hit one place the last stays.

    x: [.., tail], indices: [.., d], updates: [.., tail]. Where x is a state and `result` what it becomes, the kernel
    moves the updates alone; anything else is copied first.
    """
    shape, dtype, kind = e.shape(x), e.dtype(x), e.dtype(indices)
    picked = _loops.inside(e.shape(indices))
    tail = shape[picked[-1] :]
    write = functools.partial(_write, shape, picked, lanes=e.machine.lanes)
    given = [e.plain(x), e.plain(indices), e.plain(updates)]
    added = [(picked, kind), ((*picked[:-1], *tail), dtype)]
    if _overwrites(e, x, result):

        def over(y: Buffer, index: Buffer, value: Buffer) -> None:
            write(index, value, y)

        function = e.bb.add_func(_loops.kernel([(shape, dtype), *added], over), "scatter_in_place")
        e.set(result, e.bb.emit(relax.op.call_tir_inplace(function, given, 0, relax.TensorType(shape, dtype))))
        return

    def body(a: Buffer, index: Buffer, value: Buffer, y: Buffer) -> None:
        with T.serial(0, math.prod(shape[:-1])) as k:
            place = _unravel(k, shape[:-1])
            _loops.map_row(
                lambda i, width: _loops.store(y, _loops.load(a, *place, i, lanes=width), *place, i, lanes=width),
                shape[-1],
                lanes=e.machine.lanes,
            )
        write(index, value, y)

    function = _loops.kernel([(shape, dtype), *added, (shape, dtype)], body)
    e.set(result, e.call(function, given, [(shape, dtype)], name="scatter_nd")[0])


def _overwrites(e: Emitter, old: onnx_ir.Value, new: onnx_ir.Value) -> bool:
    """Whether the state `new` may be written over the input `old`, which nothing else reads, before or after."""
    unused = len(old.uses()) == 1 and not old.is_graph_output()
    return old in e.model.graph.inputs and unused and e.states.get(str(new.name)) == old.name


def _write(shape: Sequence[Dim], picked: Sequence[Dim], index: Buffer, value: Buffer, y: Buffer, *, lanes: int) -> None:
    """y[index[r]] = value[r] for every row r."""
    depth = picked[-1]
    *outer, last = shape[depth:] or (1,)
    with T.serial(0, dims.product([1, *picked[:-1]])) as r:
        row = _unravel(r, picked[:-1])
        place = [at_index(index[(*row, d)], shape[d]) for d in range(depth)]
        if depth == len(shape):
            T.buffer_store(y, value[tuple(row)] if row else value[0], place)
            return
        with T.serial(0, math.prod(outer)) as k:
            inner = _unravel(k, outer)
            _loops.map_row(
                lambda i, width: _loops.store(
                    y, _loops.load(value, *row, *inner, i, lanes=width), *place, *inner, i, lanes=width
                ),
                last,
                lanes=lanes,
            )


def _unravel(k: Expr, extents: Sequence[Dim]) -> list[Expr]:
    """Row-major indices of element k in a box, whose first extent may be open."""
    index: list[Expr] = []
    for extent in reversed(extents[1:]):
        index.insert(0, tirx.floormod(k, extent))
        k = tirx.floordiv(k, extent)
    return [k, *index] if extents else []
