"""What the training forms of shift weights share: the recursion of their exponents, and how a scale meets them.

H(x) = 1 where x > 0, else 0; Sgn(x) = 1 where x ≥ 0, else -1. The exponent of a weight counts the steps at the end
that are above 0: S₀ = 0, Sⱼ = (Sⱼ₋₁ + 1)·H(stepⱼ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Body, Op, Work, dtype_of, static_shape, where
from mc_opt.ir.ops import _grid as grids
from mc_opt.ir.ops._packing import Geometry


def geometry_of(node: onnx_ir.Node) -> Geometry:
    """The matrix of rows and groups that the weight is seen as; its shape is that of the first latent."""
    given = node.attributes
    return Geometry(static_shape(node, node.inputs[0]), given["axes"].as_ints(), given["group_size"].as_int())


def grid_of(op: Op, node: onnx_ir.Node) -> grids.Grid:
    """The extent of the scale."""
    rows, groups = static_shape(node, op.input(node, "scale"))
    return grids.Grid(geometry_of(node), {"scale": grids.kind(rows, groups)})


def exponent(op: Body, steps: Sequence[onnx_ir.Value]) -> onnx_ir.Value:
    """S of each weight, int32: the recursion over the steps."""
    total = op.constant(0, np.int32)
    for step in steps:
        total = op.Mul(op.Add(total, op.constant(1, np.int32)), is_above(op, step))
    return total


def is_above(op: Body, x: onnx_ir.Value) -> onnx_ir.Value:
    """H(x), int32."""
    return op.Cast(op.Greater(x, op.CastLike(op.constant(0, np.float32), x)), to=onnx_ir.DataType.INT32)


def signed_power(op: Body, sign: onnx_ir.Value, exponents: onnx_ir.Value, steps: int) -> onnx_ir.Value:
    """Sgn(sign)·2^S in the latent's type; the powers come from a table, so that they are exact."""
    powers = op.CastLike(op.constant(np.exp2(np.arange(steps + 1)), np.float32), sign)
    power = op.Gather(powers, exponents)
    return op.Where(op.Less(sign, op.CastLike(op.constant(0, np.float32), sign)), op.Neg(power), power)


def scaled(op: Body, levels: onnx_ir.Value, grid: grids.Grid) -> onnx_ir.Value:
    """levels·(scale·gain): the weight's shape."""
    shape = op.Shape(levels)
    x = op.Transpose(levels, perm=grid.geometry.perm) if grid.geometry.is_transposed else levels
    x = grids.to_grid(op, x, grid, operands=op.inputs, shape=shape)
    factor = grids.Spread(op, grid, shape)(op.Mul(op.input("scale"), op.input("gain")), grid.kinds["scale"])
    return grids.from_grid(op, op.Mul(x, factor), grid, shape)


def check(op: Op, node: onnx_ir.Node, *, most: int) -> None:
    """Check that all latents are alike, that scale and gain are, and that there are no more steps than `most`.

    Raises:
        IRError: otherwise.
    """
    geometry = geometry_of(node)
    geometry.check(where(node))
    formal = op.formal(len(node.inputs))
    dtype = dtype_of(node, node.inputs[0])
    for name, value in zip(formal, node.inputs, strict=True):
        if dtype_of(node, value) != dtype:
            raise IRError(f"{where(node)} {name} is {dtype_of(node, value)}, expected {dtype} as sign; cast it")
        if name not in ("scale", "gain") and static_shape(node, value) != geometry.shape:
            raise IRError(
                f"{where(node)} {name} is {list(static_shape(node, value))}, expected {list(geometry.shape)} as sign; "
                "every latent has the weight's shape"
            )
    grids.check_factor(node, "scale", op.input(node, "scale"), geometry)
    extents = [static_shape(node, op.input(node, name)) for name in ("scale", "gain")]
    if extents[0] != extents[1]:
        raise IRError(f"{where(node)} gain is {list(extents[1])}, expected {list(extents[0])} as scale; reshape it")
    steps = len(formal) - formal.index("gain") - 1
    if steps > most:
        raise IRError(f"{where(node)} has {steps} steps, expected at most {most}: a code of 4 bits")


def work(node: onnx_ir.Node) -> Work:
    """A comparison a latent, a shift and a product a weight; a training form has no kernel, the reference does this."""
    stored = [math.prod(static_shape(node, v)) * math.ceil(dtype_of(node, v).itemsize) for v in node.inputs]
    count = geometry_of(node).count
    return Work(mul=count, add=(len(node.inputs) - 2) * count, shift=count, bytes=sum(stored))


def chain(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """S and ∂S/∂H(stepⱼ) for every pattern of the steps, by the recursion: [2^steps] and [steps, 2^steps].

    Bit j - 1 of a pattern is H(stepⱼ). ∂Sⱼ/∂H(stepⱼ) = Sⱼ₋₁ + 1 and ∂Sⱼ/∂Sⱼ₋₁ = H(stepⱼ).
    """
    above = [np.arange(1 << steps) >> j & 1 for j in range(steps)]
    totals = [np.zeros(1 << steps, np.int64)]
    for bit in above:
        totals.append((totals[-1] + 1) * bit)
    slopes = np.zeros((steps, 1 << steps))
    rest = np.ones(1 << steps)
    for j in reversed(range(steps)):
        slopes[j] = rest * (totals[j] + 1)
        rest = rest * above[j]
    return totals[-1], slopes
