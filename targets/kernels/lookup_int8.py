"""Products of packed weights with activations of 8 bits: codes become bytes, four of which are multiplied in a lane.

    q[m, k] = round(a[m, k] / s[m]),   s[m] = max_k |a[m, k]| / 127
    y[m, n] = s[m] · Σ_g scale[g, n] · (Σ_{k in g} q[m, k] · level[code[k, n]]) + bias[n]

`vpdpbusd` multiplies unsigned bytes with signed ones, so the levels are taken 128 higher and 128 · Σ q is taken off.
Of many rows, `lookup_amx` multiplies them in tiles where the process may; its sums of integers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import _bytes, _loops, _prefetch, _weights, lookup_amx
from mc_opt.targets.kernels._bytes import BYTES, LANES, Bytes, Finish, permuted
from mc_opt.targets.kernels._loops import Argument, Buffer, Expr

# Vectors of sums that leave registers for codes and levels; of columns in a tile of few rows, and of many: of one or
# two columns' vectors, loading the inputs would take longer than multiplying.
_MOST_SUMS = 24
_FEW_ROWS, _MANY_ROWS = 4, 3


def product(
    e: Emitter, a: relax.Expr, weight: LookupWeight, bias: relax.Expr | None, *, transposed: bool
) -> relax.Expr | None:
    """a: [m, k], the weight [k, n] (or [n, k]) -> [m, n]; None, and a note why, when it runs with fp32 activations."""
    rows, depth = (int(s) for s in a.ty.shape)
    n = weight.shape[0 if transposed else 1]
    in_tiles = lookup_amx.takes(rows, depth, weight.group_size, e.machine)
    vectors = min(lookup_amx.vectors(rows) if in_tiles else _vectors(rows), -(-n // LANES))
    # Functions that share their constants must find them in one order, be it slower by some hundredths for many rows.
    is_part = e.shares and _FEW_ROWS % vectors == 0 and n > (_FEW_ROWS - 1) * LANES
    stored = _FEW_ROWS if is_part else vectors

    def pack(array: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(array.T if transposed else array, stored * LANES)

    made = _bytes.arrange(weight, pack, e.machine, vectors=vectors)
    if isinstance(made, str):
        e.note_fallback(f"activations=int8: a product of {rows} x {depth} x {n} runs in float32: {made}")
        return None
    high = lookup_amx.high(rows) if in_tiles else _high(rows, made.vectors)
    # 64 bytes of each row of a block lie side by side: one stream to read, whatever the rows are.
    width = -(-made.groups * made.run // BYTES)
    outputs: list[Argument] = [
        ((-(-rows // high), width, high, BYTES), "int8"),
        ((rows,), "float32"),
        ((rows, made.groups), "int32"),
    ]
    quantise = _loops.kernel(
        [((rows, depth), "float32"), *outputs], functools.partial(_quantise, rows, depth, made.run)
    )
    unsigned = (made.levels.astype(np.int16) + 128).astype(np.uint8)
    arrays = [made.words, made.scale, unsigned]
    if in_tiles:
        arrays += [made.levels, lookup_amx.configuration(made, rows)]
    held = [*e.call(quantise, [a], outputs, name="quantise_rows"), *map(e.weight, arrays)]
    if bias is not None:
        held.append(e.reshape(bias, (n,)))
    arguments = [([int(s) for s in x.ty.shape], str(x.ty.dtype)) for x in held]
    body = functools.partial(_body, made, e.machine, rows, n, in_tiles, bias is not None)
    function = _loops.kernel([*arguments, ((rows, n), "float32")], body)
    e.note_kernel(
        f"lookup product: {weight.bits} bits, {rows} x {depth} x {n}, activations of 8 bits,"
        f" levels rounded by {made.error:.2%}{', in AMX tiles' if in_tiles else ''}"
    )
    return e.call(function, held, [((rows, n), "float32")], name="lookup_int8")[0]


def _vectors(rows: int) -> int:
    """Vectors of columns in a tile."""
    return _FEW_ROWS if _FEW_ROWS * rows <= _MOST_SUMS else _MANY_ROWS


def _high(rows: int, vectors: int) -> int:
    """Rows of a tile whose sums stay in registers, as even as it goes."""
    return -(-rows // -(-rows // (_MOST_SUMS // vectors)))


def _quantise(rows: int, depth: int, run: int, a: Buffer, q: Buffer, step: Buffer, taken: Buffer) -> None:
    """The rows of a in 8 bits, their steps, and -128 times the sums of their groups."""
    high, width = int(q.shape[2]), BYTES * int(q.shape[1])

    def size(i: Expr, m: Expr, lanes: int) -> Expr:
        # Without the sign, floats are in order as integers; there NaN is above infinity, and its row becomes NaN.
        bits = tirx.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", _loops.load(a, m, i, lanes=lanes))
        return bits & _loops.splat(0x7FFFFFFF, lanes, "int32")

    with T.serial(0, rows) as m:
        largest = _loops.reduce_row(lambda i, lanes: size(i, m, lanes), depth, tirx.max, 0, lanes=LANES, dtype="int32")
        top = tirx.reinterpret("float32", largest)
        factor = _loops.registers(1, 1)
        T.buffer_store(step, top * tirx.const(1 / 127, "float32"), [m])
        # A row of next to nothing becomes zeros: its quotient could be infinite.
        small = tirx.const(1e-30, "float32")
        T.buffer_store(factor, tirx.Select(top > small, tirx.const(127.0, "float32") / tirx.max(top, small), 0.0), [0])

        def write(i: Expr, lanes: int, m: Expr = m, factor: Buffer = factor) -> None:
            x = _loops.load(a, m, i, lanes=lanes) * _loops.splat(factor[0], lanes) + _loops.splat(0.5, lanes)
            kind = "int8" if lanes == 1 else f"int8x{lanes}"
            _loops.store(q, tirx.Cast(kind, tirx.floor(x)), *_place(m, i, high), lanes=lanes)

        _loops.map_row(write, depth, lanes=LANES)
        if depth < width:
            with T.serial(0, width - depth) as i:
                T.buffer_store(q, tirx.const(0, "int8"), list(_place(m, i + depth, high)))
        with T.serial(0, int(taken.shape[1])) as g:

            def code(i: Expr, lanes: int, m: Expr = m, g: Expr = g) -> Expr:
                kind = "int32" if lanes == 1 else f"int32x{lanes}"
                return tirx.Cast(kind, _loops.load(q, *_place(m, g * run + i, high), lanes=lanes))

            lanes = LANES if run % LANES == 0 else LANES // 2
            total = _loops.reduce_row(code, run, lambda x, y: x + y, 0, lanes=lanes, dtype="int32")
            T.buffer_store(taken, total * tirx.const(-128, "int32"), [m, g])


def _place(m: Expr, k: Expr, high: int) -> tuple[Expr, Expr, Expr, Expr]:
    """Where byte k of row m is."""
    return m // high, k // BYTES, m % high, k % BYTES


def _body(
    weight: Bytes,
    machine: Machine,
    rows: int,
    n: int,
    in_tiles: bool,
    has_bias: bool,
    q: Buffer,
    step: Buffer,
    taken: Buffer,
    words: Buffer,
    scale: Buffer,
    levels: Buffer,
    *rest: Buffer,
) -> None:
    *extra, out = rest
    bias = extra.pop() if has_bias else None
    columns = weight.vectors * LANES

    def finish(value: Expr, m: Expr, column: Expr, lanes: int) -> None:
        """Write sums of products in units of the row's step."""
        value = value * _loops.splat(step[m], lanes)
        if bias is not None:
            value = value + _loops.load(bias, column, lanes=lanes)
        _loops.store(out, value, m, column, lanes=lanes)

    def loops(tile: Callable[[Expr, int], None]) -> None:
        _loops.each_tile(n, columns, machine, tile, work=rows * n * weight.run * weight.groups)

    held = (q, words, scale, levels)
    lanewise = functools.partial(_tile, weight, rows, held, taken, finish)
    if not in_tiles:
        loops(lanewise)
        return
    signed, configuration = extra
    in_amx = functools.partial(lookup_amx.tile, weight, rows, (q, words, scale, signed), configuration, finish)
    with T.If(lookup_amx.granted()):
        with T.Then():
            loops(in_amx)
        with T.Else():
            loops(lanewise)


def _tile(
    weight: Bytes,
    rows: int,
    operands: tuple[Buffer, Buffer, Buffer, Buffer],
    taken: Buffer,
    finish: Finish,
    t: Expr,
    width: int,
) -> None:
    """`width` columns of tile t for all rows; operands: the inputs, the words, the scales and the levels + 128."""
    q, words, scale, levels = operands
    vectors, run, unit = weight.vectors, weight.run, weight.unit
    high = int(q.shape[2])
    # Rows beyond a first block find the weights in a cache.
    ahead = _prefetch.ahead(weight.words.nbytes, vectors * BYTES) if rows <= high else 0

    def level(w: Expr, v: int, p: int) -> Expr:
        tile, vector = weight.at(t, v)
        return permuted(levels, weight, _loops.load(words, tile, w, vector, 0, lanes=LANES), p)

    def word_of(w: Expr, b: Expr, first: int, parts: list[Buffer]) -> None:
        """Add the products of one word of codes in each lane."""
        if ahead:
            tile, first_vector = weight.at(t, 0)
            _prefetch.ask(words, tile, w + ahead, first_vector, 0, size=vectors * BYTES)
        for p in range(weight.planes):
            values = [level(w, v, p) for v in range(vectors)]
            k = w * unit + p * 4
            for i, part in enumerate(parts):
                four = tirx.reinterpret("int32", _loops.load(q, b, k // BYTES, first + i, k % BYTES, lanes=4))
                factor = tirx.reinterpret("int8x64", _loops.splat(four, LANES))
                for v, value in enumerate(values):
                    held = _loops.load(part, v * LANES, lanes=LANES)
                    total = T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", held, value, factor)
                    _loops.store(part, total, v * LANES, lanes=LANES)

    def group(g: Expr, b: Expr, first: int, sums: list[Buffer]) -> None:
        parts = [_loops.registers(vectors, LANES, "int32") for _ in sums]
        tile, first_vector = weight.at(t, 0)
        if ahead:
            _prefetch.ask(scale, tile, g + ahead * unit // run, first_vector * LANES, size=vectors * BYTES)
        for i, part in enumerate(parts):
            for v in range(vectors):
                _loops.store(part, _loops.splat(taken[b * high + first + i, g], LANES), v * LANES, lanes=LANES)
        with T.serial(0, run // unit) as w:
            word_of(g * (run // unit) + w, b, first, parts)
        for part, total in zip(parts, sums, strict=True):
            for v in range(vectors):
                at = v * LANES
                value = tirx.Cast(f"float32x{LANES}", _loops.load(part, at, lanes=LANES))
                value = value * _loops.load(scale, tile, g, first_vector * LANES + at, lanes=LANES)
                _loops.store(total, _loops.load(total, at, lanes=LANES) + value, at, lanes=LANES)

    def rows_of(b: Expr, first: int, count: int) -> None:
        sums = [_loops.zeros(vectors, LANES) for _ in range(count)]
        with T.serial(0, weight.groups) as g:
            group(g, b, first, sums)
        for i, total in enumerate(sums):
            for start, number, size in _loops.split(width, LANES):
                for c in range(start, start + number * size, size):
                    value = _loops.load(total, c, lanes=size)
                    finish(value, b * high + first + i, t * vectors * LANES + c, size)

    def block(b: Expr, count: int) -> None:
        """`count` rows, so many at a time as have room in registers."""
        most = _high(count, vectors)
        for first in range(0, count, most):
            rows_of(b, first, min(most, count - first))

    with T.serial(0, rows // high) as b:
        block(b, high)
    if rows % high:
        block(tirx.const(rows // high, "int32"), rows % high)
