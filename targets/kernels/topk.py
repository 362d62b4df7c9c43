"""TopK along any axis: elements are inserted one by one into the k best so far, which are the result.

Of equal elements the first stays ahead, as in ONNX Runtime. A row costs one comparison an element and up to k
moves for each that gets in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import onnx_ir
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._base import TargetError
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets._relax.shape import first, ints
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._loops import Buffer, Expr

# Moves in one row from which sorting would pay.
_MANY = 1 << 24


def topk(e: Emitter, node: onnx_ir.Node) -> None:
    """TopK; `sorted=0` leaves the order open, and is sorted too."""
    x = first(node)
    shape, dtype = e.shape(x), e.dtype(x)
    axis = int(e.attribute(node, "axis", -1)) % len(shape)
    outer, length, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    (count,) = ints(e, node, 1, "the number K") or [0]
    if not 0 < count <= length:
        raise TargetError(f"TopK {node.name!r}: K is {count}, expected 1 to {length}, the length of axis {axis}")
    if count * length > _MANY:
        e.note_fallback(f"TopK {node.name}: inserts {length} elements into {count}; a smaller K is faster")
    flat, kept = (outer, length, inner), (outer, count, inner)
    outputs = [(kept, dtype), (kept, "int64")]
    largest = bool(e.attribute(node, "largest", 1))
    body = functools.partial(_insert, flat, count, e.machine, largest)
    function = _loops.kernel([(flat, dtype), *outputs], body)
    made = e.call(function, [e.reshape(e.plain(x), flat)], outputs, name="topk")
    for value, expr in zip(node.outputs, made, strict=False):
        e.set(value, e.reshape(expr, (*shape[:axis], count, *shape[axis + 1 :])))


def _insert(
    shape: Sequence[int], count: int, machine: Machine, largest: bool, x: Buffer, y: Buffer, index: Buffer
) -> None:
    outer, length, inner = shape

    def ahead(a: Expr, b: Expr) -> Expr:
        return a > b if largest else a < b

    with _loops.each(outer, machine, work=8 * outer * length * inner) as o, T.serial(0, inner) as i:
        place = _loops.registers(1, 1, "int32", scope=_loops.own_scope(machine))
        with T.serial(0, length) as n:
            T.buffer_store(place, tirx.min(n, tirx.const(count, "int32")), [0])
            before = tirx.max(place[0] - 1, tirx.const(0, "int32"))
            with T.While(tirx.all(place[0] > 0, ahead(x[o, n, i], y[o, before, i]))):
                with T.If(place[0] < count), T.Then():
                    T.buffer_store(y, y[o, before, i], [o, place[0], i])
                    T.buffer_store(index, index[o, before, i], [o, place[0], i])
                T.buffer_store(place, place[0] - 1, [0])
            with T.If(place[0] < count), T.Then():
                T.buffer_store(y, x[o, n, i], [o, place[0], i])
                T.buffer_store(index, n.astype("int64"), [o, place[0], i])


HANDLERS: dict[str, Handler] = {"TopK": topk}
