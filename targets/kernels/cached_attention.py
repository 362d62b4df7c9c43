"""Attention of new tokens over a cache: each row reads the cache up to its own position and no further.

y[t] = Σ_{j ≤ p(t)} e^(a_j - m) v_j / Σ_{j ≤ p(t)} e^(a_j - m),   a_j = q[t]·k_j / √s,   m = max_j a_j
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    batch, heads, length, size = shape
    _, groups, room, _ = cache
    lanes = machine.lanes
    padded = -(-room // lanes) * lanes
    factor = tirx.const(size**-0.5, dtype)
    runs = [(start + k * width, width) for start, count, width in _loops.split(size, lanes) for k in range(count)]
    work = 2 * batch * heads * length * room * size
    with _loops.each(batch * heads * length, machine, work=work) as row:
        t, h, b = row % length, (row // length) % heads, row // (length * heads)
        g = h // (heads // groups)
        weights = _loops.registers(1, padded, dtype)
        highest, total = _loops.registers(1, 1, dtype), _loops.registers(1, 1, dtype)
        seen = tirx.max(tirx.min(positions[t].astype("int32") + 1, tirx.const(room, "int32")), tirx.const(1, "int32"))
        blocks = (seen + (lanes - 1)) // lanes
        T.buffer_store(highest, tirx.const(_LOWEST, dtype), [0])
        with T.serial(0, seen) as j:
            terms = [
                _sum(_loops.load(q, b, h, t, c, lanes=w) * _loops.load(keys, b, g, j, c, lanes=w), w) for c, w in runs
            ]
            T.buffer_store(weights, functools.reduce(_add, terms) * factor, [j])
            T.buffer_store(highest, tirx.max(highest[0], weights[j]), [0])
        # The last vector's rest weighs nothing.
        with T.serial(0, blocks * lanes - seen) as j:
            T.buffer_store(weights, tirx.const(-3.0e38, dtype), [seen + j])
        sums = _loops.registers(1, lanes, dtype)
        _loops.store(sums, _loops.splat(0.0, lanes, dtype), 0, lanes=lanes)
        with T.serial(0, blocks) as k:
            shifted = _loops.load(weights, k * lanes, lanes=lanes) - _loops.splat(highest[0], lanes)
            value = _math.exp_not_positive(shifted) if dtype == "float32" else tirx.exp(shifted)
            _loops.store(weights, value, k * lanes, lanes=lanes)
            added = _loops.load(sums, 0, lanes=lanes) + _loops.load(weights, k * lanes, lanes=lanes)
            _loops.store(sums, added, 0, lanes=lanes)
        T.buffer_store(total, _sum(_loops.load(sums, 0, lanes=lanes), lanes), [0])
        result = _loops.registers(1, size, dtype)
        for c, w in runs:
            _loops.store(result, _loops.splat(0.0, w, dtype), c, lanes=w)
        with T.serial(0, seen) as j:
            for c, w in runs:
                term = _loops.load(values, b, g, j, c, lanes=w) * _loops.splat(weights[j], w)
                _loops.store(result, _loops.load(result, c, lanes=w) + term, c, lanes=w)
        for c, w in runs:
            _loops.store(y, _loops.load(result, c, lanes=w) / _loops.splat(total[0], w), b, h, t, c, lanes=w)


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _sum(x: Expr, lanes: int) -> Expr:
    """The sum of a vector's lanes, halves added to each other: a loop over them would wait for each sum."""
    while lanes > 1:
        lanes //= 2
        name = tirx.Var("x", _math.type_of(x))
        low, high = (tirx.Shuffle([name], list(range(start, start + lanes))) for start in (0, lanes))
        x = tirx.Let(name, x, low + high)
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
