"""Products of packed weights with activations of 8 bits: codes become bytes, four of which are multiplied in a lane.

    q[m, k] = round(a[m, k] / s[m]),   s[m] = max_k |a[m, k]| / 127
    y[m, n] = s[m] · Σ_g scale[g, n] · (Σ_{k in g} q[m, k] · level[code[k, n]]) + bias[n]

`vpdpbusd` multiplies unsigned bytes with signed ones, so the levels are taken 128 higher and 128 · Σ q is taken off.
Of many rows, `lookup_amx` multiplies them in tiles where the process may; other processors do by `_dot`. The sums of
integers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import _bytes, _dot, _loops, _prefetch, _weights, lookup_amx
from mc_opt.targets.kernels._bytes import BYTES, Bytes, Finish, permuted
from mc_opt.targets.kernels._dot import Dot
from mc_opt.targets.kernels._loops import Argument, Buffer, Expr

# Vectors of columns in a tile of few rows, and of many by their lanes: of fewer columns, loading the inputs would take
# longer than multiplying.
_FEW_ROWS, _MANY_ROWS = 4, {_dot.WIDE: 3, _dot.NARROW: 2}
# Lanes in which inputs are rounded.
_LANES = 16
# Blocks of rows for which a group is decoded once, to bytes that stay in a cache, rather than for each of them. The
# widest vectors decode beside what multiplies them: it would take longer.
_MANY_BLOCKS, _MOST_DENSE = 8, 64 << 10
# Reads levels: (group, word in the group, vector, plane).
_Read = Callable[[Expr, Expr, int, int], Expr]
# Products of a column that are written out at a time, where sums of 16 bits have room for them.
_AT_ONCE = 8


def product(
    e: Emitter, a: relax.Expr, weight: LookupWeight, bias: relax.Expr | None, *, transposed: bool
) -> relax.Expr | None:
    """a: [m, k], the weight [k, n] (or [n, k]) -> [m, n]; None, and a note why, when it runs with fp32 activations."""
    rows, depth = (int(s) for s in a.ty.shape)
    n = weight.shape[0 if transposed else 1]
    dot = _dot.of(e.machine)
    if isinstance(dot, str):
        _stays(e, rows, depth, n, dot)
        return None
    in_tiles = lookup_amx.takes(rows, depth, weight.group_size, e.machine)
    vectors = min(lookup_amx.vectors(rows) if in_tiles else _vectors(rows, dot), -(-n // dot.lanes))
    # Functions that share their constants must find them in one order, be it slower by some hundredths for many rows.
    is_part = e.shares and _FEW_ROWS % vectors == 0 and n > (_FEW_ROWS - 1) * dot.lanes
    stored = _FEW_ROWS if is_part else vectors

    def pack(array: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(array.T if transposed else array, stored * dot.lanes)

    made = _bytes.arrange(weight, pack, e.machine, dot, vectors=vectors)
    if isinstance(made, str):
        _stays(e, rows, depth, n, made)
        return None
    high = lookup_amx.high(rows) if in_tiles else _high(rows, made)
    # 64 bytes of each row of a block lie side by side: one stream to read, whatever the rows are.
    width = -(-made.groups * made.run // BYTES)
    outputs: list[Argument] = [
        ((-(-rows // high), width, high, BYTES), "int8"),
        ((rows,), "float32"),
        ((rows, made.groups), "int32"),
    ]
    quantise = _loops.kernel([((rows, depth), "float32"), *outputs], functools.partial(_quantise, rows, depth, made))
    arrays = [made.words, made.scale, made.table]
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


def _stays(e: Emitter, rows: int, depth: int, n: int, reason: str) -> None:
    """Say why a product runs with fp32 activations."""
    e.note_fallback(f"activations=int8: a product of {rows} x {depth} x {n} runs in float32: {reason}")


def _vectors(rows: int, dot: Dot) -> int:
    """Vectors of columns in a tile."""
    return _FEW_ROWS if _FEW_ROWS * rows <= dot.most_sums else _MANY_ROWS[dot.lanes]


def _high(rows: int, weight: Bytes) -> int:
    """Rows of a tile whose sums stay in registers, as even as it goes."""
    return -(-rows // -(-rows // (weight.dot.most_sums // weight.vectors)))


def _decodes_once(rows: int, high: int, weight: Bytes) -> bool:
    """Whether many blocks of rows share what a group is decoded to."""
    size = weight.run * weight.vectors * weight.dot.lanes
    is_coded = weight.dot.lanes == _dot.NARROW and weight.planes > 1
    return is_coded and rows >= _MANY_BLOCKS * high and size <= _MOST_DENSE


def _quantise(rows: int, depth: int, weight: Bytes, a: Buffer, q: Buffer, step: Buffer, taken: Buffer) -> None:
    """The rows of a in 8 bits, their steps, and what the raised levels add to the sums of their groups, negative."""
    run = weight.run
    high, width = int(q.shape[2]), BYTES * int(q.shape[1])

    def size(i: Expr, m: Expr, lanes: int) -> Expr:
        # Without the sign, floats are in order as integers; there NaN is above infinity, and its row becomes NaN.
        bits = tirx.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", _loops.load(a, m, i, lanes=lanes))
        return bits & _loops.splat(0x7FFFFFFF, lanes, "int32")

    with T.serial(0, rows) as m:
        largest = _loops.reduce_row(lambda i, lanes: size(i, m, lanes), depth, tirx.max, 0, lanes=_LANES, dtype="int32")
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

        _loops.map_row(write, depth, lanes=_LANES)
        if depth < width:
            with T.serial(0, width - depth) as i:
                T.buffer_store(q, tirx.const(0, "int8"), list(_place(m, i + depth, high)))
        with T.serial(0, int(taken.shape[1])) as g:

            def code(i: Expr, lanes: int, m: Expr = m, g: Expr = g) -> Expr:
                kind = "int32" if lanes == 1 else f"int32x{lanes}"
                return tirx.Cast(kind, _loops.load(q, *_place(m, g * run + i, high), lanes=lanes))

            lanes = _LANES if run % _LANES == 0 else _LANES // 2
            total = _loops.reduce_row(code, run, lambda x, y: x + y, 0, lanes=lanes, dtype="int32")
            T.buffer_store(taken, total * tirx.const(-weight.raised, "int32"), [m, g])


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
    columns = weight.vectors * weight.dot.lanes

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
    """`width` columns of tile t for all rows; operands: the inputs, the words, the scales and the raised levels."""
    q, words, scale, levels = operands
    vectors, run, unit, dot = weight.vectors, weight.run, weight.unit, weight.dot
    lanes, size_of_step, count = dot.lanes, vectors * dot.size, run // unit
    # Products that are added to a sum at a time, and words that have so many.
    together = 1 if dot.has_vnni else weight.pairs
    at_once = max(1, min(together, _AT_ONCE) // weight.planes)
    high = int(q.shape[2])
    # Rows beyond a first block find the weights in a cache.
    ahead = _prefetch.ahead(weight.words.nbytes, size_of_step) if rows <= high else 0

    def level(g: Expr, w: Expr, v: int, p: int) -> Expr:
        """The levels of plane p of word w of a group."""
        tile, vector = weight.at(t, v)
        return permuted(levels, weight, _loops.load(words, tile, g * count + w, vector, 0, lanes=lanes), p)

    def words_of(g: Expr, w: Expr, number: int, b: Expr, first: int, parts: list[Buffer], read: _Read) -> None:
        """Add the products of so many words of a group, from w on, in each lane."""
        if ahead:
            tile, first_vector = weight.at(t, 0)
            for i in range(number):
                _prefetch.ask(words, tile, g * count + w + (ahead + i), first_vector, 0, size=size_of_step)
        planes = [(w + i, p) for i in range(number) for p in range(weight.planes)]
        for start in range(0, len(planes), together):
            held = planes[start : start + together]
            values = [[read(g, word, v, p) for v in range(vectors)] for word, p in held]
            for i, part in enumerate(parts):
                factors = [factor(b, (g * count + word) * unit + p * 4, first + i) for word, p in held]
                for v in range(vectors):
                    products = [(value[v], four) for value, four in zip(values, factors, strict=True)]
                    total = dot.added(_loops.load(part, v * lanes, lanes=lanes), products, is_signed=weight.raised == 0)
                    _loops.store(part, total, v * lanes, lanes=lanes)

    def factor(b: Expr, k: Expr, row: int) -> Expr:
        """Four bytes of a row of block b, from k on, in every lane."""
        four = tirx.reinterpret("int32", _loops.load(q, b, k // BYTES, row, k % BYTES, lanes=4))
        return tirx.reinterpret(f"int8x{dot.size}", _loops.splat(four, lanes))

    def group(g: Expr, b: Expr, first: int, sums: Sequence[tuple[Buffer, Sequence[Expr]]], read: _Read = level) -> None:
        """Add the products of a group to rows of sums: each a buffer, and the indices of its row."""
        parts = [_loops.registers(vectors, lanes, "int32") for _ in sums]
        tile, first_vector = weight.at(t, 0)
        if ahead:
            _prefetch.ask(scale, tile, g + ahead * unit // run, first_vector * lanes, size=size_of_step)
        for i, part in enumerate(parts):
            for v in range(vectors):
                _loops.store(part, _loops.splat(taken[b * high + first + i, g], lanes), v * lanes, lanes=lanes)
        if count // at_once:
            with T.serial(0, count // at_once) as w:
                words_of(g, w * at_once, at_once, b, first, parts, read)
        if count % at_once:
            last = tirx.const(count // at_once * at_once, "int32")
            words_of(g, last, count % at_once, b, first, parts, read)
        for part, (total, row) in zip(parts, sums, strict=True):
            for v in range(vectors):
                at = v * lanes
                value = tirx.Cast(f"float32x{lanes}", _loops.load(part, at, lanes=lanes))
                value = value * _loops.load(scale, tile, g, first_vector * lanes + at, lanes=lanes)
                _loops.store(total, _loops.load(total, *row, at, lanes=lanes) + value, *row, at, lanes=lanes)

    def finished(total: Buffer, row: Sequence[Expr], m: Expr) -> None:
        for start, number, size in _loops.split(width, lanes):
            for c in range(start, start + number * size, size):
                finish(_loops.load(total, *row, c, lanes=size), m, t * vectors * lanes + c, size)

    def rows_of(b: Expr, first: int, number: int) -> None:
        sums = [_loops.zeros(vectors, lanes) for _ in range(number)]
        with T.serial(0, weight.groups) as g:
            group(g, b, first, [(total, ()) for total in sums])
        for i, total in enumerate(sums):
            finished(total, (), b * high + first + i)

    def block(b: Expr, number: int) -> None:
        """So many rows, as many at a time as have room in registers."""
        most = _high(number, weight)
        for first in range(0, number, most):
            rows_of(b, first, min(most, number - first))

    def all_rows() -> None:
        """Decode each group once, for all rows."""
        dense = T.sblock_alloc_buffer((count * weight.planes * vectors, dot.size), "int8")
        sums = T.sblock_alloc_buffer((rows, vectors * lanes), "float32")

        def place(w: Expr, v: int, p: int) -> Expr:
            return (w * weight.planes + p) * vectors + v

        def read(_: Expr, w: Expr, v: int, p: int) -> Expr:
            return _loops.load(dense, place(w, v, p), 0, lanes=dot.size)

        def some(g: Expr, b: Expr, number: int) -> None:
            group(g, b, 0, [(sums, (b * high + i,)) for i in range(number)], read)

        with T.serial(0, rows) as m:
            for v in range(vectors):
                _loops.store(sums, _loops.splat(0.0, lanes), m, v * lanes, lanes=lanes)
        with T.serial(0, weight.groups) as g:
            with T.serial(0, count) as w:
                for v in range(vectors):
                    for p in range(weight.planes):
                        _loops.store(dense, level(g, w, v, p), place(w, v, p), 0, lanes=dot.size)
            with T.serial(0, rows // high) as b:
                some(g, b, high)
            if rows % high:
                some(g, tirx.const(rows // high, "int32"), rows % high)
        with T.serial(0, rows) as m:
            finished(sums, (m,), m)

    if _decodes_once(rows, high, weight):
        all_rows()
        return
    with T.serial(0, rows // high) as b:
        block(b, high)
    if rows % high:
        block(tirx.const(rows // high, "int32"), rows % high)
