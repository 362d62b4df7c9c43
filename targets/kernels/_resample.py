"""Rows and columns of pictures made of other rows and columns: the loops of `resize`.

A picture is [outer, rows, columns · depth], all numbers in one row of memory; a `Place` is where a row of it begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.resize import Axis
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._loops import Buffer, Expr

Place = tuple[Buffer, Expr]
# Takes `width` values from an index of a row on.
Put = Callable[[Expr, Expr, int], None]

# Up to so many copies of an element are written out.
_COPIES = 8
# Lanes of AVX-512.
_WIDE = 16


def vectors(length: int, lanes: int, write: Callable[[Expr, int], None]) -> None:
    """Call `write(index, width)` for all of [0, length); the last vector begins where it ends with the row."""
    if length < lanes:
        for start, count, width in _loops.split(length, lanes):
            for k in range(count):
                write(_number(start + k * width), width)
        return
    with T.serial(0, length // lanes) as i:
        write(i * lanes, lanes)
    if length % lanes:
        write(_number(length - lanes), lanes)


def _number(value: int) -> Expr:
    return tirx.const(value, "int32")


def _load(place: Place, index: Expr, width: int) -> Expr:
    return _loops.load(place[0], place[1] + index, lanes=width)


def into(*places: Place) -> Put:
    """What writes the same into each of several rows."""

    def put(index: Expr, value: Expr, width: int) -> None:
        # An expression that stands in several stores would be computed for each.
        kept = _loops.registers(1, width)
        _loops.store(kept, value, 0, lanes=width)
        for buffer, start in places:
            _loops.store(buffer, _loops.load(kept, 0, lanes=width), start + index, lanes=width)

    return put


@dataclasses.dataclass(frozen=True)
class Columns:
    """How a row becomes another one.

    Attributes:
        length: columns that there are.
        new: columns that there will be.
        depth: numbers of a column.
        axis: the taps; None where the columns stay.
        machine: whose vectors they are.
    """

    length: int
    new: int
    depth: int
    axis: Axis | None
    machine: Machine

    @property
    def taps(self) -> int:
        """Columns that make one."""
        return 1 if self.axis is None else self.axis.taps.shape[1]

    @property
    def _registers(self) -> int:
        """Vectors of neighbours that hold all taps of a vector of columns; 0 where these are gathered."""
        lanes = self.machine.lanes
        most = 0 if self.machine.kind != "x86" else 2 if lanes == _WIDE else 1
        low, high = self._reach()
        needed = int((high - low).max()) // lanes + 1
        return needed if needed <= most and needed * lanes <= self.length else 0

    def _reach(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last tap of each vector of columns."""
        assert self.axis is not None
        taps = self.axis.taps[self._order()]
        return taps.min((1, 2)), taps.max((1, 2))

    def _order(self) -> np.ndarray:
        """The columns of each vector [vectors, lanes]; those of a row that is shorter than one repeat the last."""
        lanes = self.machine.lanes
        first = np.minimum(np.arange(0, self.new, lanes), max(self.new - lanes, 0))
        return np.minimum(first[:, None] + np.arange(lanes), self.new - 1)

    def tables(self) -> list[np.ndarray]:
        """What `write` reads besides the row: where vectors begin, indices, weights."""
        if self.axis is None or self._is_repeated():
            return []
        if self.depth > 1:
            return [t for t in (self.axis.taps * self.depth, self.axis.weights) if t is not None]
        taps = self.axis.taps[self._order()].transpose(0, 2, 1)  # [vectors, k, lanes]
        registers = self._registers
        found = [taps]
        if registers:
            start = np.minimum(self._reach()[0], self.length - registers * self.machine.lanes).astype(np.int32)
            found = [start, taps - start[:, None, None]]
        if self.axis.weights is not None:
            found.append(self.axis.weights[self._order()].transpose(0, 2, 1))
        return [np.ascontiguousarray(t).reshape(-1) for t in found]

    def _is_repeated(self) -> bool:
        return self.axis is not None and 1 < self.axis.factor <= _COPIES

    def write(self, row: Place, put: Put, tables: Sequence[Buffer]) -> None:
        """Make the new row of `row`."""
        if self.axis is None:
            vectors(self.length * self.depth, self.machine.lanes, lambda i, w: put(i, _load(row, i, w), w))
        elif self._is_repeated():
            self._repeat(row, put, self.axis.factor)
        elif self.depth > 1:
            self._mix(row, put, *tables)
        else:
            self._pick(row, put, tables)

    def _repeat(self, row: Place, put: Put, factor: int) -> None:
        """Each column `factor` times."""
        lanes, depth = self.machine.lanes, self.depth

        def spread(i: Expr, width: int) -> None:
            value = _load(row, i, width)
            for j in range(factor):
                lane = [(j * width + k) // factor for k in range(width)]
                put(i * factor + j * width, value if width == 1 else tirx.Shuffle([value], lane), width)

        if depth == 1:
            vectors(self.length, lanes, spread)
            return
        with T.serial(0, self.length) as c:

            def copy(i: Expr, width: int) -> None:
                value = _load(row, c * depth + i, width)
                for j in range(factor):
                    put((c * factor + j) * depth + i, value, width)

            vectors(depth, lanes, copy)

    def _mix(self, row: Place, put: Put, taps: Buffer, weights: Buffer | None = None) -> None:
        """Each column from a few others, number by number of its depth."""
        with T.serial(0, self.new) as c:
            at = held([taps[c, k] for k in range(self.taps)], "int32")
            factors = None if weights is None else held([weights[c, k] for k in range(self.taps)])

            def add(i: Expr, width: int) -> None:
                items = [_load(row, at[k] + i, width) for k in range(self.taps)]
                put(c * self.depth + i, weighted(items, factors, width), width)

            vectors(self.depth, self.machine.lanes, add)

    def _pick(self, row: Place, put: Put, tables: Sequence[Buffer]) -> None:
        """Vectors of columns, each permuted out of neighbours, or gathered."""
        lanes, registers = self.machine.lanes, self._registers
        rest = list(tables)
        start = rest.pop(0) if registers else None
        index, weights = rest.pop(0), rest.pop(0) if rest else None

        def vector(v: Expr) -> Expr:
            window = [] if start is None else [_load(row, start[v] + m * lanes, lanes) for m in range(registers)]
            total = None
            for k in range(self.taps):
                at = (v * self.taps + k) * lanes
                item = _permuted(window, index, at, lanes) if window else self._gathered(row, index, at)
                item = item if weights is None else item * _loops.load(weights, at, lanes=lanes)
                total = item if total is None else total + item
            return total

        if self.new < lanes:
            value = _loops.registers(1, lanes)
            _loops.store(value, vector(_number(0)), 0, lanes=lanes)
            vectors(self.new, lanes, lambda i, w: put(i, _loops.load(value, i, lanes=w), w))
            return
        with T.serial(0, self.new // lanes) as v:
            put(v * lanes, vector(v), lanes)
        if self.new % lanes:
            put(_number(self.new - lanes), vector(_number(self.new // lanes)), lanes)

    def _gathered(self, row: Place, index: Buffer, at: Expr) -> Expr:
        buffer, start = row
        lanes = self.machine.lanes
        if self.machine.kind != "x86":
            items = _loops.registers(1, lanes)
            for k in range(lanes):
                _loops.store(items, buffer[start + index[at + k]], k, lanes=1)
            return _loops.load(items, 0, lanes=lanes)
        first, none = tirx.address_of(buffer[start]), _loops.splat(0.0, lanes)
        # No pure call: the row may be one that changes.
        if lanes == _WIDE:
            every = T.broadcast(tirx.const(True, "bool"), lanes)
            name, size = "llvm.x86.avx512.mask.gather.dps.512", tirx.const(4, "int32")
        else:
            every = tirx.reinterpret(f"float32x{lanes}", _loops.splat(-1, lanes, "int32"))
            name, size = "llvm.x86.avx2.gather.d.ps.256", tirx.const(4, "int8")
        chosen = _loops.load(index, at, lanes=lanes)
        return T.call_llvm_intrin(f"float32x{lanes}", name, none, first, chosen, every, size)


def _permuted(window: Sequence[Expr], index: Buffer, at: Expr, lanes: int) -> Expr:
    """The lanes that indices from `at` on choose of one or two vectors."""
    chosen = _loops.load(index, at, lanes=lanes)
    if len(window) == 2:
        low, high = window
        return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", low, chosen, high)
    if lanes == _WIDE:
        return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", window[0], chosen)
    return T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", window[0], chosen)


def held(values: Sequence[Expr], dtype: str = "float32") -> Buffer:
    """A few numbers in registers."""
    kept = _loops.registers(len(values), 1, dtype)
    for k, value in enumerate(values):
        T.buffer_store(kept, value, [k])
    return kept


def weighted(items: Sequence[Expr], factors: Buffer | None, width: int) -> Expr:
    """Σ_k items[k] · factors[k]; the one item where there are no factors."""
    if factors is None:
        (item,) = items
        return item
    terms = [item * _loops.splat(factors[k], width) for k, item in enumerate(items)]
    return sum(terms[1:], terms[0])
