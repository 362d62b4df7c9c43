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
from mc_opt.targets._relax.emitter import Emitter
from mc_opt.targets.kernels import _decode, _lookup_rows, _loops, _tbl, _weights
from mc_opt.targets.kernels._decode import Table, Tiles
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels.conv import fusable

# Above this many rows decoding once and multiplying from the dense tiles is faster.
MOST_ROWS = 4
# Vectors of columns that a tile has at most: NEON's tables, and the four vectors that they make at a time, take
# registers from the sums: more would spill.
_MOST_VECTORS = {"arm": 2, "cuda": 1, "x86": 4}


def product(
    e: Emitter, a: relax.Expr, weight: onnx_ir.Value, bias: relax.Expr | None, *, transposed: bool = False
) -> relax.Expr | None:
    """a: [.., m, k], weight: a Lookup of shape [k, n] (or [n, k]) -> [.., m, n]; None when no such kernel fits."""
    lookup = e.lookup(weight)
    if lookup is None or str(a.ty.dtype) != "float32":
        return None
    shape = [int(s) for s in a.ty.shape]
    n = lookup.shape[0 if transposed else 1]
    rows = math.prod(shape[:-1])
    if bias is not None and (int(bias.ty.shape[-1]) != n or math.prod(int(s) for s in bias.ty.shape) != n):
        return None
    vectors = min(_MOST_VECTORS[e.machine.kind], -(-n // e.machine.lanes))
    columns = vectors * e.machine.lanes

    def pack(array: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(array.T if transposed else array, columns)

    tiles = _decode.arrange(lookup, pack, e.machine)
    if tiles is None or not (_in_threads(e, tiles) or _decode.registers_of(tiles, e.machine)):
        return None
    arrays = [x for x in (tiles.words, tiles.codebook, tiles.scale, tiles.offset, tiles.group) if x is not None]
    arguments = [(x.shape, str(x.dtype)) for x in arrays]
    inputs = [e.reshape(a, (rows, shape[-1])), *[e.weight(x) for x in arrays]]
    if bias is not None:
        inputs.append(e.reshape(bias, (n,)))
        arguments.append(((n,), "float32"))
    if e.machine.kind == "cuda":
        e.note_kernel(f"lookup product: {tiles.bits} bits, {rows} x {shape[-1]} x {n}, the codebook in shared memory")
        fn = functools.partial(_lookup_rows.product, tiles, has_bias=bias is not None)
        return e.reshape(fusable(e, fn, *inputs, name="lookup_rows"), (*shape[:-1], n))
    body = functools.partial(_body, tiles, e.machine, rows, n, bias is not None)
    function = _loops.kernel([((rows, shape[-1]), "float32"), *arguments, ((rows, n), "float32")], body)
    e.note_kernel(f"lookup product: {tiles.bits} bits, {rows} x {shape[-1]} x {n}")
    result = e.call(function, inputs, [((rows, n), "float32")], name="lookup_gemv")[0]
    return e.reshape(result, (*shape[:-1], n))


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
    *extra, out = rest
    bias = extra.pop() if has_bias else None
    scale = extra.pop(0) if tiles.scale is not None else None
    offset = extra.pop(0) if tiles.offset is not None else None
    group = extra.pop(0) if tiles.group is not None else None
    lanes, per, depth, columns = tiles.lanes, tiles.per, tiles.depth, tiles.shape[-1]
    vectors = columns // lanes
    run = _decode.run_of(tiles)
    # A scale multiplies the sum of its group, not each weight.
    late = scale is not None and offset is None and (group is None or run > 0)
    table = Table(tiles, machine, codebook)

    def step(sums: Buffer, t: Expr, w: Expr, number: int) -> None:
        order = [(j, v) for j in range(number) for v in range(vectors)]
        if machine.kind == "arm":  # `tbl` decodes four codes of a word: too many words at once do not fit in registers
            order.sort(key=lambda at: (at[1], _tbl.turn(at[0], tiles.bits)))
        for j, v in order:
            k = w * per + j
            g = 0 if group is None or late else group[k]
            value = table.value(_loops.load(words, t, v, w, 0, lanes=lanes), j, t, v, g)
            if scale is not None and not late:
                value = value * _loops.load(scale, t, g, v * lanes, lanes=lanes)
            if offset is not None:
                value = value + _loops.load(offset, t, g, v * lanes, lanes=lanes)
            for m in range(rows):
                at = (m * vectors + v) * lanes
                term = value * _factor(a, m, w * per, j, number, lanes, machine)
                _loops.store(sums, _loops.load(sums, at, lanes=lanes) + term, at, lanes=lanes)

    def steps(sums: Buffer, t: Expr, first: Expr, number: int) -> None:
        """Add the products of `number` rows of the weight, from word `first` on."""
        if number // per:
            with T.serial(0, number // per) as w:
                step(sums, t, first + w, per)
        if number % per:
            step(sums, t, first + number // per, number % per)

    def group_of(sums: Buffer, t: Expr, g: Expr, number: int) -> None:
        part = _zeros(rows * vectors, lanes)
        steps(part, t, g * (run // per), number)
        for m in range(rows):
            for v in range(vectors):
                at = (m * vectors + v) * lanes
                term = _loops.load(part, at, lanes=lanes) * _loops.load(scale, t, g, v * lanes, lanes=lanes)
                _loops.store(sums, _loops.load(sums, at, lanes=lanes) + term, at, lanes=lanes)

    def tile(t: Expr, width: int) -> None:
        sums = _zeros(rows * vectors, lanes)
        if late and group is not None:
            with T.serial(0, depth // run) as g:
                group_of(sums, t, g, run)
            if depth % run:
                group_of(sums, t, tirx.const(depth // run, "int32"), depth % run)
        else:
            steps(sums, t, tirx.const(0, "int32"), depth)
        for m in range(rows):
            for start, count, size in _loops.split(width, lanes):
                for c in range(start, start + count * size, size):
                    value = _loops.load(sums, m * columns + c, lanes=size)
                    if late and group is None:
                        value = value * _loops.load(scale, t, 0, c, lanes=size)
                    if bias is not None:
                        value = value + _loops.load(bias, t * columns + c, lanes=size)
                    _loops.store(out, value, m, t * columns + c, lanes=size)

    whole = n // columns
    if whole:
        with _loops.each(whole, machine, work=rows * n * depth) as t:
            tile(t, columns)
    if n % columns:
        tile(tirx.const(whole, "int32"), n % columns)


def _zeros(count: int, lanes: int) -> Buffer:
    sums = _loops.registers(count, lanes)
    for k in range(count):
        _loops.store(sums, _loops.splat(0.0, lanes), k * lanes, lanes=lanes)
    return sums


def _factor(a: Buffer, m: int, first: Expr, j: int, number: int, lanes: int, machine: Machine) -> Expr:
    """a[m, first + j] in every lane; ARM multiplies by one lane of a register, so one register holds four of them."""
    start = j - j % lanes
    if machine.kind != "arm" or lanes == 1 or start + lanes > number:
        return _loops.splat(a[m, first + j], lanes)
    return tirx.Shuffle([_loops.load(a, m, first + start, lanes=lanes)], [j - start] * lanes)
