"""Reductions along rows: sums and extremes of the axes that stand last in memory, and where an extreme is."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._loops import Buffer, Expr

# Rows as short as this are left to the general schedule.
_SHORTEST = 8
_NOWHERE = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Extreme:
    """The greatest element of a row, or the least; the first of equals, or the last; and the kernel's name."""

    name: str
    is_least: bool
    is_last: bool


def takes(e: Emitter, dtype: str, length: Dim) -> bool:
    """Whether rows of so many elements of a type have these loops; a GPU's threads share a row."""
    return e.machine.kind != "cuda" and dtype == "float32" and (not isinstance(length, int) or length >= _SHORTEST)


def lowest(dtype: str) -> float:
    """With what a greatest begins. `te.max` begins with the lowest finite number, above those that masks write."""
    return -math.inf if "float" in dtype else int(tirx.min_value(dtype).value)


def greatest(x: Expr, axis: Any) -> Expr:
    """The greatest element along axes of a tensor expression."""
    return te.comm_reducer(lambda a, b: tirx.max(a, b), lambda dtype: tirx.const(lowest(dtype), dtype), name="max")(
        x, axis=axis
    )


def least(x: Expr, axis: Any) -> Expr:
    """The least element along axes of a tensor expression."""

    def start(dtype: str) -> Expr:
        return tirx.const(math.inf, dtype) if "float" in dtype else tirx.max_value(dtype)

    return te.comm_reducer(lambda a, b: tirx.min(a, b), start, name="min")(x, axis=axis)


def folded(
    e: Emitter,
    x: relax.Expr,
    kept: Sequence[Dim],
    length: Dim,
    *,
    take: Callable[[Expr], Expr],
    combine: Callable[[Expr, Expr], Expr],
    start: float,
    finish: Callable[[Expr, Dim], Expr] | None,
    name: str,
) -> relax.Expr:
    """x: [Π kept · length] -> kept: finish(start combined with take(x) along each row, length)."""
    outer = dims.product(kept)
    rows = _loops.inside((outer, length))

    def body(a: Buffer, y: Buffer) -> None:
        count, size = rows
        with _loops.each(count, e.machine, work=4 * count * size) as o:
            total = _loops.reduce_row(
                lambda i, w: take(_loops.load(a, o, i, lanes=w)), size, combine, start, lanes=e.machine.lanes
            )
            T.buffer_store(y, total if finish is None else finish(total, size), [o])

    function = _loops.kernel([(rows, "float32"), ((rows[0],), "float32")], body)
    y = e.call(function, [e.reshape(x, (outer, length))], [((outer,), "float32")], name=name)[0]
    return e.reshape(y, kept)


def place(e: Emitter, x: relax.Expr, kept: Sequence[Dim], length: Dim, what: Extreme) -> relax.Expr:
    """x: [Π kept · length] -> int64 kept: where in each row the extreme is."""
    outer = dims.product(kept)
    rows = _loops.inside((outer, length))
    body = functools.partial(_place, rows, e.machine, what)
    function = _loops.kernel([(rows, "float32"), ((rows[0],), "int64")], body)
    y = e.call(function, [e.reshape(x, (outer, length))], [((outer,), "int64")], name=what.name)[0]
    return e.reshape(y, kept)


def _place(rows: Sequence[Dim], machine: Machine, what: Extreme, x: Buffer, y: Buffer) -> None:
    """Two passes over a row that stays in the cache: its extreme, then the first or last place that has it."""
    count, length = rows
    extreme, start = (tirx.min, math.inf) if what.is_least else (tirx.max, -math.inf)
    nowhere = tirx.const(-1 if what.is_last else _NOWHERE, "int32")
    with _loops.each(count, machine, work=8 * count * length) as o:
        best = _loops.reduce_row(
            lambda i, w: _loops.load(x, o, i, lanes=w), length, extreme, start, lanes=machine.lanes
        )

        def found(i: Expr, width: int) -> Expr:
            same = tirx.EQ(_loops.load(x, o, i, lanes=width), _loops.splat(best, width))
            index = i.astype("int32")
            here = index if width == 1 else T.ramp(index, 1, width)
            return tirx.Select(same, here, _loops.splat(nowhere, width, "int32"))

        at = _loops.reduce_row(
            found,
            length,
            tirx.max if what.is_last else tirx.min,
            int(nowhere.value),
            lanes=machine.lanes,
            dtype="int32",
        )
        # Where nothing is equal to the extreme, all are NaN.
        known = tirx.all(at >= 0, at < tirx.const(_NOWHERE, "int32"))
        T.buffer_store(y, tirx.Select(known, at, tirx.const(0, "int32")).astype("int64"), [o])
