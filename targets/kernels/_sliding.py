"""The loops of a sliding window, written out: a tile of sums in registers, its consumers at the end of the tile.

TVM's primitives split an axis evenly and read a weight again for each tile of rows. Written out, the last tiles are as
small as what is left, windows step over their padding instead of reading zeros, and a weight that lies beyond the
caches is fetched once, block by block, while the block before it is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _loops, _split, _window
from mc_opt.targets.kernels._expressions import Expr
from mc_opt.targets.kernels._nest import Nest, read_sums
from mc_opt.targets.kernels._packed import Decoder
from mc_opt.targets.kernels._sliding_dense import Dense
from mc_opt.targets.kernels._sliding_spread import Spread

# Windows of at most so many taps are written out where no tap can be padding.
_UNROLLED_TAPS = 32


def written(function: Any, block: Any, consumer: Any | None, machine: Machine, *, stage: Any | None = None) -> Any:
    """The kernel of a block of sums and its only consumer, loop by loop; ValueError where they do not fit.

    `stage` is the block that decodes its weight, where that is packed.
    """
    window = _window.read(block.annotations)
    assert window is not None
    sums = read_sums(block, consumer)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        if window.channelwise:
            Channelwise(sums, window, machine).write()
        elif window.behind > 1:
            Spread(sums, window, machine).write()
        else:
            Dense(sums, window, machine, None if stage is None else Decoder(stage, machine)).write()
    return function.with_body(builder.get().body)


class Channelwise(Nest):
    """A depthwise convolution or pooling: rows outside; windows at the border leave out the taps that are padding."""

    def write(self) -> None:
        """Images and rows | vectors of channels | tiles along the row, those at the border written out."""
        last, width = self.window.axes[-1], self.positions[-1]
        wide = self.window.wide or _window.channelwise_width(width, self.machine)
        borders = set(_window.border_tiles(last, width, wide))
        inner = [q for q in range(-(-width // wide)) if q not in borders]
        taps = math.prod(dims.nominal(n) for n in self.sums.extents) * math.prod(a.kernel for a in self.window.axes)
        first, *rest = _loops.split(self.channels, self.window.vector)
        # Vectors of channels are a loop that threads may share: there are many where rows are few.
        shared = [*self.positions[:-1], first[1]]
        images = [self.images] if isinstance(self.images, int) else []
        with ExitStack() as stack:
            outside = [] if images else stack.enter_context(self.loops([self.images]))
            *at, v = [*outside, *stack.enter_context(self.outer([*images, *shared], taps / _split.TAPS))]
            self._row(at, v * first[2] + first[0], first[2], wide, inner)
            # What is left of a whole number of vectors, after the last of them.
            with self.where(v == first[1] - 1) if rest and first[1] > 1 else nullcontext():
                for start, count, lanes in rest:
                    with self.serial(count) as u:
                        self._row(at, u * lanes + start, lanes, wide, inner)

    def write_rows(self, image: Expr, row: Expr, count: int) -> None:
        """Some rows of an image: vectors of channels outside, whose rows then stay in the first-level cache."""
        last, width = self.window.axes[-1], self.positions[-1]
        wide = self.window.wide or _window.channelwise_width(width, self.machine)
        borders = set(_window.border_tiles(last, width, wide))
        inner = [q for q in range(-(-width // wide)) if q not in borders]
        for start, vectors, lanes in _loops.split(self.channels, self.window.vector):
            with self.serial(vectors) as v, self.serial(count) as r:
                self._row([image, row + r], v * lanes + start, lanes, wide, inner)

    def _row(self, at: Sequence[Expr], channel: Expr, lanes: int, wide: int, inner: Sequence[int]) -> None:
        """A row of positions of some channels: the tiles at the border by themselves, the inner ones in a loop."""
        width = self.positions[-1]
        for q in range(-(-width // wide)):
            if q not in inner:
                size = min(wide, width - q * wide)
                self._tile(at, q * wide, size, channel, lanes, is_border=True)
            elif q == inner[0]:
                with self.serial(len(inner)) as step:
                    self._tile(at, (step + inner[0]) * wide, wide, channel, lanes, is_border=False)

    def _tile(self, at: Sequence[Expr], first: Any, wide: int, channel: Expr, lanes: int, *, is_border: bool) -> None:
        *upper, last = self.window.axes
        acc = _loops.registers(wide, lanes, self.dtype)
        self.start(acc, wide, lanes)
        with ExitStack() as stack:
            rows = zip(upper, self.positions[:-1], at[1:], strict=True)
            taps = [stack.enter_context(self._taps(axis, count, p)) for axis, count, p in rows]
            written_out = is_border or last.kernel <= _window.MOST_TAPS
            along = range(last.kernel) if written_out else [stack.enter_context(self.serial(last.kernel))]
            for tap in along:
                inside = [j for j in range(wide) if not is_border or last.is_inside(first + j, tap)]
                if not inside:
                    continue
                with self.unrolled(len(inside), lanes) as (j, lane):
                    place = j + inside[0]
                    self.add(acc, place * lanes + lane, [*at, place + first, channel + lane], [*taps, tap])
        with self.unrolled(wide, lanes) as (j, lane):
            self.finish(acc, j * lanes + lane, [*at, j + first, channel + lane])

    def _taps(self, axis: _window.Axis, count: int, position: Expr) -> Any:
        """A loop over the taps of the window at one of `count` positions that lie inside the source."""
        if axis.is_whole(0) and axis.is_whole(count - 1):
            all_taps = math.prod(a.kernel for a in self.window.axes)
            return (
                T.unroll(self.index(0), self.index(axis.kernel))
                if all_taps <= _UNROLLED_TAPS
                else self.serial(axis.kernel)
            )
        # Taps k with 0 <= position * stride - before + k * dilation < held.
        start = position * axis.stride - axis.before
        first = tirx.max(tirx.floordiv(self.index(axis.dilation - 1) - start, axis.dilation), self.index(0))
        beyond = tirx.floordiv(self.index(axis.held + axis.dilation - 1) - start, axis.dilation)
        return self.serial(tirx.min(beyond, self.index(axis.kernel)), first)
