"""Sparse: a weight stored as a bitmap of its non-zero places, and the values there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape, where
from mc_opt.ir.ops._packing import pack_codes, packed_bytes, unpack_codes, unpack_fields


def pack_sparse(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w: any shape -> bitmap: uint8 [⌈n/8⌉], values: [nnz], both in C order."""
    flat = w.reshape(-1)
    kept = flat != 0
    return pack_codes(kept.astype(np.uint8), 1), flat[kept]


def unpack(bitmap: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """bitmap: uint8 [⌈n/8⌉], values: [nnz] -> w: `shape`."""
    w = np.zeros(math.prod(shape), values.dtype)
    w[unpack_codes(bitmap, 1, w.size).astype(bool)] = values
    return w.reshape(shape)


class Sparse(Op):
    """A weight of `shape` whose element i is the next of `values` where bit i of `bitmap` is 1, else 0.

    Elements are counted in C order; bit i is bit i % 8 of byte i // 8. `values` may be made by a Lookup.
    """

    inputs: ClassVar[tuple[str, ...]] = ("bitmap", "values")
    attributes: ClassVar[Mapping[str, Attribute]] = {"shape": Attribute(onnx_ir.AttributeType.INTS)}

    def variant(self, node: onnx_ir.Node) -> str:
        """Whether the bitmap has bits beyond the last element."""
        return "cut" if math.prod(node.attributes["shape"].as_ints()) % 8 else "whole"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """Gather each kept element by its count so far; place 0 holds the zero of all others."""
        shape = op.ints("shape")
        bits = unpack_fields(op, op.input("bitmap"), 1)
        if math.prod(node.attributes["shape"].as_ints()) % 8:
            bits = op.Slice(bits, op.constant([0]), op.ReduceProd(shape, keepdims=1))
        bits = op.Cast(bits, to=onnx_ir.DataType.INT32)
        place = op.Mul(op.CumSum(bits, op.constant(0)), bits)
        values = op.Pad(op.input("values"), op.constant([1, 0]))
        return op.Reshape(op.Gather(values, place), shape)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The values' type, and the shape that the attribute states."""
        return [(dtype_of(node, node.inputs[1]), onnx_ir.Shape(node.attributes["shape"].as_ints()))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that the bitmap covers the shape.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        shape = node.attributes["shape"].as_ints()
        if not shape or min(shape) < 1:
            raise IRError(f"{where(node)} shape is {list(shape)}, expected dimensions of at least 1; leave it dense")
        bitmap, values = node.inputs
        expected = (packed_bytes(math.prod(shape), 1),)
        if dtype_of(node, bitmap) != onnx_ir.DataType.UINT8 or static_shape(node, bitmap) != expected:
            raise IRError(
                f"{where(node)} bitmap is {dtype_of(node, bitmap)}{list(static_shape(node, bitmap))}, expected "
                f"UINT8{list(expected)} for shape {list(shape)}; pack it with ir.pack_codes(kept, 1)"
            )
        if len(static_shape(node, values)) != 1 or static_shape(node, values)[0] > math.prod(shape):
            raise IRError(
                f"{where(node)} values are {list(static_shape(node, values))}, expected [nnz], at most "
                f"{math.prod(shape)}; correct the pass"
            )

    def check_data(self, node: onnx_ir.Node) -> None:
        """Check that a constant bitmap has as many ones as there are values.

        Raises:
            IRError: otherwise.
        """
        bitmap, values = node.inputs
        if bitmap is None or bitmap.const_value is None:
            return
        ones = int(np.bitwise_count(bitmap.const_value.numpy()).sum())
        nnz = static_shape(node, values)[0]
        if ones != nnz:
            raise IRError(f"{where(node)} bitmap has {ones} ones, expected {nnz}, one a value; pack the weight again")

    def work(self, node: onnx_ir.Node) -> Work:
        """One lookup a kept value; the zeros cost their bits."""
        nnz = static_shape(node, node.inputs[1])[0]
        stored = packed_bytes(math.prod(node.attributes["shape"].as_ints()), 1)
        return Work(lookup=nnz, bytes=stored + math.ceil(nnz * dtype_of(node, node.inputs[1]).itemsize))

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Whole and cut bitmaps, nothing kept, everything kept, fp16."""
        for name, shape, share, dtype in (
            ("whole", (4, 8), 0.5, np.float32),
            ("cut", (5, 3, 3), 0.2, np.float32),
            ("empty", (3, 5), 0.0, np.float32),
            ("full", (2, 9), 1.0, np.float32),
            ("half", (4, 7), 0.5, np.float16),
        ):
            w = rng.uniform(0.5, 1.5, shape) * (rng.random(shape) < share)
            yield Example(name, pack_sparse(w.astype(dtype)), {"shape": shape})
