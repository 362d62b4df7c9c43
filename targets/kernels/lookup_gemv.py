"""Products of few rows with packed weights: codes are decoded in registers and never stored dense.

    y[m, n] = Σ_g s[g, n] · (Σ_{k in g} a[m, k] · codebook[code[k, n]]) + bias[n]

Reading the weights is what such a product costs; the codes are an eighth of them at 4 bits. A scale multiplies the
sum of its group where whole words make up a group: one product a column and group instead of one a weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import onnx_ir
from tvm import relax

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import (
    _choice,
    _decode,
    _lookup_rows,
    _lookup_tile,
    _loops,
    _weights,
    lookup_gemm,
    lookup_int8,
)
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._lookup_tile import LookupTile
from mc_opt.targets.kernels._loops import Buffer, Expr
from mc_opt.targets.kernels.conv import fusable

# Up to so many rows decoding with the product in float32 is faster than before it, as a kernel of its own.
MOST_ROWS = {"arm": 4, "cuda": 4, "x86": 64}
# Vectors of columns that are decoded at a time, at most.
_MOST_VECTORS = 4


def takes(e: Emitter, rows: Dim, weight: onnx_ir.Value) -> bool:
    """Whether a product of so many rows with a packed weight is one kernel; a note where that leaves int8 undone."""
    in_int8 = e.machine.activations == "int8"
    if isinstance(rows, int):
        return in_int8 or rows <= MOST_ROWS[e.machine.kind]
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


def _shape_of(lookup: LookupWeight, size: tuple[int, int, int]) -> str:
    """What a table of measured tiles calls the product of [m, k] and [k, n]; size: (m, k, n)."""
    rows, depth, n = size
    parts = [f"lookup product {rows}x{depth} -> {n}", f"{lookup.bits} bits"]
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
        if rows > MOST_ROWS[e.machine.kind]:
            return None
    return of_matrix(e, a, lookup, lambda array: array.T if transposed else array, bias, columns=n)


def of_matrix(
    e: Emitter,
    a: relax.Expr,
    lookup: LookupWeight,
    matrix: Callable[[np.ndarray], np.ndarray],
    bias: relax.Expr | None,
    *,
    columns: int,
) -> relax.Expr | None:
    """a: [.., m, k] in float32 times the [k, columns] that `matrix` makes of a packed weight -> [.., m, columns].

    None where no such kernel takes the codes in that order.
    """
    shape = [int(s) for s in a.ty.shape]
    rows, n = math.prod(shape[:-1]), columns
    at_once = _vectors(rows, e.machine)
    called = _shape_of(lookup, (rows, shape[-1], n))
    width = e.choices.pick(called, _columns(rows, n, e.machine))

    def pack(array: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(matrix(array), width)

    tiles = _decode.arrange(lookup, pack, e.machine, by_word=True)
    if tiles is None or not (_in_threads(e, tiles) or tiles.form.is_vectorised(e.machine)):
        return None
    arrays = _lookup_tile.arrays(tiles, is_in_a_row=at_once > 0 and e.machine.kind == "x86")
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
    lanes, columns = tiles.lanes, tiles.shape[-1]
    product = LookupTile(tiles, machine, words, table)

    def read(m: int, k: Expr, width: int) -> Expr:
        return _loops.load(a, m, k, lanes=width)

    def tile(t: Expr, width: int) -> None:
        for m, sums in enumerate(product.sums(t, rows, read)):
            for start, count, size in _loops.split(width, lanes):
                for c in range(start, start + count * size, size):
                    value = _loops.load(sums, c, lanes=size)
                    if product.scale is not None:
                        value = value * _loops.load(product.scale, t, 0, c, lanes=size)
                    if bias is not None:
                        value = value + _loops.load(bias, t * columns + c, lanes=size)
                    _loops.store(out, value, m, t * columns + c, lanes=size)

    _loops.each_tile(n, columns, machine, tile, work=rows * n * tiles.depth)
