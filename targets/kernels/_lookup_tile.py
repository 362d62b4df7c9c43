"""Products of a few rows with a tile of a packed weight: a vector of codes is decoded in registers for all of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _decode, _loops, _prefetch, _pshufb, _tbl
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels._table import Table

# (row, k, lanes) -> so many values of a row from element k on.
Read = Callable[[int, Expr, int], Expr]


def in_a_row(tiles: Tiles) -> np.ndarray:
    """int8: the bytes of all words as a tile needs them, the vectors of its columns in turn: one stream to read.

    Two more stand at the end, for the vector that begins in the middle of the last word.
    """
    in_order = np.ascontiguousarray(tiles.words.transpose(0, 2, 1, 3))
    return np.append(in_order.reshape(-1).view(np.int8), np.zeros(2, np.int8))


def arrays(tiles: Tiles, *, is_in_a_row: bool) -> list[np.ndarray]:
    """What a kernel is given: the words, in one stream or as they are, then codebook, scale, offset and group."""
    words = in_a_row(tiles) if is_in_a_row else tiles.words
    return [x for x in (words, tiles.codebook, tiles.scale, tiles.offset, tiles.group) if x is not None]


class LookupTile:
    """Writes Σ_k x[m, k] · w[k, c] for the columns c of a tile.

    Attributes:
        scale: the scales that the finished sums have yet to be multiplied by, [t, 1, c]; None for none.
    """

    def __init__(self, tiles: Tiles, machine: Machine, words: Buffer, table: Table) -> None:
        self._tiles, self._machine, self._words, self._table = tiles, machine, words, table
        self._lanes, self._per, self._depth = tiles.lanes, tiles.per, tiles.depth
        self._vectors = tiles.shape[-1] // tiles.lanes
        run = _decode.run_of(tiles, tiles.per)
        # A scale multiplies the sum of its group, not each weight.
        self._late = table.scale is not None and table.offset is None and (table.group is None or run > 0)
        self._run = run if self._late else 0
        self.scale = table.scale if self._late and not run else None
        self._in_a_row = len(words.shape) == 1
        step = self._vectors * 4 * self._lanes
        self._ahead = _prefetch.ahead(tiles.words.nbytes, step) if self._in_a_row else 0

    def sums(
        self, t: Expr, rows: int, read: Read, *, chosen: Sequence[int] | None = None, chains: int = 1
    ) -> list[Buffer]:
        """Write the sums of a tile; returns registers for each row, a vector for each of the `chosen` ones of a tile.

        Chains are sums of every so manieth product that are added in the end: they hide latency, and round less.
        """
        chosen = range(self._vectors) if chosen is None else chosen
        sums = [[_loops.zeros(len(chosen), self._lanes) for _ in range(chains)] for _ in range(rows)]
        if self._run:
            with T.serial(0, self._depth // self._run) as g:
                self._group(sums, t, g, self._run, read, chosen)
            if self._depth % self._run:
                last = tirx.const(self._depth // self._run, "int32")
                self._group(sums, t, last, self._depth % self._run, read, chosen)
        else:
            self._steps(sums, t, tirx.const(0, "int32"), self._depth, read, chosen)
        return [self._folded(parts, len(chosen)) for parts in sums]

    def _folded(self, parts: Sequence[Buffer], count: int) -> Buffer:
        """The sum of chains, in the first of them."""
        first, lanes = parts[0], self._lanes
        for v in range(count) if len(parts) > 1 else ():
            total = functools.reduce(operator.add, [_loops.load(part, v * lanes, lanes=lanes) for part in parts])
            _loops.store(first, total, v * lanes, lanes=lanes)
        return first

    def _group(
        self, sums: list[list[Buffer]], t: Expr, g: Expr, number: int, read: Read, chosen: Sequence[int]
    ) -> None:
        """Add the products of the `number` rows of group g, times its scales."""
        lanes, scale = self._lanes, self._table.scale
        parts = [[_loops.zeros(len(chosen), lanes)] for _ in sums]
        if self._ahead:
            _prefetch.ask(scale, t, g + self._ahead * self._per // self._run, 0, size=self._vectors * 4 * lanes)
        self._steps(parts, t, g * (self._run // self._per), number, read, chosen)
        for (part,), (total, *_) in zip(parts, sums, strict=True):
            for place, v in enumerate(chosen):
                factor = _loops.load(scale, t, g, v * lanes, lanes=lanes)
                _add(total, _loops.load(part, place * lanes, lanes=lanes) * factor, place, lanes)

    def _steps(
        self, sums: list[list[Buffer]], t: Expr, first: Expr, number: int, read: Read, chosen: Sequence[int]
    ) -> None:
        """Add the products of `number` rows of the weight, from word `first` on."""
        if number // self._per:
            with T.serial(0, number // self._per) as w:
                self._step(sums, t, first + w, self._per, read, chosen)
        if number % self._per:
            self._step(sums, t, first + number // self._per, number % self._per, read, chosen)

    def _step(self, sums: list[list[Buffer]], t: Expr, w: Expr, number: int, read: Read, chosen: Sequence[int]) -> None:
        table, lanes, per = self._table, self._lanes, self._per
        if self._ahead:
            _prefetch.ask(self._words, self._place(t, w + self._ahead, 0), size=self._vectors * 4 * lanes)
        order = [(j, place, v) for j in range(number) for place, v in enumerate(chosen)]
        if self._machine.kind == "arm":  # `tbl` decodes four codes of a word: too many words at once overflow registers
            order.sort(key=lambda at: (at[1], _tbl.turn(at[0], self._tiles.bits)))
        elif self._tiles.is_in_bytes:
            order.sort(key=lambda at: (_pshufb.turn(at[0])[0], at[1]))
        for j, place, v in order:
            # A vector that begins in the middle of a word has the upper half at the bottom of each lane: one shift
            # less. It lies across two cache lines, so that more of them, from each byte on, would gain nothing.
            past = table.place(j) // 16 * 16 if self._in_a_row else 0
            word = self._load(t, v, w, past // 8)
            g = 0 if self._late or table.group is None else table.group[w * per + j]
            value = table.value(word, j, t, v, g, past=past)
            value = value if self._late else table.scaled(value, t, v, g)
            for m, parts in enumerate(sums):
                _add(parts[j % len(parts)], value * self._factor(read, m, w * per, j, number), place, lanes)

    def _place(self, t: Expr, w: Expr, v: int) -> Expr:
        """The byte at which a vector of words in a row begins."""
        return ((t * -(-self._depth // self._per) + w) * self._vectors + v) * (4 * self._lanes)

    def _load(self, t: Expr, v: int, w: Expr, byte: int) -> Expr:
        if not self._in_a_row:
            return _loops.load(self._words, t, v, w, 0, lanes=self._lanes)
        held = _loops.load(self._words, self._place(t, w, v) + byte, lanes=4 * self._lanes)
        return tirx.reinterpret(f"int32x{self._lanes}", held)

    def _factor(self, read: Read, m: int, first: Expr, j: int, number: int) -> Expr:
        """x[m, first + j] in every lane; ARM multiplies by one lane of a register, so one register holds four."""
        lanes = self._lanes
        start = j - j % lanes
        if self._machine.kind != "arm" or lanes == 1 or start + lanes > number:
            return _loops.splat(read(m, first + j, 1), lanes)
        return tirx.Shuffle([read(m, first + start, lanes)], [j - start] * lanes)


def _add(sums: Buffer, term: Expr, v: int, lanes: int) -> None:
    _loops.store(sums, _loops.load(sums, v * lanes, lanes=lanes) + term, v * lanes, lanes=lanes)
