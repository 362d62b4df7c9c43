"""EuclidLinearInteger: a linear layer of squared distances of 8-bit codes, −Σ (x − w)² in int32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, static_shape
from mc_opt.ir.ops import _euclid as euclid
from mc_opt.ir.ops import _euclid_integer as integer


class EuclidLinearInteger(Op):
    """y[.., m] = −Σ_n (x[.., n] − w[n, m])² of int8 codes; with transB the weight is [m, n]; int32, exact.

    With codes of one scale s, s²/2 times the result is EuclidLinear.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "w")
    attributes: ClassVar[Mapping[str, Attribute]] = {"transB": Attribute(onnx_ir.AttributeType.INT, 0)}

    def variant(self, node: onnx_ir.Node) -> str:
        """Orientation of the weight."""
        return "t" if node.attributes["transB"].as_int() else "n"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The bias form in integers."""
        x, w = op.input("x"), op.input("w")
        is_transposed = bool(node.attributes["transB"].as_int())
        product = op.MatMulInteger(x, op.Transpose(w, perm=[1, 0]) if is_transposed else w)
        norms = integer.squares(op, w, 1 if is_transposed else 0, keepdims=0)
        return integer.distance(op, product, integer.squares(op, x, -1, keepdims=1), norms)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """INT32, the shape of x with its last axis replaced by m."""
        return [(onnx_ir.DataType.INT32, euclid.linear_shape(node))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that the codes are int8, that the weight fits, and that int32 holds the sums.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        euclid.check_linear(node)
        w = static_shape(node, node.inputs[1])
        integer.check_codes(node, w[1] if node.attributes["transB"].as_int() else w[0])

    def work(self, node: onnx_ir.Node) -> Work:
        """A difference, a square from a table and a sum for each term."""
        return integer.distance_work(euclid.linear_work(node).mul, node)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Both orientations, each number of leading axes, sums beyond 2²⁴."""
        for name, lead, shape, transposed in (
            ("plain", (3,), (7, 5), 0),
            ("transposed", (3,), (5, 7), 1),
            ("batch", (2, 3, 2), (7, 5), 0),
        ):
            inputs = shape[1] if transposed else shape[0]
            x = rng.integers(-128, 128, (*lead, inputs)).astype(np.int8)
            w = rng.integers(-128, 128, shape).astype(np.int8)
            yield Example(name, (x, w), {"transB": transposed})
        largest = np.full((1, 1 << 12), -128, np.int8), np.full((1, 1 << 12), 127, np.int8)
        yield Example("largest", largest, {"transB": 1})
