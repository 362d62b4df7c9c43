"""Convolutions and products in a row as one kernel: a few rows of positions at a time run through all of them.

    for each block of rows:  y1 = f1(x, rows of y1 that are new);  y2 = f2(y1);  ..;  y = fn(y(n-1))

What stands between two of them is a buffer of some rows, which stays in the second-level cache. Where the second one's
window is higher than one row, its input's rows stand in a ring, and rows beyond the image are zeros there. The others
but the first look at one row only, so that nothing is computed twice within a thread.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._row_blocks import Part
from mc_opt.targets.kernels import _loops, _split
from mc_opt.targets.kernels._dense_parts import Region
from mc_opt.targets.kernels._expressions import Expr, rebuilt
from mc_opt.targets.kernels._nest import Sums, reads
from mc_opt.targets.kernels._sliding import Channelwise
from mc_opt.targets.kernels._sliding_dense import Dense
from mc_opt.targets.kernels._window import Sliding


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the convolutions or products.

    Attributes:
        parameters: its inputs and its output.
        source: the parameter that its window slides over.
        sums: its sums and what consumes them.
        window: its window.
    """

    parameters: tuple[Any, ...]
    source: Any
    sums: Sums
    window: Sliding

    @property
    def result(self) -> Any:
        """The parameter that it writes."""
        return self.parameters[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """What it writes: images, rows, columns, channels; rows of a product are rows of one column."""
        *images, channels = (int(n) for n in self.sums.extents)
        if self.is_product:
            images = [*([1] if len(images) == 1 else []), *images, 1]
        return (*images, channels)

    @property
    def is_product(self) -> bool:
        """Whether its positions are one axis."""
        return len(self.window.axes) == 1

    @functools.cached_property
    def part(self) -> Part:
        """What decides whether it is joined with others."""
        axis, depth = self.window.axes[0], 1 if self.window.channelwise else self.sums.inputs
        taps = math.prod(a.kernel for a in self.window.axes)
        images, rows, width, channels = self.shape
        itemsize = np.dtype(str(self.sums.total.dtype)).itemsize
        return Part(
            rows,
            width,
            channels,
            span=(axis.kernel - 1) * axis.dilation + 1,
            stride=axis.stride,
            above=axis.before,
            weights=taps * depth * channels * itemsize,
            steps=math.prod(self.shape) * taps * depth,
            channelwise=self.window.channelwise,
            itemsize=itemsize,
            images=images,
        )


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows that a buffer between two stages holds.

    Attributes:
        count: how many.
        width: positions in a row.
        pitch: numbers of a position: its channels, filled up to whole vectors.
        above: rows of zeros before the image's first; None where the buffer holds a block's rows alone, in order.
    """

    count: int
    width: int
    pitch: int
    above: int | None = None

    @property
    def size(self) -> int:
        """Numbers in all."""
        return self.count * self.width * self.pitch

    def at(self, row: Expr, first: Expr) -> Expr:
        """Where a row of the image begins, the first of the block's given."""
        place = row - first if self.above is None else tirx.truncmod(row + self.above, self.count)
        return place * (self.width * self.pitch)

    def index(self, position: Sequence[Expr], first: Expr) -> Expr:
        """Where an element of the tensor is, given as image, row, column, channel; of a product without the column."""
        if len(position) < 4:
            *_, row, channel = position
            return self.at(row, first) + channel
        _, row, column, channel = position
        return self.at(row, first) + column * self.pitch + channel


def written(stages: Sequence[Stage], high: int, machine: Machine) -> Any:
    """The kernel of some stages, `high` rows of the last one at a time, loop by loop."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        _Joined(stages, high, machine).write()
    inner = [stage.source for stage in stages[1:]]
    params = [p for stage in stages for p in stage.parameters[:-1] if not any(map(p.same_as, inner))]
    made = tirx.PrimFunc([*params, stages[-1].result], builder.get().body)
    # No fusion (8 is opaque), no schedule: the loops are what is meant.
    return made.with_attrs({"tirx.noalias": True, "s_tir": True, "op_pattern": 8, _loops.SCHEDULED: True})


class _Joined:
    """Writes the loops.

    Attributes:
        rows: of the buffers between two stages each.
        held: these buffers, of the share that is written now.
        blocks: of rows of the last stage, `high` each.
    """

    def __init__(self, stages: Sequence[Stage], high: int, machine: Machine) -> None:
        self.stages, self.high, self.machine = stages, high, machine
        self.rows = [self._rows(a.part, b.part) for a, b in itertools.pairwise(stages)]
        self.kind = str(stages[0].sums.kept[0].ty)
        self.dtype = str(stages[0].sums.total.dtype)
        self.images = stages[-1].shape[0]
        self.blocks = stages[-1].shape[1] // high
        self.held: list[Any] = []

    def _rows(self, before: Part, after: Part) -> Rows:
        """What a part makes as far as a block of the next one's rows needs it."""
        pitch = before.pitch(self.machine.lanes)
        if after.slides:
            return Rows(after.reach(self.high), before.width, pitch, after.above)
        return Rows(self.high, before.width, pitch)

    def index(self, value: int) -> Expr:
        """An integer in the type of the axes."""
        return tirx.const(value, self.kind)

    def write(self) -> None:
        """All of it, or each thread's images or blocks of rows."""
        threads = _split.threads(sum(stage.part.nanoseconds for stage in self.stages), self.machine)
        zero, images, blocks = map(self.index, (0, self.images, self.blocks))
        if threads == 1:
            self._write_share((zero, images), (zero, blocks))
            return
        with T.parallel(zero, self.index(threads)) as share:
            if self.images % threads == 0:
                each = self.images // threads
                self._write_share((share * each, self.index(each)), (zero, blocks))
                return
            each, longer = divmod(self.blocks, threads)
            count = each + tirx.Select(share < longer, self.index(1), zero) if longer else self.index(each)
            self._write_share((zero, images), (share * each + tirx.min(share, self.index(longer)), count))

    def _write_share(self, images: tuple[Expr, Expr], blocks: tuple[Expr, Expr]) -> None:
        """Images and blocks, of both the first one and how many.

        All loops begin with 0: TVM's CanonicalizeLoop forgets the beginning of an outer one in the bounds of an inner.
        """
        self.held = [T.sblock_alloc_buffer((rows.size,), self.dtype) for rows in self.rows]
        zero = self.index(0)
        if self.rows[0].above is not None:
            # TVM puts a buffer where all of its uses are, and lets another have its memory behind the last of them: a
            # ring that was used in the loop alone would be made anew in each turn.
            lanes = self.machine.lanes
            _loops.store(self.held[0], _loops.splat(0.0, lanes, self.dtype), zero, lanes=lanes)
        with T.serial(zero, images[1]) as i, T.serial(zero, blocks[1]) as k:
            image, block = images[0] + i, blocks[0] + k
            first = block * self.high
            if self.rows[0].above is None:
                self._write_rows(0, image, first, self.high, first)
            else:
                self._fill(image, block, k == 0)
            for number in range(1, len(self.stages)):
                self._write_rows(number, image, first, self.high, first)

    def _fill(self, image: Expr, block: Expr, is_first: Expr) -> None:
        """The rows of the first stage that the block needs and the one before it did not.

        Rows that stand among zeros are made one by one, others at once.
        """
        part, held, zero = self.stages[1].part, self.stages[0].shape[1], self.index(0)
        above, new, known = part.above, self.high * part.stride, part.span - part.stride
        first = block * new + known
        inside = tirx.all(first >= above, first + new <= above + held)
        count = tirx.Select(inside, zero, self.index(new)) if new > 1 else self.index(new)
        start = first - tirx.Select(is_first, self.index(known), zero)
        with T.serial(zero, count + first - start) as k:
            row = start + k - above
            with T.If(tirx.all(row >= 0, row < held)):
                with T.Then():
                    self._write_rows(0, image, row, 1, zero)
                with T.Else():
                    self._clear(row)
        if new > 1:
            with T.If(inside), T.Then():
                self._write_rows(0, image, first - above, new, zero)

    def _clear(self, row: Expr) -> None:
        """A row of zeros in the ring."""
        rows, lanes = self.rows[0], self.machine.lanes
        begin = rows.at(row, self.index(0))
        with T.serial(self.index(0), self.index(rows.width * rows.pitch // lanes)) as k:
            _loops.store(self.held[0], _loops.splat(0.0, lanes, self.dtype), begin + k * lanes, lanes=lanes)

    def _write_rows(self, number: int, image: Expr, row: Expr, count: int, first: Expr) -> None:
        """Some rows of a stage."""
        stage = self.stages[number]
        width, depth = stage.shape[2], number - 1
        if not stage.window.channelwise:
            dense = Dense(stage.sums, stage.window, self.machine)
            dense.input_bytes = self._input_bytes(number, count)
            # What the first stage writes may be a ring, in which the image's rows do not follow each other.
            dense.flat = dense.flat and number > 0
            dense.sums = self._moved(number, first)
            in_one = dense.flat or stage.is_product
            region = Region(0, 1, row * width, count * width) if in_one else Region(row, count, 0, width)
            dense.write_region(image, region)
            return
        window = stage.window
        if number and self.rows[depth].above is not None:
            # The ring holds the zeros around the image too: no tap is outside of it.
            axis = window.axes[0]
            held = stage.part.reach(stage.shape[1])
            window = dataclasses.replace(
                window, axes=(dataclasses.replace(axis, before=0, held=held), *window.axes[1:])
            )
        nest = Channelwise(self._moved(number, first), window, self.machine)
        nest.write_rows(image, row, count)

    def _input_bytes(self, number: int, rows: int) -> int:
        """Of what so many rows of a stage read."""
        if number:
            return self.rows[number - 1].size * np.dtype(self.dtype).itemsize
        stage = self.stages[0]
        along = 1 if stage.is_product else stage.window.axes[1].held
        return stage.part.reach(rows) * along * int(stage.source.shape[-1]) * np.dtype(self.dtype).itemsize

    def _moved(self, number: int, first: Expr) -> Sums:
        """The sums of a stage that reads and writes buffers in the place of tensors."""
        stage, sums = self.stages[number], self.stages[number].sums
        if number:
            rows, held = self.rows[number - 1], self.held[number - 1]

            def moved(x: Expr) -> Expr | None:
                return tirx.BufferLoad(held, [rows.index(x.indices, first)]) if reads(x, stage.source) else None

            sums = dataclasses.replace(sums, term=rebuilt(sums.term, {}, moved))
        if number < len(self.rows):
            rows, held = self.rows[number], self.held[number]
            made = tirx.BufferStore(held, sums.made.value, [rows.index(sums.made.indices, first)])
            sums = dataclasses.replace(sums, made=made)
        return sums
