"""Matrix products of any size: both operands in the order of the register tile, tails filled up with zeros.

    y[.., m, n] = α Σ_k a[.., m, k] · b[.., n / c, k, n mod c] + β bias

A constant right operand is packed while building; one that the model computes is packed by a kernel of
its own, into which FuseOps puts a transposition before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import (
    _choice,
    _decode,
    _packed,
    _tile,
    _weights,
    joint_product,
    lookup_gemv,
    outlier_product,
)
from mc_opt.targets.kernels._packed import Packed
from mc_opt.targets.kernels._tile import Tile
from mc_opt.targets.kernels._window import Axis, Sliding
from mc_opt.targets.kernels.conv import fusable


def product(
    e: Emitter,
    a: relax.Expr,
    b: relax.Expr | Packed,
    bias: relax.Expr | None,
    *,
    tile: Tile,
    columns: Dim,
    alpha: float = 1.0,
    beta: float = 1.0,
    name: str = "gemm",
    shape: str = "",
) -> relax.Expr:
    """a: [.., m, k], b packed [.., n / c, k, c] (leading axes of length 1 broadcast) -> [.., m, n].

    `shape` is what a table of measured tiles calls the product.
    """
    if isinstance(b, Packed):
        scales = (alpha, beta)
        return _shared(e, a, b, bias, tile=tile, columns=columns, scales=scales, name=f"lookup_{name}", shape=shape)
    *lead_a, m, depth = dims.sizes(a)
    lead_b = dims.sizes(b)[:-3]
    if e.machine.kind != "cuda" and dims.is_static((*lead_a, m, columns)) and all(n == 1 for n in lead_b):
        matrix = e.reshape(b, dims.sizes(b)[-3:])
        scales = (alpha, beta)
        return _shared(e, a, matrix, bias, tile=tile, columns=columns, scales=scales, name=name, shape=shape)
    rank = max(len(lead_a), len(lead_b))
    lead_a, lead_b = [1] * (rank - len(lead_a)) + lead_a, [1] * (rank - len(lead_b)) + lead_b
    lead = dims.broadcast(lead_a, lead_b)
    rows = dims.product([dims.tiles(m, tile.wide), tile.wide])
    source = _rows(e, a, rows) if isinstance(m, int) else a
    skip_a, skip_b = rank - (len(a.ty.shape) - 2), rank - (len(b.ty.shape) - 3)

    def compute(x: te.Tensor, w: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, depth), name="k")

        def element(*i: Any) -> Any:
            *outer, row, column = i
            at = [0 if dims.same(s, 1) else q for q, s in zip(outer, lead_a, strict=True)][skip_a:]
            bt = [0 if dims.same(s, 1) else q for q, s in zip(outer, lead_b, strict=True)][skip_b:]
            if not isinstance(m, int) and tile.wide > 1:  # rows beyond the end repeat the last one, and are not kept
                row = tirx.min(row, m - 1)
            return te.sum(
                x(*at, row, k) * w(*bt, column // tile.columns, k, column % tile.columns),
                axis=k,
            )

        tiles = dims.sizes(w)[-3]
        attributes = tile.annotation() | _choice.annotation(shape)
        total = te.compute((*lead, rows, tiles * tile.columns), element, name="mc_gemm", attrs=attributes)
        return _epilogue(total, (*lead, m, columns), rest, alpha, beta)

    arguments = [source, b] if bias is None else [source, b, bias]
    return fusable(e, compute, *arguments, name=name)


def _shared(
    e: Emitter,
    a: relax.Expr,
    b: relax.Expr | Packed,
    bias: relax.Expr | None,
    *,
    tile: Tile,
    columns: Dim,
    scales: tuple[float, float],
    name: str,
    shape: str,
) -> relax.Expr:
    """The product of all rows with one matrix, whose loops are those of a convolution with one tap."""
    *lead, m, depth = dims.sizes(a)
    axes = tuple(Axis(1, 1, 1, 0, n) for n in [*lead, m][1:] or [m])
    high, wide = (tile.high, tile.wide) if shape else (0, 0)  # measured ones; the rule knows the last tiles
    sliding = Sliding(tile.columns, tile.vector, False, axes, high, wide, shape)

    def compute(x: te.Tensor, *given: te.Tensor) -> te.Tensor:
        w, factor, rest = b.stage(given) if isinstance(b, Packed) else (given[0], None, given[1:])
        k = te.reduce_axis((0, depth), name="k")

        def element(*i: Any) -> Any:
            *row, column = i
            return te.sum(x(*row, k) * w(column // tile.columns, k, column % tile.columns), axis=k)

        domain = (*lead, m, dims.sizes(w)[0] * tile.columns)
        total = te.compute(domain, element, name="mc_gemm", attrs=sliding.annotation(e.machine))
        return _epilogue(total, (*lead, m, columns), rest, *scales, factor=factor)

    operands = b.arguments(e) if isinstance(b, Packed) else [b]
    return fusable(e, compute, a, *operands, *([] if bias is None else [bias]), name=name)


def _epilogue(
    total: te.Tensor,
    shape: Sequence[Dim],
    bias: Sequence[te.Tensor],
    alpha: float,
    beta: float,
    *,
    factor: te.Tensor | None = None,
) -> te.Tensor:
    def element(*i: Any) -> Any:
        value = total(*i) if factor is None else total(*i) * factor(i[-1])
        if alpha != 1.0:
            value = value * tirx.const(alpha, total.dtype)
        if not bias:
            return value
        extents = dims.sizes(bias[0])
        index = [0 if dims.same(s, 1) else q for q, s in zip(i[len(i) - len(extents) :], extents, strict=True)]
        added = bias[0](*index)
        return value + (added if beta == 1.0 else added * tirx.const(beta, total.dtype))

    return te.compute(tuple(shape), element, name="mc_bias" if bias else "mc_cut")


def _rows(e: Emitter, a: relax.Expr, rows: int) -> relax.Expr:
    """a: [.., m, k] with rows of zeros appended up to `rows`."""
    *lead, m, k = dims.sizes(a)
    if rows == m:
        return a

    def fill(x: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            return tirx.if_then_else(i[-2] < m, x(*i), tirx.const(0, x.dtype))

        return te.compute((*lead, rows, k), element, name="rows")

    return e.moved(fill, a, name="rows")


def pack_dynamic(e: Emitter, b: relax.Expr, columns: int, *, transposed: bool = False) -> relax.Expr:
    """b: [.., k, n] (or [.., n, k]) that the model computes -> [.., n / columns, k, columns]."""
    *lead, k, n = dims.sizes(b)
    if transposed:
        k, n = n, k
    tiles = dims.tiles(n, columns)

    def pack(x: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            *outer, t, row, c = i
            column = t * columns + c
            value = x(*outer, column, row) if transposed else x(*outer, row, column)
            if dims.factor(n) % columns == 0:
                return value
            return tirx.if_then_else(column < n, value, tirx.const(0, x.dtype))

        return te.compute((*lead, tiles, k, columns), element, name="pack")

    return e.moved(pack, b, name="pack")


def _flip(e: Emitter, a: relax.Expr) -> relax.Expr:
    """Exchanges the last two axes of a."""
    *lead, m, k = dims.sizes(a)
    return e.moved(
        lambda x: te.compute((*lead, k, m), lambda *i: x(*i[:-2], i[-1], i[-2]), name="transpose"), a, name="transpose"
    )


def right_operand(
    e: Emitter, value: onnx_ir.Value, tile: Tile, *, transposed: bool = False, scale: float = 1.0
) -> relax.Expr:
    """The packed right operand of a product."""

    def pack(array: np.ndarray) -> np.ndarray:
        matrix = np.swapaxes(array, -1, -2) if transposed else array
        if matrix.ndim == 2:
            return _weights.pack_columns(matrix, tile.columns)
        flat = matrix.reshape(-1, *matrix.shape[-2:])
        packed = np.stack([_weights.pack_columns(m, tile.columns) for m in flat])
        return packed.reshape(*matrix.shape[:-2], *packed.shape[1:])

    array = e.constant(value)
    if array is not None and scale != 1.0:
        return e.weight(pack(array * np.asarray(scale, array.dtype)))
    packed = _weights.packed(e, value, pack, told=True) if len(e.shape(value)) == 2 or array is not None else None
    if packed is not None:
        return packed
    return pack_dynamic(e, e.plain(value), tile.columns, transposed=transposed)


def _operand(
    e: Emitter, a: relax.Expr, value: onnx_ir.Value, tile: Tile, *, transposed: bool = False
) -> relax.Expr | Packed:
    """The packed right operand of a product of a: in codes that its kernel decodes, where that can be."""

    def pack(array: np.ndarray) -> np.ndarray:
        return _weights.pack_columns(array.T if transposed else array, tile.columns)

    codes = _packed.arranged(e, value, pack, told=True) if _decodes(e, a, value) else None
    if codes is None:
        return right_operand(e, value, tile, transposed=transposed)
    depth, columns = e.shape(value)[:: -1 if transposed else 1]
    size = f"{_choice.by(*dims.sizes(a)[:-1])} x {depth} x {columns}"
    e.note_kernel(f"lookup product: {codes.stored}, {size}, {tile.columns} columns decoded at a time")
    return codes


def _decodes(e: Emitter, a: relax.Expr, value: onnx_ir.Value) -> bool:
    """Whether the kernel of a product of a decodes its right operand: rows of a fixed number have loops that do."""
    is_static = dims.is_static([*dims.sizes(a), *e.shape(value)])
    return is_static and str(a.ty.dtype) == "float32" and _packed.takes(e, _decode.terms(e, value))


def matmul(e: Emitter, node: onnx_ir.Node) -> None:
    """MatMul with numpy's broadcasting; a right matrix shared by a batch is one product of all rows."""
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None and right is not None
    shape_a, shape_b = e.shape(left), e.shape(right)
    out = _result_shape(shape_a, shape_b)
    a = e.plain(left)
    if len(shape_a) == 1:
        a = e.reshape(a, (1, shape_a[0]))
    rows = dims.sizes(a)
    if len(shape_b) == 1:
        b = e.reshape(e.plain(right), (shape_b[0], 1))
        tile = tile_for(rows[-2], 1, e)
        y = product(e, a, pack_dynamic(e, b, tile.columns), None, tile=tile, columns=1)
        e.set(node.outputs[0], e.reshape(y, out))
        return
    columns = shape_b[-1]
    if len(shape_b) == 2 and isinstance(rows[-2], int) and rows[-2] < 4 and not dims.same(dims.product(rows[:-2]), 1):
        a = e.reshape(a, (dims.product(rows[:-1]), rows[-1]))
        rows = dims.sizes(a)
    y, outliers = None, None
    if len(shape_b) == 2:
        outliers = outlier_product.outliers_of(e, right, dims.product(rows[:-1]))
        right = right if outliers is None else outliers.weight
    if len(shape_b) == 2 and lookup_gemv.takes(e, dims.product(rows[:-1]), right):
        y = None if outliers is not None else joint_product.product(e, node, a)
        y = lookup_gemv.product(e, a, right, None) if y is None else y
    if y is None:
        shape, tile = _chosen(e, a, right, columns)
        y = product(e, a, _operand(e, a, right, tile), None, tile=tile, columns=columns, shape=shape)
    if outliers is not None:
        y = outlier_product.added(e, y, a, outliers)
    e.set(node.outputs[0], e.reshape(y, out))


def _chosen(e: Emitter, a: relax.Expr, right: onnx_ir.Value, columns: Dim) -> tuple[str, Tile]:
    """What a table of measured tiles calls the product of a with a right operand, empty for none, and its tile."""
    extents = [*dims.sizes(a), *e.shape(right)]
    if not dims.is_static(extents) or (e.constant(right) is None and e.lookup(right) is None):
        return "", tile_for(dims.sizes(a)[-2], columns, e)
    lead = e.shape(right)[:-2]
    weights = f"{_choice.by(*lead)} weights, " if lead else ""
    shape = f"product {_choice.by(*dims.sizes(a))} -> {columns}, {weights}{a.ty.dtype}"
    offered = _tile.candidates if lead else _tile.exact_candidates
    if e.constant(right) is None:  # codes stand in an order of their own
        if _decodes(e, a, right):
            shape = f"lookup {shape}, {_packed.described(_decode.terms(e, right))}"
        return shape, e.choices.pick(shape, offered(1, dims.sizes(a)[-2], columns, e.machine))
    panels, name = e.choices.panels, str(right.name)
    tile = e.choices.pick(shape, offered(1, dims.sizes(a)[-2], columns, e.machine, panel=panels.get(name, 0)))
    panels[name] = tile.columns
    return shape, tile


def tile_for(rows: Dim, columns: Dim, e: Emitter) -> Tile:
    """The tile of a product of so many rows and columns; open columns get whole registers."""
    if isinstance(rows, int) and isinstance(columns, int):
        return _tile.choose(1, rows, columns, e.machine)
    if isinstance(rows, int):
        return _tile.choose(1, rows, 2 * e.machine.lanes, e.machine)
    wanted = columns if isinstance(columns, int) else 2 * e.machine.lanes
    return _tile.open_ended(wanted, e.machine, multiple=dims.factor(rows))


def _result_shape(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    """The shape of numpy's matmul: vectors lose the axis that they were given for the product."""
    lead = dims.broadcast(a[:-2], b[:-2])
    return (*lead, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def gemm(e: Emitter, node: onnx_ir.Node) -> None:
    """Gemm: α A' B' + β C, with A and B as they are or transposed."""
    left, right, *rest = node.inputs
    assert left is not None and right is not None
    trans_a, trans_b = (bool(e.attribute(node, key, 0)) for key in ("transA", "transB"))
    alpha, beta = float(e.attribute(node, "alpha", 1.0)), float(e.attribute(node, "beta", 1.0))
    a = _flip(e, e.plain(left)) if trans_a else e.plain(left)
    m, columns = dims.sizes(a)[0], e.shape(right)[0 if trans_b else 1]
    bias = None
    if rest and rest[0] is not None and beta != 0.0:
        array = e.constant(rest[0])
        if array is None:
            bias = e.plain(rest[0])
        else:
            bias = e.weight(array if beta == 1.0 else array * np.asarray(beta, array.dtype))
            beta = 1.0
    y = None
    if lookup_gemv.takes(e, m, right) and alpha == 1.0 and beta == 1.0:
        y = lookup_gemv.product(e, a, right, bias, transposed=trans_b)
    if y is None:
        shape, tile = _chosen(e, a, right, columns)
        b = _operand(e, a, right, tile, transposed=trans_b)
        y = product(e, a, b, bias, tile=tile, columns=columns, alpha=alpha, beta=beta, shape=shape)
    e.set(node.outputs[0], y)


HANDLERS: dict[str, Handler] = {"Gemm": gemm}
