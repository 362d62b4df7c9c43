"""The product of a cell's state with its recurrent weight, for a vector of hidden units with all of its gates."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _halves, _loops
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._lookup_tile import LookupTile, Read
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels._table import Table

# (row, gate) -> what a gate's sums are added to.
Start = Callable[[Expr, int], Expr]
# Writes what becomes of a row's gates, given its number and a vector of each.
Use = Callable[[Expr, Sequence[Expr]], None]
# Rows of a batch that share what a vector of codes is decoded to, at most.
_MOST_ROWS = 8


class Weight(Protocol):
    """R [hidden, gates · hidden], as a kernel reads it."""

    def most_rows(self, gates: int) -> int:
        """Rows whose sums of so many gates stay in registers together."""

    def sums(self, start: Start, read: Read, tile: Expr, gates: Sequence[int], *, rows: int, use: Use) -> None:
        """Write start(m, gate) + Σ_k read(m, k) · R[k, gate] of a tile, and what becomes of it, for some rows.

        In several chains: they hide the latency of one, and with `start` added last they round less. A step's rounding
        comes back in the next steps, which some trained cells amplify a thousandfold.
        """


class Dense:
    """R in float32, [tiles, hidden, gates · lanes]."""

    def __init__(self, hidden: int, lanes: int, room: int, r: Buffer) -> None:
        """`room`: vectors of sums that registers may hold."""
        self._hidden, self._lanes, self._room, self._r = hidden, lanes, room, r

    def most_rows(self, gates: int) -> int:
        """As many as have room for the sums of one chain each."""
        return sharing_rows(gates, self._room)

    def sums(self, start: Start, read: Read, tile: Expr, gates: Sequence[int], *, rows: int, use: Use) -> None:
        """See `Weight`."""
        lanes, hidden = self._lanes, self._hidden
        chains = next((n for n in (4, 2) if hidden % n == 0 and n * rows * len(gates) <= self._room), 1)
        # A buffer a gate: TVM takes large ones from a pool, where a thread's code writes them at every step.
        sums = [[_loops.zeros(chains, lanes) for _ in gates] for _ in range(rows)]
        with T.serial(0, hidden // chains) as step:
            for c in range(chains):
                k = step * chains + c
                weights = [_loops.load(self._r, tile, k, gate * lanes, lanes=lanes) for gate in gates]
                for m, row in enumerate(sums):
                    factor = _loops.splat(read(m, k, 1), lanes)
                    for held, weight in zip(row, weights, strict=True):
                        added = _loops.load(held, c * lanes, lanes=lanes) + factor * weight
                        _loops.store(held, added, c * lanes, lanes=lanes)

        def total(m: int, place: int) -> Expr:
            parts = (_loops.load(sums[m][place], c * lanes, lanes=lanes) for c in range(chains))
            return functools.reduce(operator.add, parts)

        if rows > 1:
            _use_each(total, start, gates, rows, lanes, use)
            return
        for place, gate in enumerate(gates):
            _loops.store(sums[0][place], start(0, gate) + total(0, place), 0, lanes=lanes)
        use(0, [_loops.load(held, 0, lanes=lanes) for held in sums[0]])


class Halves:
    """R in pairs of `_halves`, int32 [tiles, hidden / 2, gates · lanes], and the scale of each column."""

    def __init__(self, hidden: int, lanes: int, room: int, r: Buffer, scale: Buffer) -> None:
        """`room`: vectors of sums that registers may hold."""
        self._hidden, self._lanes, self._room, self._r, self._scale = hidden, lanes, room, r, scale

    def most_rows(self, gates: int) -> int:
        """One: the rows of a batch read it each by itself."""
        return 1

    def sums(self, start: Start, read: Read, tile: Expr, gates: Sequence[int], *, rows: int, use: Use) -> None:
        """See `Weight`."""
        assert rows == 1
        lanes = self._lanes
        pairs = next((n for n in (2, 1) if self._hidden % (2 * n) == 0 and 2 * n * len(gates) <= self._room), 1)
        sums = [_loops.zeros(2 * pairs, lanes) for _ in gates]

        def add(pair: Expr, chain: int, count: int) -> None:
            for held, gate in zip(sums, gates, strict=True):
                word = _loops.load(self._r, tile, pair, gate * lanes, lanes=lanes)
                for k, weight in enumerate(_halves.parts(word, lanes)[:count]):
                    at = (chain * 2 + k) * lanes
                    term = _loops.splat(read(0, pair * 2 + k, 1), lanes) * weight
                    _loops.store(held, _loops.load(held, at, lanes=lanes) + term, at, lanes=lanes)

        with T.serial(0, self._hidden // 2 // pairs) as k:
            for chain in range(pairs):
                add(k * pairs + chain, chain, 2)
        if self._hidden % 2:
            add(tirx.const(self._hidden // 2, "int32"), 0, 1)
        for held, gate in zip(sums, gates, strict=True):
            parts = (_loops.load(held, c * lanes, lanes=lanes) for c in range(2 * pairs))
            scale = _loops.load(self._scale, tile, 0, gate * lanes, lanes=lanes)
            total = functools.reduce(operator.add, parts) * scale
            _loops.store(held, start(0, gate) + total, 0, lanes=lanes)
        use(0, [_loops.load(held, 0, lanes=lanes) for held in sums])


class Packed:
    """R in codes, which are looked up at each step."""

    def __init__(self, tiles: Tiles, machine: Machine, words: Buffer, codebook: Buffer, *factors: Buffer) -> None:
        self._machine, self._lanes = machine, tiles.lanes
        self._tile = LookupTile(tiles, machine, words, Table(tiles.form, machine, codebook, factors))

    def most_rows(self, gates: int) -> int:
        """As many as leave registers for codes and codebook."""
        return most_rows(gates, self._machine)

    def sums(self, start: Start, read: Read, tile: Expr, gates: Sequence[int], *, rows: int, use: Use) -> None:
        """See `Weight`."""
        lanes, room = self._lanes, self._machine.registers // 2
        chains = next((n for n in (4, 2) if n * rows * len(gates) <= room), 1)
        made = self._tile.sums(tile, rows, read, chosen=gates, chains=chains)

        def scaled(m: int, place: int) -> Expr:
            total = _loops.load(made[m], place * lanes, lanes=lanes)
            if self._tile.scale is None:
                return total
            return total * _loops.load(self._tile.scale, tile, 0, gates[place] * lanes, lanes=lanes)

        if rows == 1:
            use(0, [start(0, gate) + scaled(0, place) for place, gate in enumerate(gates)])
            return
        _use_each(scaled, start, gates, rows, lanes, use)


def _use_each(
    total: Callable[[int, int], Expr], start: Start, gates: Sequence[int], rows: int, lanes: int, use: Use
) -> None:
    """Write what becomes of every row's gates, of which `total` gives the sums by row and place among the gates.

    A loop over the rows: what becomes of the gates is much code.
    """
    on_stack = {"disable_lower_builtin": True}
    held = T.alloc_buffer((rows, len(gates) * lanes), "float32", annotations=on_stack)
    for m in range(rows):
        for place in range(len(gates)):
            _loops.store(held, total(m, place), m, place * lanes, lanes=lanes)
    with T.serial(0, rows) as row:
        parts = [_loops.load(held, row, place * lanes, lanes=lanes) for place in range(len(gates))]
        use(row, [start(row, gate) + part for gate, part in zip(gates, parts, strict=True)])


def sharing_rows(gates: int, room: int) -> int:
    """Rows of a batch that share what is read of a dense weight, with room for so many vectors of sums."""
    return max(1, room // gates)


def most_rows(gates: int, machine: Machine) -> int:
    """Rows of a batch that share what a vector of codes is decoded to."""
    return max(1, min(_MOST_ROWS, (machine.registers - 8) // gates))
