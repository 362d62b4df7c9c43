"""EuclidConvInteger: a convolution of squared distances of 8-bit codes, −Σ (x − w)² in int32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.op import Attribute, Body, Example, Op, Type, Work, static_shape
from mc_opt.ir.ops import _euclid as euclid
from mc_opt.ir.ops import _euclid_integer as integer


class EuclidConvInteger(Op):
    """y[f] = −Σ_{c,t} (x[c, s·i + d·t] − w[f, c, t])² of int8 codes, zeros around x included; int32, exact.

    With codes of one scale s, s²/2 times the result is EuclidConv.
    """

    inputs: ClassVar[tuple[str, ...]] = ("x", "w")
    attributes: ClassVar[Mapping[str, Attribute]] = {
        "strides": Attribute(onnx_ir.AttributeType.INTS),
        "dilations": Attribute(onnx_ir.AttributeType.INTS),
        "pads": Attribute(onnx_ir.AttributeType.INTS),
        "group": Attribute(onnx_ir.AttributeType.INT, 1),
    }

    def variant(self, node: onnx_ir.Node) -> str:
        """Dense, grouped or one channel a group; the number of axes."""
        return f"{euclid.sharing(node)}{_rank(node)}"

    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """The bias-and-box form in integers."""
        x, w = op.input("x"), op.input("w")
        window, group = euclid.window_attributes()
        kernel = op.emit("Shape", [w], {"start": 2})[0]
        one = onnx_ir.tensor(np.array([1], np.float32))
        if euclid.sharing(node) == "dense":
            sums = integer.squares(op, x, 1, keepdims=1)
            ones = op.ConstantOfShape(op.Concat(op.constant([1, 1]), kernel, axis=0), value=one)
            box = integer.window_sums(op, sums, ones, window)
        else:
            wide = op.Cast(x, to=onnx_ir.DataType.INT32)
            sums = op.Mul(wide, wide) if euclid.sharing(node) == "each" else euclid.group_sums(op, wide, w)
            outputs = op.emit("Shape", [w], {"start": 0, "end": 1})[0]
            ones = op.ConstantOfShape(op.Concat(outputs, op.constant([1]), kernel, axis=0), value=one)
            box = integer.window_sums(op, sums, ones, {**window, "group": group})
        norms = integer.squares(op, w, *range(1, _rank(node)), keepdims=1)
        product = op.ConvInteger(x, w, group=group, **window)
        return integer.distance(op, product, box, op.Squeeze(norms, op.constant([1])))

    def types(self, node: onnx_ir.Node) -> list[Type]:
        """INT32 [n, F, positions]."""
        return [(onnx_ir.DataType.INT32, euclid.conv_shape(node))]

    def check(self, node: onnx_ir.Node) -> None:
        """Check that the codes are int8, that the window fits, and that int32 holds the sums.

        Raises:
            IRError: otherwise.
        """
        super().check(node)
        euclid.check_conv(node)
        integer.check_codes(node, math.prod(static_shape(node, node.inputs[1])[1:]))

    def work(self, node: onnx_ir.Node) -> Work:
        """A difference, a square from a table and a sum for each term."""
        return integer.distance_work(euclid.conv_work(node).mul, node)

    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Every kind of window; groups, depthwise; codes at both ends; sums beyond 2²⁴."""
        yield _sample(rng, "plain", (4, 3, 3, 3))
        yield _sample(rng, "padded", (4, 3, 3, 3), pads=1, strides=2)
        yield _sample(rng, "dilated", (4, 2, 3, 3), pads=2, dilations=2)
        yield _sample(rng, "pointwise", (6, 4, 1, 1))
        yield _sample(rng, "groups", (6, 2, 3, 3), pads=1, group=3)
        yield _sample(rng, "depthwise", (4, 1, 3, 3), pads=1, group=4)
        yield _sample(rng, "line", (4, 3, 5), pads=2)
        yield _sample(rng, "volume", (4, 2, 2, 2, 2), pads=1, size=3)
        x, w = np.full((1, 512, 3, 3), -128, np.int8), np.full((2, 512, 3, 3), 127, np.int8)
        yield Example("largest", (x, w), {"strides": (1, 1), "dilations": (1, 1), "pads": (0,) * 4, "group": 1})


def _rank(node: onnx_ir.Node) -> int:
    return len(static_shape(node, node.inputs[1]))


def _sample(rng: np.random.Generator, name: str, shape: tuple[int, ...], **window: Any) -> Example:
    example = euclid.conv_sample(rng, name, shape, **window)
    x, w = (rng.integers(-128, 128, a.shape).astype(np.int8) for a in example.inputs[:2] if a is not None)
    return Example(name, (x, w), example.attributes)
