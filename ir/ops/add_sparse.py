"""AddSparse: a weight plus a few outliers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, dtype_of, static_shape, where

_SUMMED = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE)


class AddSparse(Op):
    """w with values[i] added to its element indices[i], counted in C order.

    An index that stands twice adds twice. `values` may be made by a Lookup.
    """

    inputs: ClassVar[tuple[str, ...]] = ("w", "indices", "values")
    attributes: ClassVar[Mapping[str, Attribute]] = {}

    def variant(self, node: onnx_ir.Node) -> str:
        """Whether the sum is formed in float, for the types that ONNX Runtime cannot scatter."""
        return "flat" if dtype_of(node, node.inputs[0]) in _SUMMED else "float"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """Scatter into the flat weight."""
        w, values = op.input("w"), op.input("values")
        shape = op.Shape(w)
        narrow = dtype_of(node, node.inputs[0]) not in _SUMMED
        if narrow:
            w, values = (op.Cast(v, to=onnx_ir.DataType.FLOAT) for v in (w, values))
        flat = op.Reshape(w, op.constant([-1]))
        total = op.ScatterElements(flat, op.input("indices"), values, axis=0, reduction="add")
        return op.Reshape(op.CastLike(total, op.input("w")) if narrow else total, shape)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The weight's own."""
        return [(dtype_of(node, node.inputs[0]), onnx_ir.Shape(static_shape(node, node.inputs[0])))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that each value has an index, and the weight's type.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        w, indices, values = node.inputs
        static_shape(node, w)
        if dtype_of(node, indices) != onnx_ir.DataType.INT64 or len(static_shape(node, indices)) != 1:
            raise IRError(f"{where(node)} indices are {indices}, expected INT64 [n]; give flat indices")
        if static_shape(node, values) != static_shape(node, indices):
            raise IRError(
                f"{where(node)} has values {list(static_shape(node, values))} for indices "
                f"{list(static_shape(node, indices))}, expected one each; correct the pass"
            )
        if dtype_of(node, values) != dtype_of(node, w):
            raise IRError(f"{where(node)} values are {dtype_of(node, values)}, expected {dtype_of(node, w)}; cast them")

    def check_data(self, node: onnx_ir.Node) -> None:
        """Check that constant indices lie within the weight.

        Raises:
            IRError: otherwise.
        """
        w, indices, _ = node.inputs
        if indices is None or indices.const_value is None:
            return
        count, given = math.prod(static_shape(node, w)), indices.const_value.numpy()
        if given.size and (given.min() < 0 or given.max() >= count):
            raise IRError(
                f"{where(node)} has indices from {given.min()} to {given.max()}, expected 0 to {count - 1}; "
                "count the elements of the flat weight"
            )

    def work(self, node: onnx_ir.Node) -> Work:
        """One addition an outlier; an index takes 4 bytes in a kernel."""
        n = math.prod(static_shape(node, node.inputs[1]))
        return Work(add=n, bytes=math.ceil(n * (4 + dtype_of(node, node.inputs[2]).itemsize)))

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Matrices and a kernel, some, one and no outliers, an index that stands twice, fp16."""
        for name, shape, n, dtype in (
            ("matrix", (5, 7), 4, np.float32),
            ("kernel", (4, 3, 3, 3), 9, np.float32),
            ("one", (6,), 1, np.float32),
            ("none", (3, 4), 0, np.float32),
            ("half", (5, 7), 4, np.float16),
        ):
            indices = np.sort(rng.choice(math.prod(shape), n, replace=False)).astype(np.int64)
            yield Example(
                name, (rng.standard_normal(shape).astype(dtype), indices, rng.standard_normal(n).astype(dtype))
            )
        twice = np.array([2, 2, 5], np.int64)
        yield Example("twice", (np.zeros((2, 3), np.float32), twice, np.array([1, 2, 4], np.float32)))
