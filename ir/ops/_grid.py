"""How codebooks, scales and offsets of different extents meet the codes in one body: the forms of a grid.

An operand belongs to the tensor (`t`), to each row (`r`) or to each group (`g`). The finest one decides
how the codes are laid out while they are combined:

    flat    every operand is the tensor's: [R·K]
    rows    [R, K] against [R, 1]
    groups  [R, G, g] against [R, G, 1]
    short   the last group is short: [R, K] against [R, K], each group's value repeated
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Body, dtype_of, static_shape, where
from mc_opt.ir.ops._packing import Geometry

FLOATS = (
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.BFLOAT16,
    onnx_ir.DataType.DOUBLE,
)


@dataclass(frozen=True)
class Grid:
    """The geometry of one node and the extent of each operand, by the operand's name."""

    geometry: Geometry
    kinds: Mapping[str, str]

    @property
    def form(self) -> str:
        """flat, rows, groups or short."""
        if "g" in self.kinds.values():
            return "groups" if self.geometry.is_even else "short"
        return "rows" if "r" in self.kinds.values() else "flat"

    @property
    def key(self) -> str:
        """The part of an overload that names this form."""
        kinds = "_".join(f"{name[0]}{kind}" for name, kind in self.kinds.items())
        perm = "".join(map(str, self.geometry.perm)) if self.geometry.is_transposed else "0"
        # The body of a short group counts the columns, by the axes that are not rows.
        axes = f"{len(self.geometry.axes)}of{len(self.geometry.perm)}" if self.form == "short" else ""
        return f"{kinds}.{self.form}{axes}.p{perm}"


def kind(rows: int, groups: int) -> str:
    """The extent of an operand of `rows` by `groups`."""
    if groups > 1:
        return "g"
    return "r" if rows > 1 else "t"


def check_codebook(node: onnx_ir.Node, codebook: onnx_ir.Value | None, geometry: Geometry, most: int) -> None:
    """Check that a codebook has a float type and a shape that fits.

    Raises:
        IRError: otherwise.
    """
    if dtype_of(node, codebook) not in FLOATS:
        raise IRError(f"{where(node)} codebook is {dtype_of(node, codebook)}, expected a float type; cast it")
    shape = static_shape(node, codebook)
    rows, groups = geometry.rows, geometry.groups
    grouped = len(shape) == 3 and shape[0] in (1, rows) and shape[1] in (1, groups)
    if not (len(shape) == 1 or grouped) or not 1 <= shape[-1] <= most:
        raise IRError(
            f"{where(node)} codebook is {list(shape)}, expected [n] or [{rows} or 1, {groups} or 1, n] with n from 1 "
            f"to {most}; reshape it"
        )


def check_factor(node: onnx_ir.Node, name: str, value: onnx_ir.Value | None, geometry: Geometry) -> None:
    """Check that a scale or an offset has a float type and a shape that fits.

    Raises:
        IRError: otherwise.
    """
    if dtype_of(node, value) not in FLOATS:
        raise IRError(f"{where(node)} {name} is {dtype_of(node, value)}, expected a float type; cast it")
    shape = static_shape(node, value)
    rows, groups = geometry.rows, geometry.groups
    if shape not in ((1, 1), (rows, 1), (rows, groups)):
        raise IRError(
            f"{where(node)} {name} is {list(shape)}, expected [1, 1], [{rows}, 1] or [{rows}, {groups}]; reshape it"
        )


def codebook_kind(shape: tuple[int, ...]) -> str:
    """`s` for a codebook of rank 1, else the extent of the grid of codebooks."""
    return "s" if len(shape) == 1 else kind(shape[0], shape[1])


def to_grid(
    op: Body, flat: onnx_ir.Value, grid: Grid, *, operands: Mapping[str, onnx_ir.Value], shape: onnx_ir.Value
) -> onnx_ir.Value:
    """Lay the R·K elements out in the form of the grid; `shape` is the weight's, as a tensor."""
    form = grid.form
    if form == "flat":
        return op.Reshape(flat, op.constant([-1]))
    if form == "short":
        return op.Reshape(flat, op.Concat(op.constant([-1]), columns(op, grid, shape), axis=0))
    finest = next(operands[name] for name, k in grid.kinds.items() if k == form[0])
    if form == "rows":
        return op.Reshape(flat, op.Concat(op.Shape(finest, start=0, end=1), op.constant([-1]), axis=0))
    size = op.Unsqueeze(op.scalar("group_size"), op.constant([0]))
    return op.Reshape(flat, op.Concat(op.constant([-1]), op.Shape(finest, start=1, end=2), size, axis=0))


def columns(op: Body, grid: Grid, shape: onnx_ir.Value) -> onnx_ir.Value:
    """K as a tensor [1]."""
    geometry = grid.geometry
    others = op.constant(geometry.perm[len(geometry.axes) :])
    return op.ReduceProd(op.Gather(shape, others), keepdims=1)


class Spread:
    """Lays an operand [R|1, G|1] out so that it broadcasts against elements in the form of the grid."""

    def __init__(self, op: Body, grid: Grid, shape: onnx_ir.Value) -> None:
        self.op, self.grid, self.shape = op, grid, shape
        self._group: onnx_ir.Value | None = None

    def __call__(self, operand: onnx_ir.Value, kind: str) -> onnx_ir.Value:
        """operand: [R|1, G|1] of extent `kind`."""
        if self.grid.form == "groups":
            return self.op.Unsqueeze(operand, self.op.constant([-1]))
        if self.grid.form == "short" and kind == "g":
            return self.op.Gather(operand, self._group_of_column(), axis=1)
        return operand

    def _group_of_column(self) -> onnx_ir.Value:
        """[K]: the group of each column; made once for a body."""
        if self._group is None:
            op = self.op
            count = op.Squeeze(columns(op, self.grid, self.shape))
            self._group = op.Div(op.Range(op.constant(0), count, op.constant(1)), op.scalar("group_size"))
        return self._group


def book_numbers(op: Body, codebook: onnx_ir.Value) -> onnx_ir.Value:
    """codebook: [R|1, G|1, n] -> [R|1, G|1] int32: the number of each codebook."""
    extent = op.Shape(codebook, end=2)
    count = op.ReduceProd(extent, keepdims=0)
    numbers = op.Cast(op.Range(op.constant(0), count, op.constant(1)), to=onnx_ir.DataType.INT32)
    return op.Reshape(numbers, extent)


def from_grid(op: Body, values: onnx_ir.Value, grid: Grid, shape: onnx_ir.Value) -> onnx_ir.Value:
    """Bring the elements back to the weight's own shape."""
    geometry = grid.geometry
    if not geometry.is_transposed:
        return op.Reshape(values, shape)
    rows_first = op.Gather(shape, op.constant(geometry.perm))
    return op.Transpose(op.Reshape(values, rows_first), perm=geometry.inverse)


def spread_array(operand: np.ndarray, geometry: Geometry) -> np.ndarray:
    """operand: [R|1, G|1, ...] -> [R|1, K|1, ...]: each group's value repeated over its columns."""
    if operand.shape[1] == 1:
        return operand
    return np.repeat(operand, geometry.size, axis=1)[:, : geometry.columns]
