"""The loops of a convolution with A ⊗ I_v for its weight: v neighbours in a vector read the same number of A.

A vector holds a few outputs of v numbers each; of the input it reads v numbers and repeats them, which costs no more
than the one number that a dense convolution repeats over all lanes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from tvm import tirx

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _loops, _split, _tile
from mc_opt.targets.kernels._expressions import Expr, is_load, rebuilt, walk
from mc_opt.targets.kernels._nest import Nest, Span, Sums, spans
from mc_opt.targets.kernels._window import Sliding


@dataclasses.dataclass(frozen=True)
class _Panels:
    """Panels of the weight from `first` on that hold `valid` channels each, in `held` vectors."""

    first: Expr | int
    count: int
    held: int
    valid: int


class Spread(Nest):
    """Panels of the packed weight outside when they do not fit the first cache, positions outside when they do."""

    def __init__(self, sums: Sums, window: Sliding, machine: Machine) -> None:
        super().__init__(sums, window, machine)
        loads = [x.source for x in walk(sums.term) if is_load(x)]
        self.weight = next(b for b in loads if len(b.shape) == len(window.axes) + 3)
        self.taps = [axis.kernel for axis in window.axes]

    def write(self) -> None:
        """Images and rows | panels | tiles of positions, or panels inside the positions."""
        columns, vector = self.window.columns, self.window.vector
        height = self.positions[-2] if len(self.positions) > 1 else 1
        tile = _tile.Tile(1, 1, columns, vector)
        high, wide = _tile.positions(height, self.positions[-1], self.channels, tile, self.machine)
        high, wide = self.window.high or high, self.window.wide or wide
        rows, across = spans(height, high), spans(self.positions[-1], wide)
        whole, rest = divmod(self.channels, columns)
        panels = [_Panels(0, whole, columns // vector, columns)] if whole else []
        panels += [_Panels(whole, 1, -(-rest // vector), rest)] if rest else []
        work = math.prod(dims.nominal(n) for n in [*self.sums.extents, *self.taps, self.sums.inputs])
        size = math.prod(int(s) for s in self.weight.shape) * np.dtype(self.dtype).itemsize
        outer = [self.images, *self.positions[:-2]]
        if size <= self.machine.l1:
            with self.outer(outer, work / _split.SUMS) as at:
                self._nested(at, rows, across, panels)
            return
        for panel in panels:
            with self.outer([panel.count, *outer], work / _split.SUMS) as (t, *at):
                self._nested(at, rows, across, [dataclasses.replace(panel, first=panel.first + t, count=1)])

    def _nested(
        self, at: Sequence[Expr], rows: Sequence[Span], across: Sequence[Span], panels: Sequence[_Panels]
    ) -> None:
        for row in rows:
            for span in across:
                with self.serial(row.count) as r, self.serial(span.count) as q:
                    corner = row.start + r * row.size, span.start + q * span.size
                    for panel in panels:
                        with self.serial(panel.count) as t:
                            self._tile(at, corner, (row.size, span.size), panel, panel.first + t)

    def _tile(
        self, at: Sequence[Expr], corner: tuple[Expr, Expr], size: tuple[int, int], panel: _Panels, number: Expr
    ) -> None:
        """The sums of `size` positions from a corner on, and of one panel's channels."""
        vector, columns = self.window.vector, self.window.columns
        count, held = size[0] * size[1], panel.held
        sums = self.registers(count, held, vector)

        def place(k: Expr) -> list[Expr]:
            inner = [corner[0] + k // size[1], corner[1] + k % size[1]]
            return [*at, *inner[-len(self.positions) :]]

        for acc in sums:
            self.start(acc.buffer, acc.count * held, vector)
        with ExitStack() as stack:
            taps = [stack.enter_context(self.serial(k)) if k > 1 else self.index(0) for k in self.taps]
            c = stack.enter_context(self.serial(self.sums.inputs))
            for acc in sums:
                with self.unrolled(acc.count, held, 1) as (k, v, _):
                    kept = [*place(acc.first + k), number * columns + v * vector]
                    self._add(acc.buffer, (k * held + v) * vector, kept, [*taps, c])
        for first, runs, width in _loops.split(panel.valid, vector):
            for acc in sums:
                with self.unrolled(acc.count, runs, width) as (k, v, lane):
                    offset = v * width + first + lane
                    kept = [*place(acc.first + k), number * columns + offset]
                    self.finish(acc.buffer, k * held * vector + offset, kept)

    def _add(self, acc: Any, at: Expr, kept: Sequence[Expr], steps: Sequence[Expr]) -> None:
        """Add the term of one step to the vector of sums at `at`."""
        axes = [*self.sums.kept, *self.sums.steps]
        where = dict(zip(axes, map(self.index, [*kept, *steps]), strict=True))
        lanes, behind = self.window.vector, self.window.behind

        def loaded(x: Expr) -> Expr | None:
            if not is_load(x):
                return None
            index = [rebuilt(i, where) for i in x.indices]
            if x.source.same_as(self.weight):
                return _loops.load(x.source, *index, lanes=lanes)
            return tirx.Shuffle([_loops.load(x.source, *index, lanes=behind)] * (lanes // behind), [*range(lanes)])

        term = rebuilt(self.sums.term, where, loaded)
        _loops.store(acc, self.sums.combine(_loops.load(acc, at, lanes=lanes), term), at, lanes=lanes)
