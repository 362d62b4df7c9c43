"""Attention of new tokens over a cache, read up to the position of each token and once for the heads that share it.

y[t] = Σ_{j ≤ p(t)} e^(a_j - m) v_j / Σ_{j ≤ p(t)} e^(a_j - m),   a_j = q[t]·k_j / √s,   m = max_j a_j
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import _loops, _math, softmax
from mc_opt.targets.kernels._loops import Buffer, Expr

_LOWEST = -65504.0
# Rows that go through the cache together, and floats of a cache line.
_ROWS, _LINE = 4, 16


def attention(e: Emitter, node: onnx_ir.Node) -> None:
    """CachedAttention: a kernel that runs through a row's part of the cache; on a GPU, products of the whole."""
    values = [v for v in node.inputs if v is not None]
    q, keys, held, positions = (e.plain(v) for v in values)
    dtype, kind = str(q.ty.dtype), str(positions.ty.dtype)
    shape, cache = dims.sizes(q), dims.sizes(keys)
    if e.machine.kind == "cuda":
        e.set(node.outputs[0], _of_everything(e, q, keys, held, positions))
        return
    own, length = _loops.inside(shape), _loops.inside(shape[2:3])
    arguments = [(own, dtype), (cache, dtype), (cache, dtype), (length, kind), (own, dtype)]
    body = functools.partial(_body, own, cache, dtype, e.machine)
    function = _loops.kernel(arguments, body)
    e.note_kernel(f"cached attention: {shape[1]} heads on {cache[1]}, {cache[2]} positions of {cache[3]}")
    result = e.call(function, [q, keys, held, positions], [(shape, dtype)], name="cached_attention")[0]
    e.set(node.outputs[0], result)


def _body(
    shape: Sequence[Dim],
    cache: Sequence[Dim],
    dtype: str,
    machine: Machine,
    q: Buffer,
    keys: Buffer,
    values: Buffer,
    positions: Buffer,
    y: Buffer,
) -> None:
    """Rows are the heads that share keys, token by token; a few of them go through the cache together."""
    batch, heads, length, size = shape
    _, groups, room, _ = cache
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(room, int) and isinstance(size, int)
    shared = heads // groups
    rows = length * shared
    tile = _tile(rows if isinstance(rows, int) else shared)
    tiles = dims.tiles(rows, tile)
    lanes = math.gcd(size, machine.lanes)  # of a vector; so many positions are scored together
    with _loops.each(batch * groups * tiles, machine, work=2 * batch * heads * length * room * size) as number:
        first, g, b = number % tiles * tile, number // tiles % groups, number // (tiles * groups)

        def place(r: int) -> tuple[Expr, Expr, Expr]:
            # Rows beyond the end are the last one again, computed and written with the same result.
            row = first + r if dims.factor(rows) % tile == 0 else tirx.min(first + r, rows - 1)
            return b, g * shared + row % shared, row // shared

        run = _Run([place(r) for r in range(tile)], (b, g), room=room, size=size, lanes=lanes, dtype=dtype)
        weights = _loops.registers(tile, run.pitch, dtype)
        totals = _weigh(run, q, keys, values, positions, weights)
        _mix(run, values, positions, weights, totals, y)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A few rows on their way through the cache of one group of heads: where they are in q, and what they read."""

    rows: Sequence[tuple[Expr, Expr, Expr]]
    cache: tuple[Expr, Expr]
    room: int
    size: int
    lanes: int
    dtype: str

    @property
    def pitch(self) -> int:
        """The weights of a row, in whole vectors."""
        return -(-self.room // self.lanes) * self.lanes

    @property
    def parts(self) -> range:
        """Where the vectors of a head begin."""
        return range(0, self.size, self.lanes)

    def seen(self, r: int, positions: Buffer) -> Expr:
        """How many positions a row sees."""
        count = positions[self.rows[r][2]].astype("int32") + 1
        return tirx.max(tirx.min(count, tirx.const(self.room, "int32")), tirx.const(1, "int32"))

    def last(self, positions: Buffer) -> Expr:
        """How many the rows see together."""
        return functools.reduce(tirx.max, (self.seen(r, positions) for r in range(len(self.rows))))

    def load(self, buffer: Buffer, *index: Expr) -> Expr:
        """A vector."""
        return _loops.load(buffer, *index, lanes=self.lanes)

    def store(self, buffer: Buffer, value: Expr, *index: Expr) -> None:
        """Write a vector."""
        _loops.store(buffer, value, *index, lanes=self.lanes)

    def splat(self, value: Expr | float) -> Expr:
        """A value in every lane."""
        return _loops.splat(value, self.lanes, self.dtype)


def _weigh(run: _Run, q: Buffer, keys: Buffer, values: Buffer, positions: Buffer, weights: Buffer) -> list[Expr]:
    """Write e^(a_j - m) of each row, and return their sums."""
    lanes, rows = run.lanes, range(len(run.rows))
    highest, totals = _loops.registers(len(rows), lanes, run.dtype), _loops.registers(len(rows), lanes, run.dtype)
    for r in rows:
        run.store(highest, run.splat(_LOWEST), r * lanes)
        run.store(totals, run.splat(0.0), r * lanes)
    blocks = (run.last(positions) + (lanes - 1)) // lanes
    with T.serial(0, blocks) as k:
        _ask(values, (*run.cache, k * lanes), lanes)
        for r in rows:

            def product(i: int, r: int = r) -> Expr:
                j = k * lanes + i if run.room % lanes == 0 else tirx.min(k * lanes + i, run.room - 1)
                terms = [run.load(q, *run.rows[r], c) * run.load(keys, *run.cache, j, c) for c in run.parts]
                return functools.reduce(_add, terms)

            scores = _sums([product(i) for i in range(lanes)]) * run.splat(tirx.const(run.size**-0.5, run.dtype))
            index = T.ramp(k * lanes, 1, lanes) if lanes > 1 else k
            scores = tirx.Select(index < run.splat(run.seen(r, positions)), scores, run.splat(_LOWEST))
            run.store(weights, scores, r * run.pitch + k * lanes)
            most = tirx.max(run.load(highest, r * lanes), run.load(weights, r * run.pitch + k * lanes))
            run.store(highest, most, r * lanes)
    found = []
    for r in rows:
        peak, total = _loops.registers(1, 1, run.dtype), _loops.registers(1, 1, run.dtype)
        T.buffer_store(peak, _fold(run.load(highest, r * lanes), lanes, tirx.max), [0])
        with T.serial(0, blocks) as k:
            at = r * run.pitch + k * lanes
            shifted = run.load(weights, at) - run.splat(peak[0])
            run.store(weights, _math.exp_not_positive(shifted) if run.dtype == "float32" else tirx.exp(shifted), at)
            run.store(totals, run.load(totals, r * lanes) + run.load(weights, at), r * lanes)
        T.buffer_store(total, _fold(run.load(totals, r * lanes), lanes, _add), [0])
        found.append(total[0])
    return found


def _mix(run: _Run, values: Buffer, positions: Buffer, weights: Buffer, totals: Sequence[Expr], y: Buffer) -> None:
    """Write the mean of the values of each row, by its weights."""
    results = [_loops.registers(1, run.size, run.dtype) for _ in run.rows]
    for held in results:
        for c in run.parts:
            run.store(held, run.splat(0.0), c)
    with T.serial(0, run.last(positions)) as j:
        for r, held in enumerate(results):
            for c in run.parts:
                term = run.load(values, *run.cache, j, c) * run.splat(weights[r * run.pitch + j])
                run.store(held, run.load(held, c) + term, c)
    for held, place, total in zip(results, run.rows, totals, strict=True):
        for c in run.parts:
            run.store(y, run.load(held, c) / run.splat(total), *place, c)


def _tile(rows: int) -> int:
    """How many rows go through the cache together: what registers hold, and few computed in vain."""
    return -(-rows // -(-rows // _ROWS))


def _ask(buffer: Buffer, first: Sequence[Expr], count: int) -> None:
    """Have `count` positions from `first` on fetched while the keys are worked on; an address beyond is no error."""
    *outer, row = first
    size = int(buffer.shape[-1])
    for element in range(0, count * size, _LINE):
        address = tirx.address_of(tirx.BufferLoad(buffer, [*outer, row + element // size, element % size]))
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 3, 1))


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _sums(vectors: Sequence[Expr]) -> Expr:
    """One vector of the sums of as many vectors as each has lanes.

    Of two vectors the neighbouring lanes are added, which leaves one vector, until there is one: fewer steps than a sum
    for each.
    """
    if len(vectors) == 1:
        return vectors[0]
    half = len(vectors) // 2

    def paired(a: Expr, b: Expr) -> Expr:
        even, odd = (tirx.Shuffle([a, b], list(range(start, 2 * lanes, 2))) for start in (0, 1))
        return even + odd

    lanes = vectors[0].ty.dtype.lanes
    return _math.bind(_sums(vectors[:half]), lambda a: _math.bind(_sums(vectors[half:]), lambda b: paired(a, b)))


def _fold(x: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """One value of a vector's lanes, halves combined: a loop over them would wait for each."""
    while lanes > 1:
        lanes //= 2
        name = tirx.Var("x", _math.type_of(x))
        low, high = (tirx.Shuffle([name], list(range(start, start + lanes))) for start in (0, lanes))
        x = tirx.Let(name, x, combine(low, high))
    return x


def _of_everything(
    e: Emitter, q: relax.Expr, keys: relax.Expr, values: relax.Expr, positions: relax.Expr
) -> relax.Expr:
    """Products with the whole cache, what a token does not see masked: reductions that a GPU's threads share."""
    batch, heads, length, size = dims.sizes(q)
    _, groups, room, _ = dims.sizes(keys)
    shared = heads // groups
    dtype = str(q.ty.dtype)

    def scores(a: te.Tensor, k: te.Tensor, p: te.Tensor) -> te.Tensor:
        c = te.reduce_axis((0, size), name="c")
        shape = (batch, heads, length, room)
        dot = te.compute(shape, lambda b, h, t, j: te.sum(a(b, h, t, c) * k(b, h // shared, j, c), axis=c), name="dot")

        def masked(b: Any, h: Any, t: Any, j: Any) -> Any:
            scaled = dot(b, h, t, j) * tirx.const(size**-0.5, dtype)
            return tirx.Select(p(t) >= j, scaled, tirx.const(_LOWEST, dtype))

        return te.compute(shape, masked, name="scores")

    def product(w: te.Tensor, v: te.Tensor) -> te.Tensor:
        j = te.reduce_axis((0, room), name="j")
        shape = (batch, heads, length, size)
        return te.compute(shape, lambda b, h, t, c: te.sum(w(b, h, t, j) * v(b, h // shared, j, c), axis=j), name="mix")

    weights = softmax.along(e, e.te(scores, q, keys, positions, name="scores"), 3)
    return e.te(product, weights, values, name="mix")


HANDLERS: dict[str, Handler] = {"mc_opt.CachedAttention": attention}
