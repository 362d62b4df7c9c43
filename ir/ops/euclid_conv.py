"""EuclidConv: a convolution of squared distances, −½ Σ (x − w)² in every window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, static_shape
from mc_opt.ir.ops import _euclid as euclid


class EuclidConv(Op):
    """y[f] = −½ Σ_{c,t} (x[c, s·i + d·t] − w[f, c, t])² + bias[f], zeros around x included; w: [F, C / group, K_1, ..].

    It runs as a Conv with −½‖w_f‖² in its bias and one map −½·box(Σ_c x²) a group; `_euclid` states the error. A zero
    weight is no missing one: it contributes −½x².
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "w", "bias?")
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
        """The bias-and-box form."""
        return euclid.conv_body(op, self, node)

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The type of x, [n, F, positions]."""
        return euclid.types(node, euclid.conv_shape(node))

    def check(self, node: onnx_ir.Node) -> None:
        """Check that weight, bias and window fit.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        euclid.check_conv(node)
        euclid.check_operands(self, node, static_shape(node, node.inputs[1])[0])

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """The weight is stored as it is trained; the body carries the gradients."""
        return True

    def row_axes(self, node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
        """An output channel, as of a Conv."""
        return (0,) if index == 1 else None

    def work(self, node: onnx_ir.Node) -> Work:
        """The convolution and one map of squares a group."""
        return euclid.conv_work(node)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Every kind of window; groups, depthwise; one to three spatial axes; fp16."""
        yield euclid.conv_sample(rng, "plain", (4, 3, 3, 3))
        yield euclid.conv_sample(rng, "padded-bias", (4, 3, 3, 3), pads=1, bias=True)
        yield euclid.conv_sample(rng, "strided", (5, 3, 3, 2), pads=1, strides=2)
        yield euclid.conv_sample(rng, "dilated", (4, 2, 3, 3), pads=2, dilations=2, strides=2, bias=True)
        yield euclid.conv_sample(rng, "pointwise", (6, 4, 1, 1), bias=True)
        yield euclid.conv_sample(rng, "pointwise-strided", (6, 4, 1, 1), strides=2, pads=1)
        yield euclid.conv_sample(rng, "groups", (6, 2, 3, 3), pads=1, group=3, bias=True)
        yield euclid.conv_sample(rng, "groups-dilated", (4, 3, 3, 3), pads=2, dilations=2, strides=2, group=2)
        yield euclid.conv_sample(rng, "depthwise", (4, 1, 3, 3), pads=1, group=4)
        yield euclid.conv_sample(rng, "depthwise-multiple", (6, 1, 3, 3), pads=1, strides=2, group=3, bias=True)
        yield euclid.conv_sample(rng, "line", (4, 3, 5), pads=2)
        yield euclid.conv_sample(rng, "line-groups", (4, 2, 5), pads=2, group=2)
        yield euclid.conv_sample(rng, "volume", (4, 2, 3, 3, 3), pads=1, size=4)
        yield euclid.conv_sample(rng, "half", (4, 3, 3, 3), pads=1, bias=True, dtype=np.float16)
