"""The kernels that run a recurrent cell through time, on vectors of hidden units."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._relax.dims import Dim
from mc_opt.targets.kernels import _loops, _math
from mc_opt.targets.kernels._cells_product import Weight
from mc_opt.targets.kernels._lookup_tile import Read
from mc_opt.targets.kernels._loops import Buffer, Expr

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}

Activation = Callable[[Expr], Expr]


def _relu(x: Expr) -> Expr:
    return tirx.max(x, _math.constant(0.0, x))


ACTIVATIONS: dict[str, Activation] = {"Sigmoid": _math.sigmoid, "Tanh": _math.tanh, "Relu": _relu}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One direction of a recurrent op.

    Attributes:
        kind: LSTM, GRU or RNN.
        steps: the length of the sequence.
        batch: rows that run through time together.
        hidden: hidden units; `tiles` vectors of `lanes` hold them.
        lanes: the vector width.
        sums: vectors of sums that registers may hold.
        reverse: whether time runs backwards.
        direction: its place in weights and states.
        activations: the functions f, g, h of ONNX.
        clip: the limit of what goes into an activation; 0 for none.
        linear: GRU's linear_before_reset.
        threads: how many share the hidden units of a step.
    """

    kind: str
    steps: Dim
    batch: Dim
    hidden: int
    lanes: int
    sums: int
    reverse: bool
    direction: int
    activations: tuple[Activation, ...]
    clip: float
    linear: bool
    threads: int = 1

    @property
    def gates(self) -> int:
        """Gates a hidden unit has."""
        return _GATES[self.kind]

    @property
    def tiles(self) -> int:
        """Vectors of hidden units."""
        return -(-self.hidden // self.lanes)

    @property
    def width(self) -> int:
        """Hidden units, filled up to whole vectors."""
        return self.tiles * self.lanes

    def limited(self, x: Expr) -> Expr:
        """What goes into an activation."""
        return _math.clamp(x, -self.clip, self.clip) if self.clip else x


def _through_time(
    cell: Cell, h0: Buffer, h: Buffer, step: Callable[[Expr, Expr], None], before: Callable[[Expr], None]
) -> None:
    """Copy the initial states, then call step(number, first row of G) in the order of time.

    Threads are started once, and all run through time; at the end of their tiles they wait for each other.
    """
    with T.serial(0, cell.batch) as b:
        before(b)

        def copy(i: Expr, width: int) -> None:
            _loops.store(h, _loops.load(h0, b, i, lanes=width), 0, b, i, lanes=width)

        _loops.map_row(copy, cell.width, lanes=cell.lanes)
    start = {"pragma_parallel_launch_point": 1} if cell.threads > 1 else {}
    with T.serial(0, cell.steps, annotations=start) as s:
        time = cell.steps - 1 - s if cell.reverse else s
        step(s, time * cell.batch)


def _tiles(cell: Cell) -> Any:
    """The vectors of hidden units of a step, shared by the threads."""
    if cell.threads == 1:
        return T.serial(0, cell.tiles)
    return T.parallel(0, cell.tiles, annotations={"pragma_parallel_barrier_when_finish": 1})


def _each_row(cell: Cell, most: int, write: Callable[[Expr, int], None]) -> None:
    """Call write(first row, number) for the rows of the batch, of which up to `most` run together."""
    if not isinstance(cell.batch, int) or most == 1 or cell.batch == 1:
        with T.serial(0, cell.batch) as b:
            write(b, 1)
        return
    count = -(-cell.batch // -(-cell.batch // most))
    with T.serial(0, cell.batch // count) as block:
        write(block * count, count)
    if cell.batch % count:
        write(tirx.const(cell.batch // count * count, "int32"), cell.batch % count)


def lstm(cell: Cell, weight: Weight, g: Buffer, h0: Buffer, c0: Buffer, h: Buffer, c: Buffer) -> None:
    """LSTM: gates i, o, f, c of a hidden unit, its cell kept in `c`."""
    f, act_g, act_h = cell.activations
    lanes = cell.lanes

    def before(b: Expr) -> None:
        _loops.map_row(
            lambda i, w: _loops.store(c, _loops.load(c0, b, i, lanes=w), b, i, lanes=w), cell.width, lanes=lanes
        )

    def update(s: Expr, b: Expr, tile: Expr, gates: Sequence[Expr]) -> None:
        i, o, forget, new = gates
        kept = f(cell.limited(forget)) * _loops.load(c, b, tile * lanes, lanes=lanes)
        state = kept + f(cell.limited(i)) * act_g(cell.limited(new))
        _loops.store(c, state, b, tile * lanes, lanes=lanes)
        out = f(cell.limited(o)) * act_h(_loops.load(c, b, tile * lanes, lanes=lanes))
        _loops.store(h, out, s + 1, b, tile * lanes, lanes=lanes)

    def step(s: Expr, first: Expr) -> None:
        with _tiles(cell) as tile:

            def rows(b: Expr, count: int) -> None:
                start = functools.partial(_input, cell, g, first + b, tile)

                def use(m: Expr, gates: Sequence[Expr]) -> None:
                    update(s, b + m, tile, gates)

                weight.sums(start, _state(h, s, b), tile, range(4), rows=count, use=use)

            _each_row(cell, weight.most_rows(4), rows)

    _through_time(cell, h0, h, step, before)


def _input(cell: Cell, g: Buffer, row: Expr, tile: Expr, m: Expr, gate: int) -> Expr:
    """What G has for a gate of row `row` + m."""
    return _loops.load(g, row + m, (tile * cell.gates + gate) * cell.lanes, lanes=cell.lanes)


def _state(h: Buffer, s: Expr, b: Expr) -> Read:
    """The states before step s of the rows from b on."""
    return lambda m, k, width: _loops.load(h, s, b + m, k, lanes=width)


def rnn(cell: Cell, weight: Weight, g: Buffer, h0: Buffer, h: Buffer) -> None:
    """RNN: one gate."""
    lanes = cell.lanes

    def step(s: Expr, first: Expr) -> None:
        with _tiles(cell) as tile:

            def rows(b: Expr, count: int) -> None:
                start = functools.partial(_input, cell, g, first + b, tile)

                def use(m: Expr, gates: Sequence[Expr]) -> None:
                    value = cell.activations[0](cell.limited(gates[0]))
                    _loops.store(h, value, s + 1, b + m, tile * lanes, lanes=lanes)

                weight.sums(start, _state(h, s, b), tile, range(1), rows=count, use=use)

            _each_row(cell, weight.most_rows(1), rows)

    _through_time(cell, h0, h, step, lambda _: None)


def gru(cell: Cell, weight: Weight, g: Buffer, h0: Buffer, *rest: Buffer) -> None:
    """GRU: gates z, r, h; the state is reset before or after the product with R."""
    f, act = cell.activations
    lanes = cell.lanes
    if cell.linear:
        inner, h = rest
    else:
        h, updates, resets = rest

    def mixed(z: Expr, new: Expr, s: Expr, b: Expr, tile: Expr) -> None:
        old = _loops.load(h, s, b, tile * lanes, lanes=lanes)
        _loops.store(h, new + z * (old - new), s + 1, b, tile * lanes, lanes=lanes)

    def linear_step(s: Expr, first: Expr) -> None:
        with _tiles(cell) as tile:

            def start(b: Expr, m: Expr, gate: int) -> Expr:
                if gate == 2:
                    return _loops.load(inner, tile * lanes, lanes=lanes)
                return _input(cell, g, first + b, tile, m, gate)

            def rows(b: Expr, count: int) -> None:

                def use(m: Expr, gates: Sequence[Expr]) -> None:
                    z, reset, pulled = gates
                    held = _input(cell, g, first + b, tile, m, 2) + f(cell.limited(reset)) * pulled
                    _update(cell, mixed, f(cell.limited(z)), act(cell.limited(held)), s, b + m, tile)

                weight.sums(functools.partial(start, b), _state(h, s, b), tile, range(3), rows=count, use=use)

            _each_row(cell, weight.most_rows(3), rows)

    def step(s: Expr, first: Expr) -> None:
        with _tiles(cell) as tile:

            def both(b: Expr, count: int) -> None:
                start = functools.partial(_input, cell, g, first + b, tile)

                def use(m: Expr, gates: Sequence[Expr]) -> None:
                    z, reset = gates
                    _loops.store(updates, f(cell.limited(z)), b + m, tile * lanes, lanes=lanes)
                    old = _loops.load(h, s, b + m, tile * lanes, lanes=lanes)
                    _loops.store(resets, f(cell.limited(reset)) * old, b + m, tile * lanes, lanes=lanes)

                weight.sums(start, _state(h, s, b), tile, range(2), rows=count, use=use)

            _each_row(cell, weight.most_rows(2), both)
        with _tiles(cell) as tile:

            def last(b: Expr, count: int) -> None:
                def read(m: int, k: Expr, width: int) -> Expr:
                    return _loops.load(resets, b + m, k, lanes=width)

                def use(m: Expr, gates: Sequence[Expr]) -> None:
                    z = _loops.load(updates, b + m, tile * lanes, lanes=lanes)
                    _update(cell, mixed, z, act(cell.limited(gates[0])), s, b + m, tile)

                start = functools.partial(_input, cell, g, first + b, tile)
                weight.sums(start, read, tile, (2,), rows=count, use=use)

            _each_row(cell, weight.most_rows(1), last)

    _through_time(cell, h0, h, linear_step if cell.linear else step, lambda _: None)


def _update(cell: Cell, mixed: Callable[..., None], z: Expr, new: Expr, s: Expr, b: Expr, tile: Expr) -> None:
    """Name the new state, which is used twice, by a register."""
    held = _loops.registers(1, cell.lanes)
    _loops.store(held, new, 0, lanes=cell.lanes)
    mixed(z, _loops.load(held, 0, lanes=cell.lanes), s, b, tile)
