"""The loops of a convolution whose outputs read many input channels: tiles of positions by output channels.

A weight in codes is decoded a panel at a time, or a block of one, into memory that all positions of a thread's share
read from the caches: once for all of them, and never the whole of it where it is large.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _loops, _sliding_streamed, _split, _tile
from mc_opt.targets.kernels._dense_parts import Block, Panel, Region
from mc_opt.targets.kernels._expressions import Expr, is_load, pairs, walk
from mc_opt.targets.kernels._nest import Nest, Registers, Span, Sums, spans
from mc_opt.targets.kernels._packed import Decoder
from mc_opt.targets.kernels._window import Sliding

# Channels that a block of the weight has at least: its sums are read and written once a block.
_SHORTEST_BLOCK = 32
# Passes over a panel that leave time to wait for the next one: with more, its first pass is a small part of all.
_MOST_PASSES = 32


class Dense(Nest):
    """A convolution: panels of the packed weight outside when the weight is large, positions outside when it is not."""

    def __init__(self, sums: Sums, window: Sliding, machine: Machine, decoder: Decoder | None = None) -> None:
        super().__init__(sums, window, machine)
        self.decoder = decoder
        rank, position = len(window.axes), sums.kept[-2]
        loads = [x for x in walk(sums.term) if is_load(x)]
        moves = [any(x.same_as(position) for i in load.indices for x in walk(i)) for load in loads]
        self.source, self.weight = loads[moves.index(True)].source, loads[moves.index(False)].source
        self.taps = [axis.kernel for axis in window.axes][: len(self.weight.shape) - 3]  # a product has none
        self.flat = self._is_flat()
        rows = self.positions[-2] if rank > 1 else 1
        self.rows, self.width = (1, rows * self.positions[-1]) if self.flat else (rows, self.positions[-1])
        self.leading = self.positions[:-2]
        item = np.dtype(self.dtype).itemsize
        self.row_bytes = window.columns * item  # of one step of a panel
        self.bytes = math.prod(int(s) for s in self.weight.shape) * item
        # Channels of a tap as they are stored: in codes, filled up to whole words where that is worth it.
        self.stored = int(self.weight.shape[-2])
        self.steps = math.prod(self.taps) * self.stored
        image = self.source.shape[1:] if len(self.source.shape) > 2 else self.source.shape
        self.input_bytes = math.prod(dims.nominal(dims.dim(s)) for s in image) * item
        self.groups = self._groups()

    def _is_flat(self) -> bool:
        """Whether the positions of an image may be counted in one row: source and results have the same."""
        axes, rank = self.window.axes, len(self.window.axes)
        if rank < 2 or any(a.kernel != 1 or a.stride != 1 or a.before for a in axes):
            return False
        if [int(s) for s in self.source.shape[1:-1]] != self.positions:
            return False
        row, column = self.sums.consumer[-3:-1]
        found = uses = 0
        width = self.positions[-1]
        values = [*self.sums.made.indices, self.sums.made.value]
        for x in (x for value in values for x in walk(value)):
            uses += x.same_as(row) or x.same_as(column)
            if is_load(x):
                found += pairs(x.source, x.indices, row, column, width)
        found += pairs(self.sums.made.buffer, self.sums.made.indices, row, column, width)
        return bool(uses == 2 * found)

    def _groups(self) -> list[Span]:
        """Panels of the same number of vectors: whole ones, and the last where it is cut short."""
        columns, vector = self.window.columns, self.window.vector
        whole, rest = divmod(self.channels, columns)
        groups = [Span(0, columns // vector, whole)] if whole else []
        return groups + ([Span(whole, -(-rest // vector), 1)] if rest else [])

    def write(self) -> None:
        """The whole, or a share of it for each thread: of images, of panels of the weight, or of positions."""
        work = math.prod(dims.nominal(n) for n in [*self.sums.extents, *self.taps, self.sums.inputs])
        threads = _split.threads(work / _split.SUMS, self.machine)
        everywhere = Region(0, self.rows, 0, self.width)
        if threads == 1:
            self._panels(0, self.images, everywhere, [(group, 0, group.count) for group in self.groups])
            return
        with T.parallel(self.index(0), self.index(threads)) as share:
            if isinstance(self.images, int) and self.images % threads == 0:
                images = self.images // threads
                panels = [(group, 0, group.count) for group in self.groups]
                self._panels(share * images, images, everywhere, panels)
                return
            left: list[tuple[Span, Expr | int, int]] = []
            for group in self.groups:
                each = group.count // threads if self._splits_panels(threads) else 0
                if each:
                    self._panels(0, self.images, everywhere, [(group, share * each, each)])
                if group.count > each * threads:
                    left.append((group, each * threads, group.count - each * threads))
            if left:
                self._each_region(share, threads, lambda region: self._panels(0, self.images, region, left))

    def write_region(self, image: Expr, region: Region) -> None:
        """All channels at some positions of an image."""
        self._panels(image, 1, region, [(group, 0, group.count) for group in self.groups])

    def _splits_panels(self, threads: int) -> bool:
        """Whether each thread reads a part of the weight and all of the input, rather than the other way round."""
        size = self.rows, self.width, math.prod(self.leading)
        by_positions = _split.by_positions(*size, threads, decoded=self.decoder is not None)
        return self.bytes > self.machine.l1 and not by_positions

    def _each_region(self, share: Expr, threads: int, write: Callable[[Region], None]) -> None:
        """Write a thread's share of positions: rows or columns, whichever come out more even; they differ by one."""
        is_by_rows = _split.evenness(self.rows, threads) >= _split.evenness(self.width, threads)
        size, longer = divmod(self.rows if is_by_rows else self.width, threads)

        def region(first: Expr, length: int) -> Region:
            return Region(first, length, 0, self.width) if is_by_rows else Region(0, self.rows, first, length)

        if not longer:
            write(region(share * size, size))
            return
        with T.If(share < longer):
            with T.Then():
                write(region(share * (size + 1), size + 1))
            with T.Else():
                if size:
                    write(region(share * size + longer, size))
                else:
                    T.evaluate(0)

    def _panels(
        self, image: Expr | int, images: Any, region: Region, panels: Sequence[tuple[Span, Expr | int, int]]
    ) -> None:
        """Some panels of the weight over a region of some images.

        Panels outside | images | blocks of the weight | tiles of positions; a small weight inside the positions.
        """
        if self.bytes <= self.machine.l1 and not self._streams(images, region, panels[0][0].size):
            self._small(image, images, region, panels)
            return
        for group, first, count in panels:
            wide = group.size * self.window.vector
            rows, across = self._tiles(region, wide * group.count, wide)
            is_streamed = _sliding_streamed.takes(self, images, rows, across, group.size)
            block = 0 if is_streamed else self._block_channels(region, rows, across)
            decoded = None if is_streamed else self._room(block or self.steps)
            with self.loops([count]) as (t,):
                panel = self._panel(group, first + t)
                if not block and not is_streamed:
                    self._decode(decoded, 0, panel, 0, self.steps, unit=0)
                with self.loops([images, *self.leading]) as (n, *leading):
                    at = [image + n, *leading]
                    if block:
                        self._blocks(at, region, rows, across, panel, block, decoded)
                    else:
                        self._positions(at, region, rows, across, panel, self._whole(decoded))

    def _small(
        self, image: Expr | int, images: Any, region: Region, panels: Sequence[tuple[Span, Expr | int, int]]
    ) -> None:
        """Some panels of a weight that the first-level cache holds, inside the positions."""
        rows, across = self._tiles(region, self.channels, self.window.columns)
        starts = list(itertools.accumulate((count * self.steps for _, _, count in panels), initial=0))
        decoded = self._room(starts[-1])
        for start, (group, first, count) in zip(starts, panels if self.decoder else [], strict=False):
            with self.serial(count) as t:
                self._decode(decoded, start + t * self.steps, self._panel(group, first + t), 0, self.steps, unit=0)
        with self.loops([images, *self.leading]) as (n, *leading):
            at = [image + n, *leading]
            for row in rows:
                with self.serial(row.count) as r:
                    for span in across:
                        with self.serial(span.count) as q:
                            for start, (group, first, count) in zip(starts, panels, strict=False):
                                with self.serial(count) as t:
                                    part = self._whole(decoded, start + t * self.steps)
                                    self._tile(at, region, (row, r), (span, q), self._panel(group, first + t), part)

    def _streams(self, images: Any, region: Region, held: int) -> bool:
        tiles = self._tiles(region, self.channels, self.window.columns)
        return _sliding_streamed.takes(self, images, *tiles, held)

    def _room(self, steps: int) -> Any:
        """Memory for so many decoded steps of a panel; None for a weight that is dense."""
        return T.alloc_buffer((steps * self.window.columns,), self.dtype) if self.decoder else None

    def _decode(self, decoded: Any, row: Expr | int, panel: Panel, first: Expr | int, count: int, *, unit: int) -> None:
        if self.decoder is not None:
            self.decoder.decode(decoded, row, panel.number, first, count, held=panel.held, unit=unit)

    def _tiles(self, region: Region, channels: int, columns: int) -> tuple[list[Span], list[Span]]:
        """The rows and columns of a region in tiles."""
        high, wide = self.window.high, self.window.wide
        if not wide:
            tile = _tile.Tile(1, 1, columns, self.window.vector)
            high, wide = _tile.positions(region.rows, region.width, channels, tile, self.machine)
        return spans(region.rows, high), spans(region.width, wide)

    def _panel(self, group: Span, number: Expr) -> Panel:
        valid = min(self.channels - group.start * self.window.columns, group.size * self.window.vector)
        return Panel(group.size, group.start + number, valid)

    def _whole(self, decoded: Any, row: Expr | int = 0) -> Block:
        return Block((), 0, self.sums.inputs, decoded=decoded, row=row)

    def _block_channels(self, region: Region, rows: Sequence[Span], along: Sequence[Span]) -> int:
        """Channels of a block of a panel that stays in the first-level cache; 0 where one pass takes the panel.

        A panel is cut where it, the next one, which is fetched meanwhile, and the input do not fit in the
        second-level cache, while sums stay in a quarter of the first.
        """
        passes = sum(r.count for r in rows) * sum(s.count for s in along)
        panel = self.steps * self.row_bytes
        sums = region.rows * region.width * self.row_bytes
        room = self.machine.l1 // 2
        if self.decoder is not None:
            if panel <= self.machine.l2 // 2:
                return 0
            room = self.machine.l2 // 4
        elif passes < 2 or sums > self.machine.l1 // 4 or 2 * panel + self.input_bytes <= self.machine.l2:
            return 0
        most = min(room // self.row_bytes, self.sums.inputs)
        divisors = [d for d in range(_SHORTEST_BLOCK, most + 1) if self.sums.inputs % d == 0]
        whole = [d for d in divisors if self.decoder is None or d % self.decoder.per == 0]
        return max(whole or divisors, default=0)

    def _blocks(
        self,
        at: Sequence[Expr],
        region: Region,
        rows: Sequence[Span],
        along: Sequence[Span],
        panel: Panel,
        block: int,
        decoded: Any,
    ) -> None:
        """One panel block by block, the sums of all positions in memory between them."""
        vector, places = self.window.vector, region.rows * region.width * panel.held
        # Zeros from here on, not from the first block on: where it is touched is how long TVM keeps it.
        on_stack = region.rows * region.width * self.row_bytes <= self.machine.l1 // 4
        kept = {"disable_lower_builtin": True} if on_stack else {}
        memory = T.alloc_buffer((places * vector,), self.dtype, annotations=kept)
        with self.serial(places) as k, self.unrolled(vector) as (lane,):
            T.buffer_store(memory, self.sums.start, [k * vector + lane])
        blocks = self.sums.inputs // block
        with ExitStack() as stack:
            taps = [stack.enter_context(self.serial(k)) if k > 1 else self.index(0) for k in self.taps]
            b = stack.enter_context(self.serial(blocks)) if blocks > 1 else self.index(0)
            last = [x == n - 1 for x, n in zip([*taps, b], [*self.taps, blocks], strict=True) if n > 1]
            part = Block(taps, b * block, block, memory, tirx.all(*last), decoded)
            self._decode(decoded, 0, panel, self.number_of([*taps, 0]) + b * block, block, unit=block)
            self._positions(at, region, rows, along, panel, part)

    def _positions(
        self,
        at: Sequence[Expr],
        region: Region,
        rows: Sequence[Span],
        along: Sequence[Span],
        panel: Panel,
        part: Block,
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
                        ahead = (number, passes) if part.memory is not None or passes <= _MOST_PASSES else None
                        self._tile(at, region, (row, r), (span, q), panel, part, ahead)
                    before += span.count
            before_rows += row.count

    def _tile(
        self,
        at: Sequence[Expr],
        region: Region,
        row: tuple[Span, Expr],
        span: tuple[Span, Expr],
        panel: Panel,
        part: Block,
        ahead: tuple[Expr, int] | None = None,
    ) -> None:
        """One tile: begin or fetch its sums, add the block's steps, keep the sums or finish."""
        vector, held, tile, memory = self.window.vector, panel.held, panel.number, part.memory
        high, wide = row[0].size, span[0].size
        row0, column0 = row[0].start + row[1] * high, span[0].start + span[1] * wide
        sums = self.registers(high * wide, held, vector)

        def stored(k: Expr, v: Expr, lane: Expr) -> Expr:
            return (((row0 + k // wide) * region.width + column0 + k % wide) * held + v) * vector + lane

        def axes(k: Expr, channel: Expr) -> list[Expr | int]:
            return self._kept(at, region.row + row0 + k // wide, region.column + column0 + k % wide, channel)

        def fetch() -> None:
            for acc in sums:
                with self.unrolled(acc.count, held, vector) as (k, v, lane):
                    T.buffer_store(acc.buffer, memory[stored(acc.first + k, v, lane)], [(k * held + v) * vector + lane])

        def keep() -> None:
            for acc in sums:
                with self.unrolled(acc.count, held, vector) as (k, v, lane):
                    T.buffer_store(memory, acc.buffer[(k * held + v) * vector + lane], [stored(acc.first + k, v, lane)])

        def finish(acc: Registers) -> None:
            for first, count, width in _loops.split(panel.valid, vector):
                with self.unrolled(acc.count, count, width) as (k, v, lane):
                    offset = v * width + first + lane
                    kept = axes(acc.first + k, tile * self.window.columns + offset)
                    self.finish(acc.buffer, k * held * vector + offset, kept)

        def finish_all() -> None:
            for acc in sums:
                finish(acc)

        if memory is None:
            for acc in sums:
                self.start(acc.buffer, acc.count * held, vector)
        else:
            fetch()
        if part.decoded is None and self.decoder is not None:
            _sliding_streamed.multiply(self, self.decoder, sums, panel, axes)
        else:
            self._multiply(sums, panel, part, axes, ahead)
        if memory is None:
            finish_all()
        else:
            with T.If(part.is_last):
                with T.Then():
                    finish_all()
                with T.Else():
                    keep()

    def _multiply(
        self,
        sums: Sequence[Registers],
        panel: Panel,
        part: Block,
        kept: Callable[[Expr, Expr], list[Expr | int]],
        ahead: tuple[Expr, int] | None,
    ) -> None:
        """Add a block's steps to the sums of a tile; kept(position, channel): the axes that stay."""
        vector, held, memory = self.window.vector, panel.held, part.memory
        with ExitStack() as stack:
            taps = part.taps or [stack.enter_context(self.serial(k)) if k > 1 else self.index(0) for k in self.taps]
            c = stack.enter_context(self.serial(part.channels))
            if ahead is not None and self.decoder is None:
                self._prefetch(panel, taps, part, ahead, c)
            step = part.row + (self.number_of([*taps, c]) if memory is None else c)
            for acc in sums:
                with self.unrolled(acc.count, held, vector) as (k, v, lane):
                    axes = kept(acc.first + k, panel.number * self.window.columns + v * vector + lane)
                    weight = None
                    if part.decoded is not None:
                        weight = self.weight, part.decoded[step * self.window.columns + v * vector + lane]
                    self.add(acc.buffer, (k * held + v) * vector + lane, axes, [*taps, part.first + c], weight)

    def number_of(self, steps: Sequence[Expr | int]) -> Expr | int:
        """The number of a step, given its tap and channel."""
        number: Expr | int = 0
        for step, extent in zip(steps, [*self.taps, self.stored], strict=True):
            number = number * extent + step
        return number

    def _kept(self, at: Sequence[Expr], row: Expr, column: Expr, channel: Expr) -> list[Expr | int]:
        if len(self.sums.kept) == 2:
            return [column, channel]
        if len(self.window.axes) == 1:
            return [*at, column, channel]
        return [*at, 0 if self.flat else row, column, channel]

    def _prefetch(self, panel: Panel, taps: Sequence[Expr], part: Block, ahead: tuple[Expr, int], c: Expr) -> None:
        """Fetch a part of the next block or panel: each pass over this one takes its share, evenly among the steps.

        Hardware looks ahead within a page of 4 KiB alone. An address beyond the last panel is no error.
        """
        (number, passes), columns = ahead, self.window.columns
        if part.taps:
            steps, step, first = part.channels, c, [*part.taps, part.first]
        else:
            steps, step, first = self.sums.inputs, c, [*(0 for _ in self.taps), 0]
            for tap, count in zip(reversed(taps), reversed(self.taps), strict=True):
                step, steps = step + tap * steps, steps * count
        share = -(-columns // passes)
        read, data = (tirx.const(k, "int32") for k in (0, 1))
        nearest = tirx.const(3 if 2 * steps * self.row_bytes <= self.machine.l1 else 2, "int32")
        for line in range(0, share, self.window.vector):
            place = self.weight[(panel.number, *first, steps * columns + (number * steps + step) * share + line)]
            T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", tirx.address_of(place), read, nearest, data))
