"""Products of packed weights with activations of 8 bits: codes become bytes, four of which are multiplied in a lane.

    q[m, k] = round(a[m, k] / s[m]),   s[m] = max_k |a[m, k]| / 127
    y[m, n] = s[m] · step · Σ_g scale[g, n] · (Σ_{k in g} q[m, k] · level[code[k, n]]) + bias[n]
    level   = round(codebook / step)

`vpdpbusd` multiplies unsigned bytes with signed ones, so the levels are stored 128 higher and 128 · Σ q is taken off.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import _decode, _loops, _weights
from mc_opt.targets.kernels._decode import Pack
from mc_opt.targets.kernels._loops import Argument, Buffer, Expr

_LANES, _BYTES = 16, 64
# Bits of the field of a code in a byte.
_FIELD = {1: 1, 2: 2, 3: 4, 4: 4}
_NEEDS = ("avx512vbmi", "avx512vnni")
# Sums of 255 · 127 stay below 2^31.
_MOST_TERMS = 1 << 16
# Vectors of sums that leave registers for codes and levels; of columns in a tile of few rows, and of many: of one or
# two columns' vectors, loading the inputs would take longer than multiplying.
_MOST_SUMS = 24
_FEW_ROWS, _MANY_ROWS = 4, 3


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A weight [k, n] for `vpdpbusd`.

    Attributes:
        words: int32 [t, G · run / unit, v, 16]: plane p of byte q of a word is row word · unit + p · 4 + q.
        levels: uint8 [64], the levels + 128, repeated: a permutation finds them whatever stands above a code.
        scale: float32 [t, G, 16 · v], times the step of the levels.
        run: rows of a group, filled up to whole words.
        field: bits of a code in a byte.
        error: of the levels, √(Σ (w - ŵ)² / Σ w²) without the scales.
    """

    words: np.ndarray
    levels: np.ndarray
    scale: np.ndarray
    run: int
    field: int
    error: float

    @property
    def unit(self) -> int:
        """Rows in a word."""
        return 4 * (8 // self.field)

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return int(self.scale.shape[1])

    @property
    def vectors(self) -> int:
        """Vectors of columns in a tile."""
        return int(self.words.shape[2])


def product(
    e: Emitter, a: relax.Expr, weight: LookupWeight, bias: relax.Expr | None, *, transposed: bool
) -> relax.Expr | None:
    """a: [m, k], the weight [k, n] (or [n, k]) -> [m, n]; None, and a note why, when it runs with fp32 activations."""
    rows, depth = (int(s) for s in a.ty.shape)
    n = weight.shape[0 if transposed else 1]
    vectors = min(_vectors(rows), -(-n // _LANES))

    def pack(array: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(array.T if transposed else array, vectors * _LANES)

    made = _arrange(weight, pack, e.machine)
    if isinstance(made, str):
        e.note_fallback(f"activations=int8: a product of {rows} x {depth} x {n} runs in float32: {made}")
        return None
    high = _high(rows, made.vectors)
    # Four bytes of each row of a tile lie side by side: one stream to read, whatever the rows are.
    outputs: list[Argument] = [
        ((-(-rows // high), made.groups * made.run // 4, high, 4), "int8"),
        ((rows,), "float32"),
        ((rows, made.groups), "int32"),
    ]
    quantise = _loops.kernel(
        [((rows, depth), "float32"), *outputs], functools.partial(_quantise, rows, depth, made.run)
    )
    held = [
        *e.call(quantise, [a], outputs, name="quantise_rows"),
        *map(e.weight, (made.words, made.levels, made.scale)),
    ]
    if bias is not None:
        held.append(e.reshape(bias, (n,)))
    arguments = [([int(s) for s in x.ty.shape], str(x.ty.dtype)) for x in held]
    body = functools.partial(_body, made, e.machine, rows, n, bias is not None)
    function = _loops.kernel([*arguments, ((rows, n), "float32")], body)
    e.note_kernel(
        f"lookup product: {weight.bits} bits, {rows} x {depth} x {n}, activations of 8 bits,"
        f" levels rounded by {made.error:.2%}"
    )
    return e.call(function, held, [((rows, n), "float32")], name="lookup_int8")[0]


def _vectors(rows: int) -> int:
    """Vectors of columns in a tile."""
    return _FEW_ROWS if _FEW_ROWS * rows <= _MOST_SUMS else _MANY_ROWS


def _high(rows: int, vectors: int) -> int:
    """Rows of a tile whose sums stay in registers, as even as it goes."""
    return -(-rows // -(-rows // (_MOST_SUMS // vectors)))


def _arrange(weight: LookupWeight, pack: Pack, machine: Machine) -> Bytes | str:
    """The weight in bytes, or why it cannot be."""
    if not set(_NEEDS) <= set(machine.features):
        return f"{machine.cpu} has not both of {', '.join(_NEEDS)}"
    if weight.bits not in _FIELD or weight.codebook.size != weight.codebook.shape[-1] or weight.offset is not None:
        return "only codes of at most 4 bits with one codebook and no offsets become bytes"
    tiles = _decode.arrange(weight, pack, machine)
    if tiles is None:
        return "its columns or groups lie across the product's"
    field = _FIELD[weight.bits]
    unit = 4 * (8 // field)
    run = _decode.run_of(tiles, unit) if tiles.group is not None else -(-tiles.depth // unit) * unit
    if not run:
        return f"its groups are no multiples of {unit} rows"
    if run > _MOST_TERMS:
        return f"sums of {run} products do not fit in 32 bits"
    codes = pack(_decode.codes_of(weight))
    levels, step, error = _levels(weight.codebook.reshape(-1), np.bincount(codes.reshape(-1), minlength=1 << field))
    count, _, columns = codes.shape
    groups = -(-tiles.depth // run)
    scale = np.ones((count, groups, columns), np.float32) if tiles.scale is None else tiles.scale
    return Bytes(
        words=_words(_weights.pad_to(codes, 1, run), field),
        levels=np.tile(levels, _BYTES // levels.size),
        scale=np.ascontiguousarray(np.broadcast_to(scale, (count, groups, columns)) * np.float32(step)),
        run=run,
        field=field,
        error=error,
    )


def _levels(codebook: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, float, float]:
    """codebook: [n] -> (uint8 [len(counts)], the levels + 128; their step; their error), of the least squared error.

    Powers of two up to 2^6 are exact at a step of the largest / 64; up to 2^7 all are but the positive largest.
    """
    book = np.zeros(counts.size)
    book[: codebook.size] = codebook
    top = float(np.abs(book).max()) or 1.0
    found = []
    for step in (top / 64, top / 127, top / 128):
        rounded = np.clip(np.round(book / step), -128, 127)
        found.append((float(counts @ (book - rounded * step) ** 2), step, rounded))
    least, step, rounded = min(found, key=lambda at: at[0])
    power = float(counts @ book**2)
    return (rounded + 128).astype(np.uint8), step, math.sqrt(least / power) if power else 0.0


def _words(codes: np.ndarray, field: int) -> np.ndarray:
    """codes: [t, K, c], K whole words -> int32 [t, K / unit, c / 16, 16]."""
    tiles, depth, columns = codes.shape
    planes = 8 // field
    split = codes.reshape(tiles, depth // (4 * planes), planes, 4, columns // _LANES, _LANES)
    held = np.zeros((tiles, split.shape[1], 4, columns // _LANES, _LANES), np.uint8)
    for p in range(planes):
        held |= split[:, :, p] << np.uint8(p * field)
    return np.ascontiguousarray(held.transpose(0, 1, 3, 4, 2)).view(np.int32)[..., 0]


def _quantise(rows: int, depth: int, run: int, a: Buffer, q: Buffer, step: Buffer, taken: Buffer) -> None:
    """The rows of a in 8 bits, their steps, and -128 times the sums of their groups."""
    high, width = int(q.shape[2]), 4 * int(q.shape[1])

    def size(i: Expr, m: Expr, lanes: int) -> Expr:
        x = _loops.load(a, m, i, lanes=lanes)
        return tirx.max(x, _loops.splat(0.0, lanes) - x)

    with T.serial(0, rows) as m:
        top = _loops.reduce_row(lambda i, lanes: size(i, m, lanes), depth, tirx.max, 0.0, lanes=_LANES)
        factor = _loops.registers(1, 1)
        T.buffer_store(step, top * tirx.const(1 / 127, "float32"), [m])
        # A row of next to nothing becomes zeros: its quotient could be infinite.
        small = tirx.const(1e-30, "float32")
        T.buffer_store(factor, tirx.Select(top > small, tirx.const(127.0, "float32") / tirx.max(top, small), 0.0), [0])

        def write(i: Expr, lanes: int, m: Expr = m, factor: Buffer = factor) -> None:
            x = _loops.load(a, m, i, lanes=lanes) * _loops.splat(factor[0], lanes) + _loops.splat(0.5, lanes)
            kind = "int8" if lanes == 1 else f"int8x{lanes}"
            _loops.store(q, tirx.Cast(kind, tirx.floor(x)), m // high, i // 4, m % high, i % 4, lanes=lanes)

        _loops.map_row(write, depth, lanes=4)
        if depth < width:
            with T.serial(0, width - depth) as i:
                T.buffer_store(q, tirx.const(0, "int8"), [m // high, (i + depth) // 4, m % high, (i + depth) % 4])
        with T.serial(0, int(taken.shape[1])) as g:

            def code(i: Expr, lanes: int, m: Expr = m, g: Expr = g) -> Expr:
                return tirx.Cast(
                    "int32x4", _loops.load(q, m // high, g * (run // 4) + i // 4, m % high, 0, lanes=lanes)
                )

            total = _loops.reduce_row(code, run, lambda x, y: x + y, 0, lanes=4, dtype="int32")
            T.buffer_store(taken, total * tirx.const(-128, "int32"), [m, g])


def _body(
    weight: Bytes,
    machine: Machine,
    rows: int,
    n: int,
    has_bias: bool,
    q: Buffer,
    step: Buffer,
    taken: Buffer,
    words: Buffer,
    levels: Buffer,
    scale: Buffer,
    *rest: Buffer,
) -> None:
    *extra, out = rest
    bias = extra.pop() if has_bias else None
    vectors, run, unit = weight.vectors, weight.run, weight.unit
    columns = vectors * _LANES
    high = int(q.shape[2])

    def level(t: Expr, w: Expr, v: int, p: int) -> Expr:
        """The levels of plane p of a word."""
        word = _loops.load(words, t, w, v, 0, lanes=_LANES)
        if p:
            word = T.shift_right(word, _loops.splat(p * weight.field, _LANES, "int32"))
        table = _loops.load(levels, 0, lanes=_BYTES)
        index = tirx.reinterpret("int8x64", word)
        return T.call_llvm_pure_intrin("int8x64", "llvm.x86.avx512.permvar.qi.512", table, index)

    def word_of(t: Expr, w: Expr, b: Expr, parts: list[Buffer]) -> None:
        """Add the products of one word of codes in each lane."""
        for p in range(8 // weight.field):
            values = [level(t, w, v, p) for v in range(vectors)]
            for i, part in enumerate(parts):
                four = tirx.reinterpret("int32", _loops.load(q, b, w * (unit // 4) + p, i, 0, lanes=4))
                factor = tirx.reinterpret("int8x64", _loops.splat(four, _LANES))
                for v, value in enumerate(values):
                    held = _loops.load(part, v * _LANES, lanes=_LANES)
                    total = T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", held, value, factor)
                    _loops.store(part, total, v * _LANES, lanes=_LANES)

    def group(t: Expr, g: Expr, b: Expr, sums: list[Buffer]) -> None:
        parts = [_loops.registers(vectors, _LANES, "int32") for _ in sums]
        for i, part in enumerate(parts):
            for v in range(vectors):
                _loops.store(part, _loops.splat(taken[b * high + i, g], _LANES), v * _LANES, lanes=_LANES)
        with T.serial(0, run // unit) as w:
            word_of(t, g * (run // unit) + w, b, parts)
        for part, total in zip(parts, sums, strict=True):
            for v in range(vectors):
                at = v * _LANES
                value = tirx.Cast(f"float32x{_LANES}", _loops.load(part, at, lanes=_LANES))
                value = value * _loops.load(scale, t, g, at, lanes=_LANES)
                _loops.store(total, _loops.load(total, at, lanes=_LANES) + value, at, lanes=_LANES)

    def tile(t: Expr, b: Expr, count: int, width: int) -> None:
        sums = [_loops.zeros(vectors, _LANES) for _ in range(count)]
        with T.serial(0, weight.groups) as g:
            group(t, g, b, sums)
        for i, total in enumerate(sums):
            for start, number, size in _loops.split(width, _LANES):
                for c in range(start, start + number * size, size):
                    value = _loops.load(total, c, lanes=size) * _loops.splat(step[b * high + i], size)
                    if bias is not None:
                        value = value + _loops.load(bias, t * columns + c, lanes=size)
                    _loops.store(out, value, b * high + i, t * columns + c, lanes=size)

    def tiles(t: Expr, width: int) -> None:
        with T.serial(0, rows // high) as b:
            tile(t, b, high, width)
        if rows % high:
            tile(t, tirx.const(rows // high, "int32"), rows % high, width)

    whole = n // columns
    if whole:
        with _loops.each(whole, machine, work=rows * n * weight.run * weight.groups) as t:
            tiles(t, columns)
    if n % columns:
        tiles(tirx.const(whole, "int32"), n % columns)
