"""Euclid layers in integers: −Σ (x − w)² of 8-bit codes, exact in int32.

Codes x and w have one scale s, so that x − w is an integer: s²/2 times the result is the distance. A term is at most
255² < 2¹⁶, so that n terms need 16 + ⌈log₂ n⌉ bits: int32 holds them for n ≤ 2¹⁵. Hardware reads a square from a table
of 256 entries, by |x − w|; the body is 2·x·w − Σx² − Σw² in integers, which is the same number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Body, Work, dtype_of, static_shape, where

MOST_TERMS = 1 << 15
"""Terms of a sum that int32 holds."""

_PART = 4096


def accumulator_bits(terms: int, bits: int = 8) -> int:
    """Bits of a sum of `terms` squares of differences of codes of `bits` bits."""
    return 2 * bits + math.ceil(math.log2(max(terms, 1)))


def check_codes(node: onnx_ir.Node, terms: int) -> None:
    """Check that both operands are int8 and that int32 holds the sum.

    Raises:
        IRError: otherwise.
    """
    for name, value in zip(("x", "w"), node.inputs, strict=False):
        if dtype_of(node, value) != onnx_ir.DataType.INT8:
            raise IRError(f"{where(node)}: {name} is {dtype_of(node, value)}, expected INT8; quantise it")
    if terms > MOST_TERMS:
        raise IRError(
            f"{where(node)}: a sum of {terms} squares takes {accumulator_bits(terms)} bits, expected at most 31; "
            "leave the layer in floats"
        )


def squares(op: Body, value: onnx_ir.Value, *axes: int, keepdims: int) -> onnx_ir.Value:
    """Σ v² of int8 codes along axes, in int32."""
    wide = op.Cast(value, to=onnx_ir.DataType.INT32)
    return op.ReduceSumSquare(wide, op.constant(axes), keepdims=keepdims)


def window_sums(op: Body, sums: onnx_ir.Value, ones: onnx_ir.Value, attributes: Mapping[str, Any]) -> onnx_ir.Value:
    """Sums of int32 over windows, by float32 convolutions with ones that are exact.

    A sum of c squares is below c·2¹⁴: its parts h·4096 + l have window sums below 2²⁴, where float32 holds every
    integer, for n = c·k ≤ 2¹⁵ terms: h·k ≤ 4n ≤ 2¹⁷, l·k < 2¹²·k.
    """
    part = op.constant(_PART, np.int32)
    high = op.Div(sums, part)
    low = op.Sub(sums, op.Mul(high, part))
    counted = []
    for value in (high, low):
        wide = op.Conv(op.Cast(value, to=onnx_ir.DataType.FLOAT), ones, **attributes)
        counted.append(op.Cast(wide, to=onnx_ir.DataType.INT32))
    return op.Add(op.Mul(counted[0], part), counted[1])


def distance(op: Body, product: onnx_ir.Value, inputs: onnx_ir.Value, weights: onnx_ir.Value) -> onnx_ir.Value:
    """2·x·w − Σx² − Σw²."""
    return op.Sub(op.Sub(op.Mul(product, op.constant(2, np.int32)), inputs), weights)


def distance_work(terms: int, node: onnx_ir.Node) -> Work:
    """A difference, a square from a table and a sum for each of `terms` terms of all outputs."""
    return Work(add=2 * terms, lookup=terms, bytes=math.prod(static_shape(node, node.inputs[1])))
