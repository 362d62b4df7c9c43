"""The kernels that run a recurrent cell through time, on vectors of hidden units."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._relax.dims import Dim
from mc_opt.targets.kernels import _loops, _math
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


def _sums(
    cell: Cell, start: Callable[[int], Expr], read: Callable[[Expr], Expr], r: Buffer, tile: Expr, gates: Sequence[int]
) -> list[Expr]:
    """start(gate) + Σ_k read(k) · R[k, gate] for a tile, in several chains.

    Chains hide the latency of one, and with `start` added last they round less: a step's rounding comes back in the
    next steps, which some trained cells amplify a thousandfold.
    """
    chains = next((n for n in (4, 2) if cell.hidden % n == 0 and n * len(gates) <= cell.sums), 1)
    # A buffer a gate: TVM takes large ones from a pool, where a thread's code writes them at every step.
    sums = [_loops.registers(chains, cell.lanes) for _ in gates]

    def partial(n: int, c: int) -> Expr:
        return _loops.load(sums[n], c * cell.lanes, lanes=cell.lanes)

    for held in sums:
        for c in range(chains):
            _loops.store(held, _loops.splat(0.0, cell.lanes), c * cell.lanes, lanes=cell.lanes)
    with T.serial(0, cell.hidden // chains) as k:
        for c in range(chains):
            row = k * chains + c
            factor = _loops.splat(read(row), cell.lanes)
            for n, gate in enumerate(gates):
                term = factor * _loops.load(r, tile, row, gate * cell.lanes, lanes=cell.lanes)
                _loops.store(sums[n], partial(n, c) + term, c * cell.lanes, lanes=cell.lanes)
    for n, gate in enumerate(gates):
        total = functools.reduce(operator.add, (partial(n, c) for c in range(chains)))
        _loops.store(sums[n], start(gate) + total, 0, lanes=cell.lanes)
    return [partial(n, 0) for n in range(len(gates))]


def lstm(cell: Cell, g: Buffer, r: Buffer, h0: Buffer, c0: Buffer, h: Buffer, c: Buffer) -> None:
    """LSTM: gates i, o, f, c of a hidden unit, its cell kept in `c`."""
    f, act_g, act_h = cell.activations
    lanes = cell.lanes

    def before(b: Expr) -> None:
        _loops.map_row(
            lambda i, w: _loops.store(c, _loops.load(c0, b, i, lanes=w), b, i, lanes=w), cell.width, lanes=lanes
        )

    def step(s: Expr, first: Expr) -> None:
        with _tiles(cell) as tile, T.serial(0, cell.batch) as b:
            row = first + b
            i, o, forget, new = _sums(
                cell,
                lambda gate: _loops.load(g, row, (tile * 4 + gate) * lanes, lanes=lanes),
                lambda k: h[s, b, k],
                r,
                tile,
                range(4),
            )
            kept = f(cell.limited(forget)) * _loops.load(c, b, tile * lanes, lanes=lanes)
            state = kept + f(cell.limited(i)) * act_g(cell.limited(new))
            _loops.store(c, state, b, tile * lanes, lanes=lanes)
            out = f(cell.limited(o)) * act_h(_loops.load(c, b, tile * lanes, lanes=lanes))
            _loops.store(h, out, s + 1, b, tile * lanes, lanes=lanes)

    _through_time(cell, h0, h, step, before)


def rnn(cell: Cell, g: Buffer, r: Buffer, h0: Buffer, h: Buffer) -> None:
    """RNN: one gate."""
    lanes = cell.lanes

    def step(s: Expr, first: Expr) -> None:
        with _tiles(cell) as tile, T.serial(0, cell.batch) as b:
            row = first + b
            (total,) = _sums(
                cell,
                lambda _: _loops.load(g, row, tile * lanes, lanes=lanes),
                lambda k: h[s, b, k],
                r,
                tile,
                range(1),
            )
            _loops.store(h, cell.activations[0](cell.limited(total)), s + 1, b, tile * lanes, lanes=lanes)

    _through_time(cell, h0, h, step, lambda _: None)


def gru(cell: Cell, g: Buffer, r: Buffer, h0: Buffer, *rest: Buffer) -> None:
    """GRU: gates z, r, h; the state is reset before or after the product with R."""
    f, act = cell.activations
    lanes = cell.lanes
    if cell.linear:
        inner, h = rest
    else:
        h, updates, resets = rest

    def gate_input(row: Expr, tile: Expr, gate: int) -> Expr:
        return _loops.load(g, row, (tile * 3 + gate) * lanes, lanes=lanes)

    def mixed(z: Expr, new: Expr, s: Expr, b: Expr, tile: Expr) -> None:
        old = _loops.load(h, s, b, tile * lanes, lanes=lanes)
        _loops.store(h, new + z * (old - new), s + 1, b, tile * lanes, lanes=lanes)

    def linear_step(s: Expr, first: Expr) -> None:
        with _tiles(cell) as tile, T.serial(0, cell.batch) as b:
            row = first + b

            def start(gate: int) -> Expr:
                if gate == 2:
                    return _loops.load(inner, tile * lanes, lanes=lanes)
                return gate_input(row, tile, gate)

            z, reset, pulled = _sums(cell, start, lambda k: h[s, b, k], r, tile, range(3))
            held = gate_input(row, tile, 2) + f(cell.limited(reset)) * pulled
            _update(cell, mixed, f(cell.limited(z)), act(cell.limited(held)), s, b, tile)

    def step(s: Expr, first: Expr) -> None:
        with _tiles(cell) as tile, T.serial(0, cell.batch) as b:
            row = first + b
            z, reset = _sums(cell, functools.partial(gate_input, row, tile), lambda k: h[s, b, k], r, tile, range(2))
            _loops.store(updates, f(cell.limited(z)), b, tile * lanes, lanes=lanes)
            old = _loops.load(h, s, b, tile * lanes, lanes=lanes)
            _loops.store(resets, f(cell.limited(reset)) * old, b, tile * lanes, lanes=lanes)
        with _tiles(cell) as tile, T.serial(0, cell.batch) as b:
            row = first + b
            (new,) = _sums(cell, functools.partial(gate_input, row, tile), lambda k: resets[b, k], r, tile, (2,))
            z = _loops.load(updates, b, tile * lanes, lanes=lanes)
            _update(cell, mixed, z, act(cell.limited(new)), s, b, tile)

    _through_time(cell, h0, h, linear_step if cell.linear else step, lambda _: None)


def _update(cell: Cell, mixed: Callable[..., None], z: Expr, new: Expr, s: Expr, b: Expr, tile: Expr) -> None:
    """Name the new state, which is used twice, by a register."""
    held = _loops.registers(1, cell.lanes)
    _loops.store(held, new, 0, lanes=cell.lanes)
    mixed(z, _loops.load(held, 0, lanes=cell.lanes), s, b, tile)
