"""FakeEuclidConv: the training form of EuclidConv, a convolution on its way to squared distances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, static_shape
from mc_opt.ir.ops import _euclid as euclid


class FakeEuclidConv(Op):
    """y = Conv(x, w) + bias − λ·½(‖w‖² + box(Σ_c x²)): at λ = 0 the Conv to the bit, at λ = 1 EuclidConv to the bit.

    λ is `strength`, which the pass raises while it trains. Its gradients are those of the body, and exact: at λ = 1
    ∂S/∂w = x − w and ∂S/∂x = w − x.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "w", "strength", "bias?")
    training_form: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("strength",)
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "strides": Attribute(onnx_ir.AttributeType.INTS),
        "dilations": Attribute(onnx_ir.AttributeType.INTS),
        "pads": Attribute(onnx_ir.AttributeType.INTS),
        "group": Attribute(onnx_ir.AttributeType.INT, 1),
    }

    def variant(self, node: onnx_ir.Node) -> str:
        """Dense, grouped or one channel a group; bias; half precision."""
        return euclid.conv_variant(self, node)

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The bias-and-box form, both sums of squares times λ."""
        return euclid.conv_body(op, self, node)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The type of x, [n, F, positions]."""
        return euclid.types(node, euclid.conv_shape(node))

    def check(self, node: onnx_ir.Node) -> None:
        """Check that weight, bias, strength and window fit.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        euclid.check_conv(node)
        euclid.check_operands(self, node, static_shape(node, node.inputs[1])[0])

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """Weight and bias are stored as they are trained; the body carries the gradients."""
        return self.formal(len(node.inputs))[index] not in self.settings

    def row_axes(self, node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
        """An output channel, as of a Conv."""
        return (0,) if index == 1 else None

    def work(self, node: onnx_ir.Node) -> Work:
        """The convolution and one map of squares a group."""
        return euclid.conv_work(node)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """No, half and all of the strength; windows and groups; fp16."""
        for strength in (0.0, 0.5, 1.0):
            yield euclid.conv_sample(rng, f"padded-{strength}", (4, 3, 3, 3), pads=1, strength=strength)
        yield euclid.conv_sample(rng, "dilated", (4, 2, 3, 3), pads=2, dilations=2, strides=2, bias=True, strength=0.3)
        yield euclid.conv_sample(rng, "groups", (6, 2, 3, 3), pads=1, group=3, bias=True, strength=0.7)
        yield euclid.conv_sample(rng, "depthwise", (4, 1, 3, 3), pads=1, group=4, strength=1.0)
        yield euclid.conv_sample(rng, "line", (4, 3, 5), pads=2, strength=0.5)
        yield euclid.conv_sample(rng, "half", (4, 3, 3, 3), pads=1, strength=0.5, dtype=np.float16)
