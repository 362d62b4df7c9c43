"""Recurrent cells on a GPU: a block of threads for each row of the batch, the state in memory that the block shares.

One launch runs through all of time. A thread has hidden units of its own, and reads R [hidden, hidden · gates] so
that neighbours read neighbouring columns, which are ordered [unit, gate].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets import _machine
from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _loops
from mc_opt.targets.kernels._cells import Cell
from mc_opt.targets.kernels._loops import Buffer, Expr

_MOST_THREADS = 1024
# Float32 values that a block shares for each hidden unit: the state, and what a GRU resets of it.
_SHARED = {"LSTM": 1, "GRU": 2, "RNN": 1}


def most_hidden(kind: str, machine: Machine) -> int:
    """The hidden units whose state fits into the memory that a block shares."""
    return machine.l1 // (4 * _SHARED[kind])


@dataclasses.dataclass(frozen=True)
class _Grid:
    """How a cell's rows and units become threads; on the processor, loops."""

    cell: Cell
    machine: Machine

    @property
    def _is_host(self) -> bool:
        return self.machine.cpu == _machine.HOST

    def rows(self) -> Expr:
        """The rows of the batch, a block each."""
        if self._is_host:
            return T.serial(0, self.cell.batch)
        return T.thread_binding(0, self.cell.batch, thread="blockIdx.x")

    @contextmanager
    def units(self) -> Iterator[Expr]:
        """The hidden units; where the shared state was written, the threads wait for each other before the next."""
        hidden = self.cell.hidden
        if self._is_host:
            with T.serial(0, hidden) as unit:
                yield unit
            return
        threads = min(-(-hidden // 32) * 32, _MOST_THREADS)
        rounds = -(-hidden // threads)
        with T.thread_binding(0, threads, thread="threadIdx.x") as thread, T.serial(0, rounds) as turn:
            unit = turn * threads + thread
            if hidden % threads == 0:
                yield unit
                return
            with T.If(unit < hidden), T.Then():
                yield unit

    def shared(self) -> Buffer:
        """Memory of a block for a value a hidden unit."""
        return T.sblock_alloc_buffer((self.cell.hidden,), "float32", scope="shared")


def _sums(cell: Cell, read: Callable[[Expr], Expr], r: Buffer, unit: Expr, gates: Sequence[int]) -> list[Expr]:
    """Σ_k read(k) · R[k, unit, gate] for each gate of a unit."""
    sums = _loops.registers(len(gates), 1, scope="local")
    for n in range(len(gates)):
        T.buffer_store(sums, tirx.const(0.0, "float32"), [n])
    with T.serial(0, cell.hidden) as k:
        for n, gate in enumerate(gates):
            T.buffer_store(sums, sums[n] + read(k) * r[0, k, unit * cell.gates + gate], [n])
    return [sums[n] for n in range(len(gates))]


def _through_time(
    grid: _Grid,
    h0: Buffer,
    h: Buffer,
    *,
    begin: Callable[[Expr, Expr], None],
    step: Callable[[Expr, Expr, Expr, Callable[[Expr], Expr]], None],
) -> None:
    """Copy the initial states, then call step(row, number, row of G, read) in the order of time.

    `read(k)` is the state before the step, which ends with the new one in `h`.
    """
    cell = grid.cell
    with grid.rows() as row:
        state = grid.shared()
        with grid.units() as unit:
            begin(row, unit)
            T.buffer_store(h, h0[row, unit], [0, row, unit])
            T.buffer_store(state, h0[row, unit], [unit])
        with T.serial(0, cell.steps) as s:
            time = cell.steps - 1 - s if cell.reverse else s
            step(row, s, time * cell.batch + row, lambda k: state[k])
            # Apart from the step, whose threads all read the state: between the two they wait for each other.
            with grid.units() as unit:
                T.buffer_store(state, h[s + 1, row, unit], [unit])


def lstm(cell: Cell, machine: Machine, g: Buffer, r: Buffer, h0: Buffer, c0: Buffer, h: Buffer, c: Buffer) -> None:
    """LSTM: gates i, o, f, c of a hidden unit, its cell kept in `c`."""
    f, act_g, act_h = cell.activations
    grid = _Grid(cell, machine)

    def begin(row: Expr, unit: Expr) -> None:
        T.buffer_store(c, c0[row, unit], [row, unit])

    def step(row: Expr, s: Expr, at: Expr, read: Callable[[Expr], Expr]) -> None:
        with grid.units() as unit:
            sums = _sums(cell, read, r, unit, range(4))
            i, o, forget, new = (cell.limited(g[at, unit * 4 + n] + total) for n, total in enumerate(sums))
            T.buffer_store(c, f(forget) * c[row, unit] + f(i) * act_g(new), [row, unit])
            T.buffer_store(h, f(o) * act_h(c[row, unit]), [s + 1, row, unit])

    _through_time(grid, h0, h, begin=begin, step=step)


def rnn(cell: Cell, machine: Machine, g: Buffer, r: Buffer, h0: Buffer, h: Buffer) -> None:
    """RNN: one gate."""
    grid = _Grid(cell, machine)

    def step(row: Expr, s: Expr, at: Expr, read: Callable[[Expr], Expr]) -> None:
        with grid.units() as unit:
            (total,) = _sums(cell, read, r, unit, range(1))
            T.buffer_store(h, cell.activations[0](cell.limited(g[at, unit] + total)), [s + 1, row, unit])

    _through_time(grid, h0, h, begin=lambda _row, _unit: None, step=step)


def gru(cell: Cell, machine: Machine, g: Buffer, r: Buffer, h0: Buffer, *rest: Buffer) -> None:
    """GRU: gates z, r, h; the state is reset before or after the product with R."""
    f, act = cell.activations
    grid = _Grid(cell, machine)
    h = rest[-1]

    def mix(row: Expr, s: Expr, unit: Expr, z: Expr, new: Expr) -> None:
        held = _loops.registers(1, 1, scope="local")
        T.buffer_store(held, new, [0])
        T.buffer_store(h, held[0] + z * (h[s, row, unit] - held[0]), [s + 1, row, unit])

    def linear_step(row: Expr, s: Expr, at: Expr, read: Callable[[Expr], Expr]) -> None:
        inner = rest[0]
        with grid.units() as unit:
            z, reset, pulled = _sums(cell, read, r, unit, range(3))
            factor = f(cell.limited(g[at, unit * 3 + 1] + reset))
            new = act(cell.limited(g[at, unit * 3 + 2] + factor * (inner[unit] + pulled)))
            mix(row, s, unit, f(cell.limited(g[at, unit * 3] + z)), new)

    def step(row: Expr, s: Expr, at: Expr, read: Callable[[Expr], Expr]) -> None:
        resets = grid.shared()
        with grid.units() as unit:
            z, reset = _sums(cell, read, r, unit, range(2))
            # The update waits in the place of the new state, which its own thread alone reads and writes.
            T.buffer_store(h, f(cell.limited(g[at, unit * 3] + z)), [s + 1, row, unit])
            T.buffer_store(resets, f(cell.limited(g[at, unit * 3 + 1] + reset)) * h[s, row, unit], [unit])
        with grid.units() as unit:
            (pulled,) = _sums(cell, lambda k: resets[k], r, unit, (2,))
            new = act(cell.limited(g[at, unit * 3 + 2] + pulled))
            mix(row, s, unit, h[s + 1, row, unit], new)

    _through_time(grid, h0, h, begin=lambda _row, _unit: None, step=linear_step if cell.linear else step)
