"""Lookup: a weight stored as packed codes into a codebook, with an optional scale and offset."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape, where
from mc_opt.ir.ops import _grid as grids
from mc_opt.ir.ops._packing import Geometry, pack_codes, packed_bytes, restore, row_blocks, unpack_codes, unpack_fields


def decode(
    codes: np.ndarray,
    codebook: np.ndarray,
    scale: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    *,
    bits: int,
    shape: Sequence[int],
    axes: Sequence[int] = (0,),
    group_size: int = 0,
) -> np.ndarray:
    """Decode a Lookup in numpy: w = codebook[codes]·scale + offset, in the codebook's type.

    Args:
        codes: uint8 packed stream [⌈R·K/8⌉·bits].
        codebook: [n], or one a group [R|1, G|1, n].
        scale: [1, 1], [R, 1] or [R, G].
        offset: as scale.
        bits: width of a code.
        shape: shape of the result.
        axes: its row axes.
        group_size: columns of a group, 0 for one group a row.
    """
    geometry = Geometry(tuple(shape), tuple(axes), group_size)
    matrix = np.empty((geometry.rows, geometry.columns), codebook.dtype)
    for rows in row_blocks(geometry):
        count = (rows.stop - rows.start) * geometry.columns
        block = unpack_codes(codes, bits, count, start=rows.start * geometry.columns).reshape(-1, geometry.columns)
        w = _entries(block, codebook, rows, geometry)
        for factor, combine in ((scale, np.multiply), (offset, np.add)):
            if factor is not None:
                mine = factor if factor.shape[0] == 1 else factor[rows]
                w = combine(w, grids.spread_array(mine.astype(codebook.dtype), geometry), dtype=codebook.dtype)
        matrix[rows] = w
    return restore(matrix, geometry.shape, geometry.axes)


def _entries(codes: np.ndarray, codebook: np.ndarray, rows: slice, geometry: Geometry) -> np.ndarray:
    """codes: uint8 [r, K] -> their codebook entries [r, K]."""
    if codebook.ndim == 1 or codebook.shape[:2] == (1, 1):
        entries: np.ndarray = codebook.reshape(-1)[codes]
        return entries
    books = codebook if codebook.shape[0] == 1 else codebook[rows]
    starts = np.arange(books.shape[0] * books.shape[1], dtype=np.intp).reshape(books.shape[:2]) * books.shape[2]
    grouped: np.ndarray = books.reshape(-1)[grids.spread_array(starts, geometry) + codes]
    return grouped


class Lookup(Op):
    """w = codebook[codes]·scale + offset.

    The weight of `shape` is a matrix [R, K] of rows along `axes` and columns along the other axes; each row is
    cut into G = ⌈K/group_size⌉ groups (group_size 0: one group a row; the last may be short). `codes` are the
    R·K codes in row-major order, packed as `_packing` says. `codebook` is [n] or one a group [R|1, G|1, n] with
    n ≤ 2^bits, and gives the result's type; `scale` and `offset` are [1, 1], [R, 1] or [R, G], cast to that
    type first, and may be made by another Lookup.
    """

    inputs: ClassVar[tuple[str, ...]] = ("codes", "codebook", "scale?", "offset?")
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "bits": Attribute(onnx_ir.AttributeType.INT),
        "shape": Attribute(onnx_ir.AttributeType.INTS),
        "axes": Attribute(onnx_ir.AttributeType.INTS, (0,)),
        "group_size": Attribute(onnx_ir.AttributeType.INT, 0),
    }

    def geometry(self, node: onnx_ir.Node) -> Geometry:
        """The matrix that the node's weight is stored as."""
        given = node.attributes
        return Geometry(given["shape"].as_ints(), given["axes"].as_ints(), given["group_size"].as_int())

    def grid(self, node: onnx_ir.Node) -> grids.Grid:
        """The extents of codebook, scale and offset."""
        kinds = {"codebook": grids.codebook_kind(static_shape(node, self.input(node, "codebook")))}
        for name in ("scale", "offset"):
            value = self.input(node, name)
            if value is not None:
                rows, groups = static_shape(node, value)
                kinds[name] = grids.kind(rows, groups)
        return grids.Grid(self.geometry(node), kinds)

    def variant(self, node: onnx_ir.Node) -> str:
        """Width, a cut tail, extents, form, transposition, and which factors need a cast."""
        grid = self.grid(node)
        tail = "t" if grid.geometry.count % 8 else ""
        casts = "".join(f".{name[0]}cast" for name in grid.kinds if self._needs_cast(node, name))
        return f"b{node.attributes['bits'].as_int()}{tail}.{grid.key}{casts}"

    def _needs_cast(self, node: onnx_ir.Node, name: str) -> bool:
        return dtype_of(node, self.input(node, name)) != dtype_of(node, self.input(node, "codebook"))

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """Unpack a byte a code, gather, scale, shift, and bring the matrix back to the weight's shape."""
        grid = self.grid(node)
        shape = op.ints("shape")
        codes = unpack_fields(op, op.input("codes"), node.attributes["bits"].as_int())
        if grid.geometry.count % 8:
            codes = op.Slice(codes, op.constant([0]), op.ReduceProd(shape, keepdims=1))
        codes = op.Cast(codes, to=onnx_ir.DataType.INT32)
        codes = grids.to_grid(op, codes, grid, operands=op.inputs, shape=shape)
        spread = grids.Spread(op, grid, shape)
        w = self._gather(op, codes, grid.kinds["codebook"], spread)
        for name, combine in (("scale", op.Mul), ("offset", op.Add)):
            if name not in grid.kinds:
                continue
            factor = op.input(name)
            if self._needs_cast(node, name):
                factor = op.CastLike(factor, op.input("codebook"))
            w = combine(w, spread(factor, grid.kinds[name]))
        return grids.from_grid(op, w, grid, shape)

    def _gather(self, op: Body, codes: onnx_ir.Value, kind: str, spread: grids.Spread) -> onnx_ir.Value:
        codebook = op.input("codebook")
        if kind == "s":
            return op.Gather(codebook, codes)
        if kind != "t":
            entries = op.Cast(op.Shape(codebook, start=2), to=onnx_ir.DataType.INT32)
            codes = op.Add(codes, op.Mul(spread(grids.book_numbers(op, codebook), kind), entries))
        return op.Gather(op.Reshape(codebook, op.constant([-1])), codes)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The codebook's type, and the shape that the attribute states."""
        return [(dtype_of(node, self.input(node, "codebook")), onnx_ir.Shape(node.attributes["shape"].as_ints()))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check the width, and that every input fits the matrix.

        Raises:
            IRError: for the first that does not.
        """
        super().check(node)
        bits = node.attributes["bits"].as_int()
        if not 1 <= bits <= 8:
            raise IRError(f"{where(node)} bits is {bits}, expected 1 to 8; choose another width")
        geometry = self.geometry(node)
        geometry.check(where(node))
        codes = self.input(node, "codes")
        expected = (packed_bytes(geometry.count, bits),)
        if dtype_of(node, codes) != onnx_ir.DataType.UINT8 or static_shape(node, codes) != expected:
            raise IRError(
                f"{where(node)} codes are {dtype_of(node, codes)}{list(static_shape(node, codes))}, expected "
                f"UINT8{list(expected)} for {geometry.count} codes of {bits} bits; pack them with ir.pack_codes"
            )
        grids.check_codebook(node, self.input(node, "codebook"), geometry, 1 << bits)
        for name in ("scale", "offset"):
            if self.input(node, name) is not None:
                grids.check_factor(node, name, self.input(node, name), geometry)

    def check_data(self, node: onnx_ir.Node) -> None:
        """Check that constant codes stay within a codebook of fewer than 2^bits entries.

        Raises:
            IRError: for the largest code that does not.
        """
        bits, geometry = node.attributes["bits"].as_int(), self.geometry(node)
        entries = static_shape(node, self.input(node, "codebook"))[-1]
        codes = self.input(node, "codes")
        if entries == 1 << bits or codes is None or codes.const_value is None:
            return
        packed = codes.const_value.numpy()
        for rows in row_blocks(geometry):
            count = (rows.stop - rows.start) * geometry.columns
            largest = int(unpack_codes(packed, bits, count, start=rows.start * geometry.columns).max())
            if largest >= entries:
                raise IRError(
                    f"{where(node)} has code {largest}, expected codes below {entries}, the codebook's length; "
                    "encode the weight again"
                )

    def work(self, node: onnx_ir.Node) -> Work:
        """One lookup a weight; scales and offsets are applied once a group, to sums (decode and consumer are one
        kernel).
        """
        geometry = self.geometry(node)
        cells = {name: math.prod(static_shape(node, v)) for name, v in self._factors(node).items()}
        stored = packed_bytes(geometry.count, node.attributes["bits"].as_int())
        for value in node.inputs[1:]:
            if value is not None:
                stored += math.ceil(math.prod(static_shape(node, value)) * dtype_of(node, value).itemsize)
        per_group = geometry.rows * geometry.groups
        return Work(
            lookup=geometry.count,
            mul=per_group if "scale" in cells else 0,
            add=per_group if "offset" in cells else 0,
            bytes=stored,
        )

    def _factors(self, node: onnx_ir.Node) -> dict[str, onnx_ir.Value]:
        found = {name: self.input(node, name) for name in ("scale", "offset")}
        return {name: value for name, value in found.items() if value is not None}

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Every width; codebooks shared and grouped; factors of every extent; transposed, short groups, fp16."""
        for bits in range(1, 9):
            yield _sample(rng, f"b{bits}", bits=bits, shape=(6, 11), scale=(6, 1))
            yield _sample(rng, f"b{bits}-even", bits=bits, shape=(4, 16), scale=(4, 2), group_size=8)
        forms: dict[str, dict[str, Any]] = {
            "bare": {},
            "tensor": {"scale": (1, 1), "offset": (1, 1)},
            "rows": {"scale": (6, 1), "offset": (6, 1)},
            "groups": {"scale": (6, 4), "offset": (6, 4)},
            "mixed": {"scale": (6, 4), "offset": (6, 1)},
            "offset": {"offset": (6, 4)},
            "books": {"books": (6, 4), "scale": (6, 1)},
            "books-of-rows": {"books": (6, 1)},
            "books-of-groups": {"books": (1, 4), "scale": (1, 1)},
            "one-book": {"books": (1, 1), "scale": (6, 4)},
        }
        for name, extents in forms.items():
            yield _sample(rng, name, bits=3, shape=(6, 12), group_size=3, **extents)
            yield _sample(rng, f"{name}-short", bits=4, shape=(6, 11), group_size=3, **extents)
            yield _sample(rng, f"{name}-transposed", bits=2, shape=(11, 6), axes=(1,), group_size=3, **extents)
        yield _sample(rng, "conv", bits=4, shape=(8, 3, 3, 3), scale=(8, 1))
        yield _sample(rng, "conv-short", bits=4, shape=(8, 3, 3, 3), scale=(8, 7), group_size=4)
        yield _sample(rng, "lstm-short", bits=4, shape=(2, 8, 5), axes=(0, 1), scale=(16, 2), group_size=3)
        yield _sample(rng, "conv-transpose", bits=5, shape=(3, 8, 2, 2), axes=(1,), scale=(8, 3), group_size=4)
        yield _sample(rng, "lstm", bits=4, shape=(2, 8, 5), axes=(0, 1), scale=(16, 1))
        yield _sample(rng, "batched", bits=6, shape=(2, 5, 3), axes=(0, 2), scale=(6, 1))
        yield _sample(rng, "few-entries", bits=4, shape=(5, 7), entries=11, scale=(5, 1))
        yield _sample(rng, "vector", bits=7, shape=(13,), scale=(13, 1))
        yield _sample(rng, "half", bits=4, shape=(6, 8), scale=(6, 2), offset=(6, 1), group_size=4, dtype=np.float16)
        yield _sample(
            rng, "half-scaled-by-float", bits=4, shape=(6, 8), scale=(6, 1), dtype=np.float16, factor=np.float32
        )


def _sample(
    rng: np.random.Generator,
    name: str,
    *,
    bits: int,
    shape: tuple[int, ...],
    axes: tuple[int, ...] = (0,),
    group_size: int = 0,
    books: tuple[int, ...] = (),
    scale: tuple[int, ...] | None = None,
    offset: tuple[int, ...] | None = None,
    entries: int | None = None,
    dtype: type = np.float32,
    factor: type | None = None,
) -> Example:
    n = entries or 1 << bits
    codes = rng.integers(0, n, math.prod(shape)).astype(np.uint8)
    codebook: np.ndarray = rng.standard_normal((*books, n)).astype(dtype)
    factors: list[np.ndarray | None] = [
        None if s is None else rng.uniform(0.5, 2, s).astype(factor or dtype) for s in (scale, offset)
    ]
    attributes = {"bits": bits, "shape": shape, "axes": axes, "group_size": group_size}
    return Example(name, (pack_codes(codes, bits), codebook, *factors), attributes)
