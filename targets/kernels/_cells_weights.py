"""The weights of a cell, as its kernels read them: known while building, in codes, or computed by the model.

Codes of R are looked up at each step, or decoded once a call: to float32, or where their entries are short, two to a
word, which halves what a step reads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter, LookupWeight
from mc_opt.targets.kernels import _cells_time, _choice, _decode, _halves, _lookup_tile, _packed, _weights, lookup_gemv
from mc_opt.targets.kernels._cells import Cell
from mc_opt.targets.kernels._cells_product import Dense, Halves, Packed, Weight
from mc_opt.targets.kernels._decode import Tiles
from mc_opt.targets.kernels._tile import Tile
from mc_opt.targets.kernels.gemm import product


@dataclasses.dataclass(frozen=True)
class State:
    """R: what the kernel of a cell is given of it, and what it makes of these buffers."""

    arguments: list[relax.Expr]
    weight: Callable[..., Weight]


def inputs(
    e: Emitter, cell: Cell, source: relax.Expr, w: onnx_ir.Value, bias: relax.Expr | None, *, tile: Tile
) -> relax.Expr:
    """G: source [rows, k] times W, plus the bias; its kernel decodes a packed W by itself where it can."""
    columns, rows = cell.width * cell.gates, dims.sizes(source)[0]
    if isinstance(rows, int) and e.machine.kind != "cuda":
        made = _looked_up_inputs(e, cell, source, w, bias)
        if made is not None:
            return made
    weight: relax.Expr | _packed.Packed | None = None
    if isinstance(rows, int) and _decode.terms(e, w) and _packed.takes(e, _decode.terms(e, w)):
        weight = _packed.arranged(e, w, functools.partial(_pack, cell, columns=tile.columns))
        if weight is not None:
            e.note_kernel(f"lookup product: {weight.stored}, {_choice.by(*dims.sizes(source))} x {columns}")
    weight = _ordered(e, cell, w, tile.columns) if weight is None else weight
    return product(e, source, weight, bias, tile=tile, columns=columns, name="gates")


def _looked_up_inputs(
    e: Emitter, cell: Cell, source: relax.Expr, w: onnx_ir.Value, bias: relax.Expr | None
) -> relax.Expr | None:
    """G of few rows, by products that decode codes in registers; None for many, and where there are none for W."""
    terms = _decode.terms(e, w)
    columns = cell.width * cell.gates
    if not terms or math.prod(dims.sizes(source)[:-1]) > lookup_gemv.MOST_ROWS[e.machine.kind]:
        return None

    def matrix(array: np.ndarray) -> np.ndarray:
        return _rows(cell, array).T

    parts: list[relax.Expr] = []
    for term in terms:
        part = lookup_gemv.of_matrix(e, source, term, matrix, None if parts else bias, columns=columns)
        if part is None:
            return None
        parts.append(part)
    _weights.note_float32(e, w)
    return functools.reduce(functools.partial(_decode.added, e), parts)


def state(e: Emitter, cell: Cell, r: onnx_ir.Value, *, columns: int) -> State:
    """R; dense ones stand in tiles of so many columns."""
    found = _of_codes(e, cell, r)
    if found is not None:
        _weights.note_float32(e, r)
        return found
    return State([_ordered(e, cell, r, columns)], functools.partial(Dense, cell.hidden, cell.lanes, cell.sums))


def _of_codes(e: Emitter, cell: Cell, r: onnx_ir.Value) -> State | None:
    """R in codes; None where it has none, or is decoded to float32."""
    terms = _decode.terms(e, r)
    if not terms or e.machine.kind != "x86":
        return None
    where = f"{cell.kind}: the recurrent weight {r.name!r} is decoded at each call"
    if len(terms) > 1:
        e.note_fallback(f"{where}: it is a sum of codes")
        return None
    tiles, short = _tiles(e, cell, terms[0]), _halves.short(terms[0])
    if tiles is None or not tiles.form.is_vectorised(e.machine):
        e.note_fallback(f"{where}: its codes are not in an order, or of a codebook, that a step could look up")
        return None
    in_halves = None if short is None else _tiles(e, cell, short)
    if in_halves is not None and not _halves.takes(in_halves, e.machine):
        in_halves = None
    way = _cells_time.fastest(cell, tiles, e.machine, has_halves=in_halves is not None)
    once = f"decoded once for {dims.text(cell.steps)} steps"
    if way == "looked up":
        e.note_kernel(f"{cell.kind}: {tiles.bits} bits, looked up at each step")
        arrays = _lookup_tile.arrays(tiles, is_in_a_row=True)
        return State([e.weight(array) for array in arrays], functools.partial(Packed, tiles, e.machine))
    if way == "halves" and in_halves is not None:
        e.note_kernel(f"{cell.kind}: {tiles.bits} bits, {once}, two weights in a word")
        assert in_halves.scale is not None  # `short` gave one
        arguments = [_halves.decoded(e, in_halves), e.weight(in_halves.scale)]
        return State(arguments, functools.partial(Halves, cell.hidden, cell.lanes, cell.sums))
    e.note_kernel(f"{cell.kind}: {tiles.bits} bits, {once}")
    return None


def _tiles(e: Emitter, cell: Cell, lookup: LookupWeight) -> Tiles | None:
    pack = functools.partial(_pack, cell, columns=cell.gates * cell.lanes)
    return _decode.arrange(lookup, pack, e.machine, by_word=True)


def _ordered(e: Emitter, cell: Cell, weight: onnx_ir.Value, columns: int) -> relax.Expr:
    """A weight dense in the order of `_pack`: while building, or by a kernel in front of each call."""
    packed = _weights.packed(e, weight, functools.partial(_pack, cell, columns=columns))
    return _pack_computed(e, cell, weight, columns) if packed is None else packed


def _pack_computed(e: Emitter, cell: Cell, weight: onnx_ir.Value, columns: int) -> relax.Expr:
    """What `_pack` makes, of a weight that kernels make first, such as the sum of two Lookups."""
    block = cell.gates * cell.lanes

    def fill(a: te.Tensor) -> te.Tensor:
        def element(tile: Any, k: Any, column: Any) -> Any:
            row = tile * columns + column
            unit = row // block * cell.lanes + row % cell.lanes
            value = a(cell.direction, row % block // cell.lanes * cell.hidden + unit, k)
            if cell.width == cell.hidden:
                return value
            return tirx.if_then_else(unit < cell.hidden, value, tirx.const(0, a.dtype))

        return te.compute((cell.width * cell.gates // columns, a.shape[2], columns), element, name="pack")

    return e.moved(fill, e.plain(weight), name="pack")


def _pack(cell: Cell, weight: np.ndarray, *, columns: int) -> np.ndarray:
    """weight: [directions, gates · hidden, k] -> [n / columns, k, columns], the n rows ordered [tile, gate, lane]."""
    rows = _rows(cell, weight)
    return np.ascontiguousarray(rows.reshape(-1, columns, rows.shape[-1]).transpose(0, 2, 1))


def _rows(cell: Cell, weight: np.ndarray) -> np.ndarray:
    """weight: [directions, gates · hidden, k] -> [n, k], ordered [tile, gate, lane]."""
    matrix = weight[cell.direction].reshape(cell.gates, cell.hidden, -1)
    full = _weights.pad_to(matrix, 1, cell.lanes).reshape(cell.gates, cell.tiles, cell.lanes, -1)
    return full.transpose(1, 0, 2, 3).reshape(-1, full.shape[-1])
