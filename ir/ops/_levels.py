"""What the training forms with levels from −1 to 1 share: where levels change, and the scale of each row.

A form with `levels` = 2 has the levels −1, 1, one with 3 has −1, 0, 1. y = F(u)·(scale·unit), u = gain·x, where `unit`
is what a row of the weight was divided by and `scale`, learned, starts at 1: so latents and scales have the same size
in every layer and one learning rate fits all. Latents get through the levels `gain` times faster than a scale. An
activation has no scale.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Body, Op, Type, dtype_of, static_shape, where
from mc_opt.ir.ops._grid import FLOATS
from mc_opt.ir.ops._packing import Geometry

LEVELS = (2, 3)


def midpoints(levels: int) -> tuple[float, ...]:
    """Where one level passes into the next: 0, or −½ and ½."""
    gap = 2 / (levels - 1)
    return tuple(-1 + gap * (k + 0.5) for k in range(levels - 1))


def amplified(body: Body) -> onnx_ir.Value:
    """U = gain·x, in standard ops."""
    x = body.input("x")
    return body.Mul(x, body.CastLike(body.scalar("gain"), x))


def geometry(op: Op, node: onnx_ir.Node) -> Geometry | None:
    """The matrix of rows that a weight is seen as; None for an activation, which has no scale."""
    if op.input(node, "scale") is None:
        return None
    return Geometry(static_shape(node, op.input(node, "x")), node.attributes["axes"].as_ints())


def key(op: Op, node: onnx_ir.Node) -> str:
    """The part of an overload that names how the scale of a row meets the weight."""
    found = geometry(op, node)
    if found is None:
        return "bare"
    unit = "u" if op.input(node, "unit") is not None else ""
    return f"rows{unit}.{len(found.axes)}p{''.join(map(str, found.perm))}"


def scaled(op: Op, body: Body, node: onnx_ir.Node, y: onnx_ir.Value) -> onnx_ir.Value:
    """y·(scale·unit), in standard ops."""
    found = geometry(op, node)
    if found is None:
        return y
    factor = body.input("scale")
    if op.input(node, "unit") is not None:
        factor = body.Mul(factor, body.input("unit"))
    ones = body.constant([1] * (len(found.shape) - len(found.axes)))
    rows = body.Gather(body.Shape(body.input("x")), body.constant(found.axes))
    factor = body.Reshape(factor, body.Concat(rows, ones, axis=0))
    if found.is_transposed:
        factor = body.Transpose(factor, perm=found.inverse)
    return body.Mul(y, factor)


def types(node: onnx_ir.Node) -> list[Type]:
    """The type and shape of the first input, whose shape may be open.

    Raises:
        IRError: when it is unknown.
    """
    value = node.inputs[0]
    if value is None or value.shape is None:
        raise IRError(f"{where(node)}: the shape of input {value.name if value else '?'!r} is unknown; set it")
    return [(dtype_of(node, value), onnx_ir.Shape(list(value.shape)))]


def check(op: Op, node: onnx_ir.Node) -> None:
    """Check the number of levels, the settings, and that scale and unit fit the rows.

    Raises:
        IRError: for the first that does not.
    """
    dtype = dtype_of(node, op.input(node, "x"))
    if dtype not in FLOATS:
        raise IRError(f"{where(node)} x is {dtype}, expected a float type; cast it")
    if "levels" in node.attributes and node.attributes["levels"].as_int() not in LEVELS:
        raise IRError(f"{where(node)} levels is {node.attributes['levels'].as_int()}, expected 2 or 3; choose one")
    if node.attributes["gain"].as_int() < 1:
        raise IRError(f"{where(node)} gain is {node.attributes['gain'].as_int()}, expected 1 or more; leave it out")
    for name in op.settings:
        shape = static_shape(node, op.input(node, name))
        if shape:
            raise IRError(f"{where(node)} {name} is {list(shape)}, expected one number of shape []; reshape it")
    found = geometry(op, node)
    if found is None:
        if op.input(node, "unit") is not None:
            raise IRError(f"{where(node)} has a unit and no scale; give both, or the scale alone")
        return
    found.check(where(node))
    for name in ("scale", "unit"):
        value = op.input(node, name)
        if value is not None and (static_shape(node, value), dtype_of(node, value)) != ((found.rows, 1), dtype):
            raise IRError(
                f"{where(node)} {name} is {dtype_of(node, value)}{list(static_shape(node, value))}, "
                f"expected {dtype}[{found.rows}, 1]; reshape or cast it"
            )


def elements(node: onnx_ir.Node) -> int:
    """Elements of the first input; open dimensions count 1."""
    value = node.inputs[0]
    dims = value.shape if value is not None and value.shape is not None else ()
    return math.prod(dim if isinstance(dim, int) else 1 for dim in dims)


def stored_bytes(node: onnx_ir.Node) -> int:
    """Bytes of all inputs; open dimensions count 1."""
    total = 0
    for value in node.inputs:
        if value is not None and value.shape is not None:
            dims = (dim if isinstance(dim, int) else 1 for dim in value.shape)
            total += math.prod(dims) * math.ceil(dtype_of(node, value).itemsize)
    return total


def number(body: Body, value: float, like: onnx_ir.Value) -> onnx_ir.Value:
    """A constant number in the type of `like`."""
    return body.CastLike(body.constant(value, np.float32), like)


def check_choice(node: onnx_ir.Node, name: str, known: tuple[str, ...]) -> None:
    """Check that an attribute is the number of one of the known choices.

    Raises:
        IRError: otherwise.
    """
    number = node.attributes[name].as_int()
    if not 0 <= number < len(known):
        choices = ", ".join(f"{k} ({choice})" for k, choice in enumerate(known))
        raise IRError(f"{where(node)} {name} is {number}, expected one of {choices}; choose one")


PLACES: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("matmul", (7, 5), (1,)),
    ("batched", (2, 7, 5), (0, 2)),
    ("conv", (4, 3, 2, 3), (0,)),
    ("transposed-conv", (3, 4, 2, 3), (1,)),
    ("lstm", (2, 8, 5), (0, 1)),
    ("turned", (3, 4, 5), (2, 0)),
)
"""Name, shape and row axes of weights, for the samples of the forms."""


def sample(
    rng: np.random.Generator, shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A latent weight, its scale and its unit."""
    rows = math.prod(shape[a] for a in axes)
    x = (1.5 * rng.standard_normal(shape)).astype(np.float32)
    scale, unit = (rng.uniform(0.5, 2, (rows, 1)).astype(np.float32) for _ in range(2))
    return x, scale, unit
