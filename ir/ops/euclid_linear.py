"""EuclidLinear: a linear layer of squared distances, −½ Σ (x − w)² for every row of the weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work
from mc_opt.ir.ops import _euclid as euclid


class EuclidLinear(Op):
    """y[.., m] = −½ Σ_n (x[.., n] − w[n, m])² + bias[m]; with transB the weight is [m, n], as in Gemm.

    It runs as a MatMul with −½‖w_m‖² in its bias and −½‖x‖² of each row; `_euclid` states the error.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "w", "bias?")
    attributes: ClassVar[Mapping[str, Attribute]] = {"transB": Attribute(onnx_ir.AttributeType.INT, 0)}

    def variant(self, node: onnx_ir.Node) -> str:
        """Orientation of the weight; bias; half precision."""
        return euclid.linear_variant(self, node)

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The bias form."""
        return euclid.linear_body(op, self, node)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The type of x, its last axis replaced by m."""
        return euclid.types(node, euclid.linear_shape(node))

    def check(self, node: onnx_ir.Node) -> None:
        """Check that weight and bias fit.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        euclid.check_linear(node)
        euclid.check_operands(self, node, int(euclid.linear_shape(node)[-1]))  # type: ignore[arg-type]  # w is static

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """The weight is stored as it is trained; the body carries the gradients."""
        return True

    def row_axes(self, node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
        """An output, as of a Gemm."""
        if index != 1:
            return None
        return (0,) if node.attributes["transB"].as_int() else (1,)

    def work(self, node: onnx_ir.Node) -> Work:
        """The product and the squares of each row."""
        return euclid.linear_work(node)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Both orientations, each number of leading axes, fp16."""
        yield euclid.linear_sample(rng, "plain", (5, 7))
        yield euclid.linear_sample(rng, "bias", (5, 7), bias=True)
        yield euclid.linear_sample(rng, "transposed", (5, 7), transposed=True)
        yield euclid.linear_sample(rng, "transposed-bias", (5, 7), lead=(2, 3), transposed=True, bias=True)
        yield euclid.linear_sample(rng, "batch", (6, 4), lead=(2, 3, 2), bias=True)
        yield euclid.linear_sample(rng, "row", (4, 6), lead=(), bias=True)
        yield euclid.linear_sample(rng, "half", (4, 6), bias=True, dtype=np.float16)
