"""Resize in float32: rows of pictures made of rows, their columns permuted in registers, one axis after the other.

    y[i, j] = Σ_k v[i, k] · Σ_l w[j, l] · x[r(i, k), c(j, l)]

Two axes that stand side by side are one kernel. A row whose columns were made is kept while other rows need it; where
there are fewer rows than before, rows are summed first. What repeats whole columns of channels between convolutions
stays an expression: vectors of channels as they are, which what follows (a concatenation) makes as it reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir
from tvm import relax
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets._relax.resize import Axis, axes_of, general
from mc_opt.targets._relax.shape import first
from mc_opt.targets.kernels import _loops, _resample
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels._resample import Columns

# Operations that a number of the result counts where threads are considered: a resize is often the only kernel of a
# model that is long enough for them, and what it then writes lies in the caches of several cores.
_WORK = 2
# A column that is made of others takes so many times as long as a number of a sum of rows, as long as the rows whose
# columns are made stay in the first cache (measured: twice as large, pictures of 20 x 20 to 40 x 40 come 1.3 times as
# fast with their columns first, but 0.8 times where 64 channels of 80 columns are kept).
_MADE = 2
# Up to so many copies of a row are written at a time.
_COPIES = 8


def resize(e: Emitter, node: onnx_ir.Node) -> None:
    """Resize in the layout in which the input is held."""
    x, output = first(node), node.outputs[0]
    axes = axes_of(e, node)
    if not axes:
        e.alias(output, x)
        return
    layout = e.layout(x)
    is_repeated = layout == "nhwc" and all(axis.factor and axis.number > 1 for axis in axes)
    if is_repeated or not _takes(e, x, axes):
        general(e, node, axes)
        return
    value = e.nhwc(x) if layout == "nhwc" else e.plain(x)
    rank = len(e.shape(x))
    order = [0, *range(2, rank), 1] if layout == "nhwc" else list(range(rank))
    places = sorted((order.index(axis.number), axis) for axis in axes)
    name = f"resize_{e.attribute(node, 'mode', 'nearest')}"
    while places:
        # The last two last: what comes before them has less to do.
        is_pair = len(places) == 2 and math.prod(dims.sizes(value)[places[0][0] + 1 : places[1][0]]) == 1
        value = _pass(e, value, places[: 2 if is_pair else 1], name)
        places = places[2 if is_pair else 1 :]
    e.set(output, value, layout)


def _takes(e: Emitter, x: onnx_ir.Value, axes: Sequence[Axis]) -> bool:
    """Whether the loops here do it: float32 on a processor, from the first element to the last, nothing outside."""
    is_ascending = all((np.diff(axis.taps, axis=0) >= 0).all() and axis.outside is None for axis in axes)
    is_empty = 0 in e.shape(x) or any(axis.new == 0 for axis in axes)
    return e.dtype(x) == "float32" and e.machine.kind != "cuda" and is_ascending and not is_empty


@dataclasses.dataclass(frozen=True)
class _Picture:
    """One pass: x [outer, height, columns] -> [outer, new height, new columns]; `rows` is None where they stay."""

    outer: int
    height: int
    rows: Axis | None
    columns: Columns

    @property
    def new_height(self) -> int:
        return self.height if self.rows is None else self.rows.new

    @property
    def wide(self) -> int:
        """Numbers of a row."""
        return self.columns.length * self.columns.depth

    @property
    def new_wide(self) -> int:
        """Numbers of a new row."""
        return self.columns.new * self.columns.depth


def _pass(e: Emitter, x: relax.Expr, places: Sequence[tuple[int, Axis]], name: str) -> relax.Expr:
    """x with one axis resized, or two that stand side by side."""
    shape = dims.sizes(x)
    result = list(shape)
    for place, axis in places:
        result[place] = axis.new
    last, axis = places[-1]
    behind = math.prod(shape[last + 1 :])
    if len(places) == 1 and behind > 1 and (axis.weights is not None or behind >= e.machine.lanes):
        # Rows alone: as long as all that stands behind the axis.
        columns = Columns(behind, behind, 1, None, e.machine)
        picture = _Picture(math.prod(shape[:last]), shape[last], axis, columns)
    else:
        columns = Columns(shape[last], axis.new, behind, axis, e.machine)
        start = places[0][0]
        rows = places[0][1] if len(places) == 2 else None
        height = shape[start] if rows is not None else math.prod(shape[:last])
        picture = _Picture(math.prod(shape[:start]) if rows is not None else 1, height, rows, columns)
    body, tables = _body(picture, e.machine)
    flat, made = (math.prod(shape),), (math.prod(result),)
    arguments = [(flat, "float32"), *((t.shape, str(t.dtype)) for t in tables), (made, "float32")]
    function = _loops.kernel(arguments, body)
    operands = [e.reshape(x, flat), *[e.weight(t) for t in tables]]
    return e.reshape(e.call(function, operands, [(made, "float32")], name=name)[0], result)


def _body(p: _Picture, machine: Machine) -> tuple[functools.partial[None], list[np.ndarray]]:
    """The loops of a pass and the tables that they read, those of the columns first."""
    columns, rows = p.columns.tables(), p.rows
    if rows is None:
        return functools.partial(_each_row, p, machine), columns
    if rows.weights is None:
        source, begin = np.unique(rows.taps[:, 0], return_index=True)
        begin = np.append(begin, rows.new).astype(np.int32)
        return functools.partial(_copied, p, machine, begin), [*columns, source.astype(np.int32), begin]
    if p.columns.axis is None:
        return functools.partial(_summed, p, machine), [*columns, rows.taps * p.wide, rows.weights]
    used, taps = len(np.unique(rows.taps)), rows.taps.shape[1]
    in_l1 = taps * p.new_wide * 4 <= machine.l1
    made = p.new_wide * p.columns.taps * (_MADE if in_l1 else 1)
    if rows.new * (p.wide * taps + made) <= used * made + rows.new * p.new_wide * taps:
        return functools.partial(_summed, p, machine), [*columns, rows.taps * p.wide, rows.weights]
    blocks = 1 if p.outer % machine.threads == 0 else machine.threads
    height = -(-rows.new // blocks)
    slots = rows.taps % taps * p.new_wide
    return functools.partial(_kept, p, machine, height), [*columns, *_fresh(rows, height), slots, rows.weights]


def _fresh(rows: Axis, height: int) -> tuple[np.ndarray, np.ndarray]:
    """For each new row the old ones that no row before it in a block of `height` has needed: from, and how many."""
    first, beyond = rows.taps.min(1), rows.taps.max(1) + 1
    before = np.where(np.arange(rows.new) % height == 0, 0, np.append(0, beyond[:-1]))
    since = np.maximum(first, before).astype(np.int32)
    return since, (beyond - since).astype(np.int32)


def _each(p: _Picture, count: int, machine: Machine) -> Expr:
    """A loop over [0, count), split among threads where the result is large enough."""
    return _loops.each(count, machine, work=_WORK * p.outer * p.new_height * p.new_wide)


def _each_row(p: _Picture, machine: Machine, x: Buffer, *rest: Buffer) -> None:
    *tables, y = rest
    with _each(p, p.height, machine) as h:
        p.columns.write((x, h * p.wide), _resample.into((y, h * p.new_wide)), tables)


def _copied(p: _Picture, machine: Machine, starts: np.ndarray, x: Buffer, *rest: Buffer) -> None:
    """Every row that is used becomes one or several equal ones."""
    *tables, source, begin, y = rest
    used, counts = len(starts) - 1, np.diff(starts)
    copies = int(counts[0]) if (counts == counts[0]).all() and counts[0] <= _COPIES else 0
    with _each(p, p.outer * used, machine) as t:
        outer, r = t // used, t % used
        row = (x, (outer * p.height + source[r]) * p.wide)
        top = outer * p.new_height
        if copies:
            made = [(y, (top + r * copies + k) * p.new_wide) for k in range(copies)]
            p.columns.write(row, _resample.into(*made), tables)
            return
        first = (top + begin[r]) * p.new_wide
        p.columns.write(row, _resample.into((y, first)), tables)
        with T.serial(1, begin[r + 1] - begin[r]) as k:
            again = dataclasses.replace(p.columns, length=p.columns.new, axis=None)
            again.write((y, first), _resample.into((y, first + k * p.new_wide)), [])


def _summed(p: _Picture, machine: Machine, x: Buffer, *rest: Buffer) -> None:
    """Every new row summed of old ones, then its columns made."""
    *tables, taps, weights, y = rest
    count = int(taps.shape[1])
    with _each(p, p.outer * p.new_height, machine) as t:
        top, r = t // p.new_height * (p.height * p.wide), t % p.new_height
        sources = [(x, top + taps[r, k]) for k in range(count)]
        made = (y, t * p.new_wide)
        if p.columns.axis is None:
            _sum(p.wide, sources, [weights[r, k] for k in range(count)], made, machine)
            return
        line = T.sblock_alloc_buffer((p.wide,), "float32")
        _sum(p.wide, sources, [weights[r, k] for k in range(count)], (line, 0), machine)
        p.columns.write((line, 0), _resample.into(made), tables)


def _kept(p: _Picture, machine: Machine, height: int, x: Buffer, *rest: Buffer) -> None:
    """The columns of old rows, made once and kept in as many places as a new row has taps; sums of those."""
    *tables, since, fresh, slots, weights, y = rest
    taps = int(slots.shape[1])
    blocks = -(-p.new_height // height)
    with _each(p, p.outer * blocks, machine) as t:
        outer, start = t // blocks, t % blocks * height
        lines = T.sblock_alloc_buffer((taps * p.new_wide,), "float32")
        with T.serial(0, height if blocks == 1 else T.min(height, p.new_height - start)) as k:
            r = start + k
            with T.serial(0, fresh[r]) as n:
                row = since[r] + n
                place = (lines, row % taps * p.new_wide)
                p.columns.write((x, (outer * p.height + row) * p.wide), _resample.into(place), tables)
            sources = [(lines, slots[r, k]) for k in range(taps)]
            made = (y, (outer * p.new_height + r) * p.new_wide)
            _sum(p.new_wide, sources, [weights[r, k] for k in range(taps)], made, machine)


def _sum(
    length: int, sources: Sequence[_resample.Place], weights: Sequence[Expr], made: _resample.Place, machine: Machine
) -> None:
    """One row of the weighted sum of others."""
    at, factors = _resample.held([start for _, start in sources], "int32"), _resample.held(weights)
    put = _resample.into(made)

    def add(i: Expr, width: int) -> None:
        items = [_loops.load(buffer, at[k] + i, lanes=width) for k, (buffer, _) in enumerate(sources)]
        put(i, _resample.weighted(items, factors, width), width)

    _resample.vectors(length, machine.lanes, add)


HANDLERS: dict[str, Handler] = {"Resize": resize}
