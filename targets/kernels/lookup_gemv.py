"""Products of few rows with packed weights: codes are decoded in registers and never stored dense.

    y[m, n] = Σ_g s[g, n] · (Σ_{k in g} a[m, k] · codebook[code[k, n]]) + bias[n]

Reading the weights is what such a product costs; the codes are an eighth of them at 4 bits. A scale multiplies the
sum of its group where whole words make up a group: one product a column and group instead of one a weight.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx_ir
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import (
    _choice,
    _decode,
    _lookup_rows,
    _loops,
    _prefetch,
    _pshufb,
    _tbl,
    _weights,
    lookup_gemm,
    lookup_int8,
)
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels.conv import fusable

# Up to so many rows decoding with the product in float32 is faster than before it, as a kernel of its own.
_MOST_ROWS = {"arm": 4, "cuda": 4, "x86": 64}
# Vectors of columns that are decoded at a time, at most.
_MOST_VECTORS = 4


def takes(e: Emitter, rows: Dim, weight: onnx_ir.Value) -> bool:
    """Whether a product of so many rows with a packed weight is one kernel; a note where that leaves int8 undone."""
    in_int8 = e.machine.activations == "int8"
    if isinstance(rows, int):
        return in_int8 or rows <= _MOST_ROWS[e.machine.kind]
    if in_int8 and _decode.terms(e, weight):
        e.note_fallback("activations=int8: a product of an open number of rows runs in float32; --shape fixes it")
    return False


def _vectors(rows: int, machine: Machine) -> int:
    """Vectors of columns of a tile whose sums, of all rows, stay in registers; 0 when there are too many rows."""
    if machine.kind != "x86":
        # NEON's tables, and the four vectors that they make at a time, take registers from the sums: more would spill.
        return 2 if machine.kind == "arm" else 1
    room = machine.registers - 8
    return min(_MOST_VECTORS, room // rows) if lookup_gemm.vectors(machine) * rows <= room else 0


def _columns(rows: int, n: int, machine: Machine) -> dict[str, int]:
    """Columns that a tile may have, by name, the rule's first: as many vectors as there are registers for."""
    at_once = _vectors(rows, machine)
    rule = at_once or lookup_gemm.vectors(machine)
    most = min(_MOST_VECTORS, (machine.registers - 8) // (rows if at_once else 1))
    others = [v for v in range(1, most + 1) if v != rule] if machine.kind == "x86" else []
    needed = -(-n // machine.lanes)
    return {str(c): c for c in (min(v, needed) * machine.lanes for v in (rule, *others))}


def _shape_of(lookup: LookupWeight, rows: int, n: int) -> str:
    """What a table of measured tiles calls the product."""
    parts = [f"lookup product {rows}x{math.prod(lookup.shape) // n} -> {n}", f"{lookup.bits} bits"]
    if lookup.group_size:
        parts.append(f"groups of {lookup.group_size}")
    if lookup.codebook.ndim > 1:
        parts.append(f"codebooks {_choice.by(*lookup.codebook.shape)}")
    parts += [word for word, table in (("scale", lookup.scale), ("offset", lookup.offset)) if table is not None]
    return ", ".join(parts)


def product(
    e: Emitter, a: relax.Expr, weight: onnx_ir.Value, bias: relax.Expr | None, *, transposed: bool = False
) -> relax.Expr | None:
    """a: [.., m, k], weight: Lookups' sum of shape [k, n] (or [n, k]) -> [.., m, n]; None when no such kernel fits.

    A sum of packed weights is a product with each: a dense sum would have to be written and read in every run.
    """
    terms = _decode.terms(e, weight)
    if not terms or str(a.ty.dtype) != "float32":
        return None
    n = terms[0].shape[0 if transposed else 1]
    if bias is not None and (int(bias.ty.shape[-1]) != n or math.prod(int(s) for s in bias.ty.shape) != n):
        return None
    total = None
    for lookup in terms:
        result = with_packed(e, a, lookup, bias if total is None else None, transposed=transposed)
        if result is None:
            return None
        total = result if total is None else _decode.added(e, total, result)
    return total


def with_packed(
    e: Emitter, a: relax.Expr, lookup: LookupWeight, bias: relax.Expr | None, *, transposed: bool = False
) -> relax.Expr | None:
    """`product` with one packed weight, for a in float32."""
    shape = [int(s) for s in a.ty.shape]
    n = lookup.shape[0 if transposed else 1]
    rows = math.prod(shape[:-1])
    if e.machine.activations == "int8":
        flat = e.reshape(a, (rows, shape[-1]))
        result = lookup_int8.product(e, flat, lookup, bias, transposed=transposed)
        if result is not None:
            return e.reshape(result, (*shape[:-1], n))
        if rows > _MOST_ROWS[e.machine.kind]:
            return None
    at_once = _vectors(rows, e.machine)
    called = _shape_of(lookup, rows, n)
    columns = e.choices.pick(called, _columns(rows, n, e.machine))

    def pack(array: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(array.T if transposed else array, columns)

    tiles = _decode.arrange(lookup, pack, e.machine, by_word=True)
    if tiles is None or not (_in_threads(e, tiles) or tiles.form.is_vectorised(e.machine)):
        return None
    words = _in_a_row(tiles) if at_once and e.machine.kind == "x86" else tiles.words
    arrays = [x for x in (words, tiles.codebook, tiles.scale, tiles.offset, tiles.group) if x is not None]
    arguments = [(x.shape, str(x.dtype)) for x in arrays]
    inputs = [e.reshape(a, (rows, shape[-1])), *[e.weight(x) for x in arrays]]
    if bias is not None:
        inputs.append(e.reshape(bias, (n,)))
        arguments.append(((n,), "float32"))
    if e.machine.kind == "cuda":
        e.note_kernel(f"lookup product: {tiles.bits} bits, {rows} x {shape[-1]} x {n}, the codebook in shared memory")
        fn = functools.partial(_lookup_rows.product, tiles, has_bias=bias is not None)
        return e.reshape(fusable(e, fn, *inputs, name="lookup_rows"), (*shape[:-1], n))
    body = functools.partial(_body if at_once else lookup_gemm.body, tiles, e.machine, rows, n, bias is not None)
    function = _loops.kernel([((rows, shape[-1]), "float32"), *arguments, ((rows, n), "float32")], body)
    function = function.with_attrs(_choice.annotation(called))
    e.note_kernel(f"lookup product: {tiles.bits} bits, {rows} x {shape[-1]} x {n}")
    result = e.call(function, inputs, [((rows, n), "float32")], name="lookup_gemv")[0]
    return e.reshape(result, (*shape[:-1], n))


def _in_a_row(tiles: Tiles) -> np.ndarray:
    """int8: the bytes of all words as a tile needs them, the vectors of its columns in turn: one stream to read.

    Two more stand at the end, for the vector that begins in the middle of the last word.
    """
    in_order = np.ascontiguousarray(tiles.words.transpose(0, 2, 1, 3))
    return np.append(in_order.reshape(-1).view(np.int8), np.zeros(2, np.int8))


def _in_threads(e: Emitter, tiles: Tiles) -> bool:
    """Whether a GPU's kernel takes the weight: one codebook that its threads share."""
    return e.machine.kind == "cuda" and not tiles.entries


def _body(
    tiles: Tiles,
    machine: Machine,
    rows: int,
    n: int,
    has_bias: bool,
    a: Buffer,
    words: Buffer,
    codebook: Buffer,
    *rest: Buffer,
) -> None:
    table, bias, out = _decode.operands(tiles, machine, codebook, rest, has_bias=has_bias)
    scale = table.scale
    lanes, per, depth, columns = tiles.lanes, tiles.per, tiles.depth, tiles.shape[-1]
    vectors = columns // lanes
    run = _decode.run_of(tiles, per)
    # A scale multiplies the sum of its group, not each weight.
    late = scale is not None and table.offset is None and (table.group is None or run > 0)

    def place(t: Expr, w: Expr, v: int) -> Expr:
        """The byte at which a vector of words in a row begins."""
        return ((t * -(-depth // per) + w) * vectors + v) * (4 * lanes)

    def load(t: Expr, v: int, w: Expr, byte: int) -> Expr:
        if len(words.shape) > 1:
            return _loops.load(words, t, v, w, 0, lanes=lanes)
        return tirx.reinterpret(f"int32x{lanes}", _loops.load(words, place(t, w, v) + byte, lanes=4 * lanes))

    ahead = _prefetch.ahead(tiles.words.nbytes, vectors * 4 * lanes) if len(words.shape) == 1 else 0

    def step(sums: list[Buffer], t: Expr, w: Expr, number: int) -> None:
        if ahead:
            _prefetch.ask(words, place(t, w + ahead, 0), size=vectors * 4 * lanes)
        order = [(j, v) for j in range(number) for v in range(vectors)]
        if machine.kind == "arm":  # `tbl` decodes four codes of a word: too many words at once do not fit in registers
            order.sort(key=lambda at: (at[1], _tbl.turn(at[0], tiles.bits)))
        elif tiles.is_in_bytes:
            order.sort(key=lambda at: (_pshufb.turn(at[0])[0], at[1]))
        for j, v in order:
            # A vector that begins in the middle of a word has the upper half at the bottom of each lane: one shift
            # less. It lies across two cache lines, so that more of them, from each byte on, would gain nothing.
            past = table.place(j) // 16 * 16 if len(words.shape) == 1 else 0
            word = load(t, v, w, past // 8)
            g = 0 if late or table.group is None else table.group[w * per + j]
            value = table.value(word, j, t, v, g, past=past)
            value = value if late else table.scaled(value, t, v, g)
            for m in range(rows):
                _add(sums[m], value * _factor(a, m, w * per, j, number, lanes, machine), v, lanes)

    def steps(sums: list[Buffer], t: Expr, first: Expr, number: int) -> None:
        """Add the products of `number` rows of the weight, from word `first` on."""
        if number // per:
            with T.serial(0, number // per) as w:
                step(sums, t, first + w, per)
        if number % per:
            step(sums, t, first + number // per, number % per)

    def group(sums: list[Buffer], t: Expr, g: Expr, number: int) -> None:
        """Add the products of the `number` rows of group g, times its scales."""
        parts = [_loops.zeros(vectors, lanes) for _ in range(rows)]
        if ahead:
            _prefetch.ask(scale, t, g + ahead * per // run, 0, size=vectors * 4 * lanes)
        steps(parts, t, g * (run // per), number)
        for part, total in zip(parts, sums, strict=True):
            for v in range(vectors):
                factor = _loops.load(scale, t, g, v * lanes, lanes=lanes)
                _add(total, _loops.load(part, v * lanes, lanes=lanes) * factor, v, lanes)

    def tile(t: Expr, width: int) -> None:
        sums = [_loops.zeros(vectors, lanes) for _ in range(rows)]
        if late and run:
            with T.serial(0, depth // run) as g:
                group(sums, t, g, run)
            if depth % run:
                group(sums, t, tirx.const(depth // run, "int32"), depth % run)
        else:
            steps(sums, t, tirx.const(0, "int32"), depth)
        for m in range(rows):
            for start, count, size in _loops.split(width, lanes):
                for c in range(start, start + count * size, size):
                    value = _loops.load(sums[m], c, lanes=size)
                    if late and not run:
                        value = value * _loops.load(scale, t, 0, c, lanes=size)
                    if bias is not None:
                        value = value + _loops.load(bias, t * columns + c, lanes=size)
                    _loops.store(out, value, m, t * columns + c, lanes=size)

    _loops.each_tile(n, columns, machine, tile, work=rows * n * depth)


def _add(sums: Buffer, term: Expr, v: int, lanes: int) -> None:
    _loops.store(sums, _loops.load(sums, v * lanes, lanes=lanes) + term, v * lanes, lanes=lanes)


def _factor(a: Buffer, m: int, first: Expr, j: int, number: int, lanes: int, machine: Machine) -> Expr:
    """a[m, first + j] in every lane; ARM multiplies by one lane of a register, so one register holds four of them."""
    start = j - j % lanes
    if machine.kind != "arm" or lanes == 1 or start + lanes > number:
        return _loops.splat(a[m, first + j], lanes)
    return tirx.Shuffle([_loops.load(a, m, first + start, lanes=lanes)], [j - start] * lanes)
