"""The loops of a convolution whose outputs read many input channels: tiles of positions by output channels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _loops, _tile
from mc_opt.targets.kernels._expressions import Expr, is_load, walk
from mc_opt.targets.kernels._nest import Nest, Span, Sums, spans
from mc_opt.targets.kernels._window import Sliding

# Channels that a block of the weight has at least: its sums are read and written once a block.
_SHORTEST_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class _Block:
    """Steps that are multiplied at once: all of them, or of one tap the channels from `first` on.

    Attributes:
        taps: the taps of the kernel; empty for all of them.
        first: the first channel.
        channels: how many.
        memory: where sums stay between blocks; None where there is one block only.
        is_last: whether sums end here.
    """

    taps: Sequence[Expr]
    first: Expr | int
    channels: int
    memory: Any = None
    is_last: Expr | bool = True


class Dense(Nest):
    """A convolution: panels of the packed weight outside when the weight is large, positions outside when it is not."""

    def __init__(self, sums: Sums, window: Sliding, machine: Machine) -> None:
        super().__init__(sums, window, machine)
        loads = [x.source for x in walk(sums.term) if is_load(x)]
        rank = len(window.axes)
        self.source = next(b for b in loads if len(b.shape) == rank + 2)
        self.weight = next(b for b in loads if len(b.shape) == rank + 3)
        self.taps = [axis.kernel for axis in window.axes]
        self.flat = self._is_flat()
        rows = self.positions[-2] if rank > 1 else 1
        self.rows, self.width = (1, rows * self.positions[-1]) if self.flat else (rows, self.positions[-1])
        self.leading = self.positions[:-2]
        item = np.dtype(self.dtype).itemsize
        self.row_bytes = window.columns * item  # of one step of a panel
        self.bytes = math.prod(int(s) for s in self.weight.shape) * item

    def _is_flat(self) -> bool:
        """Whether the positions of an image may be counted in one row: source and results have the same."""
        axes, rank = self.window.axes, len(self.window.axes)
        if rank < 2 or any(a.kernel != 1 or a.stride != 1 or a.before for a in axes):
            return False
        if [int(s) for s in self.source.shape[1:-1]] != self.positions:
            return False
        row, column = self.sums.consumer[rank - 1 : rank + 1]
        pairs = uses = 0
        width = self.positions[-1]
        values = [*self.sums.made.indices, self.sums.made.value]
        for x in (x for value in values for x in walk(value)):
            uses += x.same_as(row) or x.same_as(column)
            if is_load(x):
                pairs += _pairs(x.source, x.indices, row, column, width)
        pairs += _pairs(self.sums.made.buffer, self.sums.made.indices, row, column, width)
        return bool(uses == 2 * pairs)

    def write(self) -> None:
        """Tiles of columns | images | blocks of the weight | tiles of positions; small weights inside the positions."""
        columns, vector = self.window.columns, self.window.vector
        held = columns // vector
        tile = _tile.Tile(1, 1, columns, vector)
        high, wide = self.window.high, self.window.wide
        if not wide:
            high, wide = _tile.positions(self.rows, self.width, self.channels, tile, self.machine)
        rows, across = spans(self.rows, high), spans(self.width, wide)
        outer = [self.images, *self.leading]
        work = math.prod(dims.nominal(n) for n in [*self.sums.extents, *self.taps, self.sums.inputs])
        groups = [Span(0, held, self.channels // columns)] if self.channels >= columns else []
        if self.channels % columns:
            groups.append(Span(self.channels // columns, -(-(self.channels % columns) // vector), 1))
        if self.bytes <= self.machine.l1:
            for row in rows:
                with self.outer([*outer, row.count], work) as (*at, r):
                    for span in across:
                        with self.serial(span.count) as q:
                            for group in groups:
                                with self.serial(group.count) as t:
                                    self._tile(at, (row, r), (span, q), (group, t), self._whole())
            return
        block = self._block_channels(rows, across)
        for group in groups:
            with self.outer([group.count, *outer], work) as (t, *at):
                if not block:
                    self._positions(at, rows, across, (group, t), self._whole())
                    continue
                # Zeros from here on, not from the first block on: where it is touched is how long TVM keeps it.
                places = self.rows * self.width * group.size
                memory = T.sblock_alloc_buffer((places * vector,), self.dtype)
                with self.serial(places) as k, self.unrolled(vector) as (lane,):
                    T.buffer_store(memory, self.sums.start, [k * vector + lane])
                blocks = self.sums.inputs // block
                with ExitStack() as stack:
                    taps = [stack.enter_context(self.serial(k)) if k > 1 else self.index(0) for k in self.taps]
                    b = stack.enter_context(self.serial(blocks)) if blocks > 1 else self.index(0)
                    last = [x == n - 1 for x, n in zip([*taps, b], [*self.taps, blocks], strict=True) if n > 1]
                    part = _Block(taps, b * block, block, memory, tirx.all(*last))
                    self._positions(at, rows, across, (group, t), part)

    def _whole(self) -> _Block:
        return _Block((), 0, self.sums.inputs)

    def _block_channels(self, rows: Sequence[Span], along: Sequence[Span]) -> int:
        """Channels of a block of a panel that stays in the first-level cache; 0 where one pass takes the panel."""
        passes = sum(r.count for r in rows) * sum(s.count for s in along)
        panel = math.prod(self.taps) * self.sums.inputs * self.row_bytes
        sums = self.rows * self.width * self.row_bytes
        if passes < 2 or panel <= self.machine.l1 or sums > self.machine.l1:
            return 0
        most = self.machine.l1 // 2 // self.row_bytes
        divisors = [d for d in range(1, min(most, self.sums.inputs) + 1) if self.sums.inputs % d == 0]
        return divisors[-1] if divisors[-1] >= _SHORTEST_BLOCK else 0

    def _positions(
        self, at: Sequence[Expr], rows: Sequence[Span], along: Sequence[Span], group: tuple[Span, Expr], part: _Block
    ) -> None:
        across = sum(s.count for s in along)
        passes = across * sum(r.count for r in rows)
        before_rows = 0
        for row in rows:
            with self.serial(row.count) as r:
                before = 0
                for span in along:
                    with self.serial(span.count) as q:
                        number = (r + before_rows) * across + q + before
                        ahead = (number, passes) if part.memory is not None else None
                        self._tile(at, (row, r), (span, q), group, part, ahead)
                    before += span.count
            before_rows += row.count

    def _tile(
        self,
        at: Sequence[Expr],
        row: tuple[Span, Expr],
        span: tuple[Span, Expr],
        group: tuple[Span, Expr],
        part: _Block,
        ahead: tuple[Expr, int] | None = None,
    ) -> None:
        """One tile: begin or fetch its sums, add the block's steps, keep the sums or finish."""
        vector = self.window.vector
        high, wide, held = row[0].size, span[0].size, group[0].size
        row0, column0 = row[0].start + row[1] * high, span[0].start + span[1] * wide
        tile, memory = group[0].start + group[1], part.memory
        acc = _loops.registers(high * wide * held, vector, self.dtype)

        def register(i: Expr, j: Expr, v: Expr, lane: Expr) -> Expr:
            return ((i * wide + j) * held + v) * vector + lane

        def stored(i: Expr, j: Expr, v: Expr, lane: Expr) -> Expr:
            return (((row0 + i) * self.width + column0 + j) * held + v) * vector + lane

        def fetch() -> None:
            with self.unrolled(high, wide, held, vector) as k:
                T.buffer_store(acc, memory[stored(*k)], [register(*k)])

        def keep() -> None:
            with self.unrolled(high, wide, held, vector) as k:
                T.buffer_store(memory, acc[register(*k)], [stored(*k)])

        def finish() -> None:
            valid = min(self.channels - group[0].start * self.window.columns, held * vector)
            for first, count, width in _loops.split(valid, vector):
                with self.unrolled(high, wide, count, width) as (i, j, v, lane):
                    offset = v * width + first + lane
                    channel = tile * self.window.columns + offset
                    kept = self._kept(at, row0 + i, column0 + j, channel)
                    self.finish(acc, (i * wide + j) * held * vector + offset, kept)

        if memory is None:
            self.start(acc, high * wide * held, vector)
        else:
            fetch()
        with ExitStack() as stack:
            taps = part.taps or [stack.enter_context(self.serial(k)) if k > 1 else self.index(0) for k in self.taps]
            c = stack.enter_context(self.serial(part.channels))
            if ahead is not None:
                self._prefetch([tile, *taps, part.first], part.channels, ahead, c)
            with self.unrolled(high, wide, held, vector) as (i, j, v, lane):
                channel = tile * self.window.columns + v * vector + lane
                kept = self._kept(at, row0 + i, column0 + j, channel)
                self.add(acc, register(i, j, v, lane), kept, [*taps, part.first + c])
        if memory is None:
            finish()
        else:
            with T.If(part.is_last):
                with T.Then():
                    finish()
                with T.Else():
                    keep()

    def _kept(self, at: Sequence[Expr], row: Expr, column: Expr, channel: Expr) -> list[Expr | int]:
        if len(self.window.axes) == 1:
            return [*at, column, channel]
        return [*at, 0 if self.flat else row, column, channel]

    def _prefetch(self, where: Sequence[Expr | int], steps: int, ahead: tuple[Expr, int], step: Expr) -> None:
        """Fetch a part of the next block: each pass over this one takes its share, evenly among the steps."""
        number, passes = ahead
        share = -(-self.window.columns // passes)
        *tile, first = where
        place = self.weight[(*tile, first, steps * self.window.columns + (number * steps + step) * share)]
        read, keep, data = (tirx.const(k, "int32") for k in (0, 3, 1))
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", tirx.address_of(place), read, keep, data))


def _pairs(buffer: Any, indices: Sequence[Expr], row: Any, column: Any, width: int) -> int:
    """How often an element is found by row and column of an image in successive places, so that both count as one."""
    places = zip(indices, indices[1:], buffer.shape[1:], strict=False)
    return sum(a.same_as(row) and b.same_as(column) and dims.same(dims.dim(n), width) for a, b, n in places)
