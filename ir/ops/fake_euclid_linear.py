"""FakeEuclidLinear: the training form of EuclidLinear, a linear layer on its way to squared distances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work
from mc_opt.ir.ops import _euclid as euclid


class FakeEuclidLinear(Op):
    """y = x·w + bias − λ·½(‖w‖² + ‖x‖²): at λ = 0 the product to the bit, at λ = 1 EuclidLinear to the bit.

    λ is `strength`, which the pass raises while it trains. Its gradients are those of the body, and exact.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "w", "strength", "bias?")
    training_form: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("strength",)
    attributes: ClassVar[Mapping[str, Attribute]] = {"transB": Attribute(onnx_ir.AttributeType.INT, 0)}

    def variant(self, node: onnx_ir.Node) -> str:
        """Orientation of the weight; bias; half precision."""
        return euclid.linear_variant(self, node)

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The bias form, both sums of squares times λ."""
        return euclid.linear_body(op, self, node)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The type of x, its last axis replaced by m."""
        return euclid.types(node, euclid.linear_shape(node))

    def check(self, node: onnx_ir.Node) -> None:
        """Check that weight, bias and strength fit.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        euclid.check_linear(node)
        euclid.check_operands(self, node, int(euclid.linear_shape(node)[-1]))  # type: ignore[arg-type]  # w is static

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """Weight and bias are stored as they are trained; the body carries the gradients."""
        return self.formal(len(node.inputs))[index] not in self.settings

    def row_axes(self, node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
        """An output, as of a Gemm."""
        if index != 1:
            return None
        return (0,) if node.attributes["transB"].as_int() else (1,)

    def work(self, node: onnx_ir.Node) -> Work:
        """The product and the squares of each row."""
        return euclid.linear_work(node)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """No, half and all of the strength; both orientations; fp16."""
        for strength in (0.0, 0.5, 1.0):
            yield euclid.linear_sample(rng, f"bias-{strength}", (5, 7), bias=True, strength=strength)
        yield euclid.linear_sample(rng, "transposed", (5, 7), lead=(2, 3), transposed=True, strength=0.3)
        yield euclid.linear_sample(rng, "row", (4, 6), lead=(), bias=True, strength=0.7)
        yield euclid.linear_sample(rng, "half", (4, 6), strength=0.5, dtype=np.float16)
