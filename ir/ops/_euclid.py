"""Euclid layers as an inner product and two sums of squares: what convolution, product and training forms share.

    S(x, w) = −½ Σᵢ (xᵢ − wᵢ)² = x·w − ½‖w‖² − ½‖x‖²
    S_λ(x, w) = x·w − λ·½(‖w‖² + ‖x‖²)                    λ = 0 is the plain layer, λ = 1 the Euclid layer

‖w‖² is a constant of an output and goes into its bias; ‖x‖² is one map for all outputs of a group: of a convolution the
window's sum of Σ_c x², with the zeros that pad it. The forms hold for every stride, dilation and pad.

In float32 the terms cancel where x is near w: with n terms and u = 2⁻²⁴ the error is at most about n·u·½(‖x‖ + ‖w‖)²
and in practice √n·u times that, whatever |S| is. ‖w‖² is subtracted with the bias, inside the inner product's sum, and
‖x‖² last: by then the sum is near ½‖x‖², so that the difference of near numbers rounds no more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import Body, Example, Op, Type, Work, dtype_of, static_shape, where
from mc_opt.ir.ops._kron import dense_work

_NARROW = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
_LISTS = ("strides", "dilations", "pads")


def bias_of(op: Op, node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The bias that a node has."""
    return op.input(node, "bias")


def _is_narrow(node: onnx_ir.Node) -> bool:
    return dtype_of(node, node.inputs[0]) in _NARROW


class Writer:
    """Writes the body of one node: squares of half precision are summed in float32, beyond 65504 and back."""

    def __init__(self, op: Body, meaning: Op, node: onnx_ir.Node) -> None:
        self.op = op
        self.narrow = _is_narrow(node)
        self.x, self.w = self._wide("x"), self._wide("w")
        self.bias = self._wide("bias") if bias_of(meaning, node) is not None else None
        self.strength = op.input("strength") if "strength" in op.inputs else None

    def _wide(self, name: str) -> onnx_ir.Value:
        value = self.op.input(name)
        return self.op.Cast(value, to=onnx_ir.DataType.FLOAT) if self.narrow else value

    def shift(self, norm: onnx_ir.Value) -> onnx_ir.Value:
        """norm: [F], ‖w‖² -> bias − λ½‖w‖²."""
        half = self.weighed(self.op.Mul(norm, self.op.constant(-0.5, np.float32)))
        return half if self.bias is None else self.op.Add(self.bias, half)

    def weighed(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """λ times a sum of squares."""
        return value if self.strength is None else self.op.Mul(value, self.strength)

    def result(self, y: onnx_ir.Value) -> onnx_ir.Value:
        """The result in the node's own type."""
        return self.op.CastLike(y, self.op.input("x")) if self.narrow else y


# ---- convolutions


def conv_variant(op: Op, node: onnx_ir.Node) -> str:
    """Dense, grouped or one channel a group; bias; half precision."""
    return f"{sharing(node)}{'.b' if bias_of(op, node) is not None else ''}{'.h' if _is_narrow(node) else ''}"


def sharing(node: onnx_ir.Node) -> str:
    """Who shares a map of squares: all outputs (dense), those of a group, or those of one channel (each)."""
    if node.attributes["group"].as_int() == 1:
        return "dense"
    return "each" if static_shape(node, node.inputs[1])[1] == 1 else "group"


def conv_body(body: Body, op: Op, node: onnx_ir.Node) -> onnx_ir.Value:
    """Conv with −½‖w‖² in the bias, plus −½ of the window's sum of squares: a convolution of one channel a group."""
    write, shared = Writer(body, op, node), sharing(node)
    x, w = write.x, write.w
    window, group = window_attributes()
    norm = body.ReduceSumSquare(body.Reshape(w, body.constant([0, -1])), body.constant([1]), keepdims=0)
    y = body.Conv(x, w, write.shift(norm), group=group, **window)

    kernel = body.emit("Shape", [w], {"start": 2})[0]
    half = onnx_ir.tensor(np.array([-0.5], np.float32))
    if shared == "dense":
        squares = body.ReduceSumSquare(x, body.constant([1]), keepdims=1)
        ones = body.ConstantOfShape(body.Concat(body.constant([1, 1]), kernel, axis=0), value=half)
        box = body.Conv(squares, ones, **window)
    else:
        squares = body.Mul(x, x) if shared == "each" else group_sums(body, x, w)
        outputs = body.emit("Shape", [w], {"start": 0, "end": 1})[0]
        ones = body.ConstantOfShape(body.Concat(outputs, body.constant([1]), kernel, axis=0), value=half)
        box = body.Conv(squares, ones, group=group, **window)
    return write.result(body.Add(y, write.weighed(box)))


def window_attributes() -> tuple[dict[str, Any], onnx_ir.Attr]:
    """References to a node's strides, dilations and pads, and to its group."""
    lists = {n: onnx_ir.RefAttr(n, n, onnx_ir.AttributeType.INTS) for n in _LISTS}
    return lists, onnx_ir.RefAttr("group", "group", onnx_ir.AttributeType.INT)


def group_sums(body: Body, x: onnx_ir.Value, w: onnx_ir.Value) -> onnx_ir.Value:
    """x: [n, g·c, *size] -> Σ_c x²: [n, g, *size]."""
    group = body.Reshape(body.scalar("group"), body.constant([1]))
    channels = body.emit("Shape", [w], {"start": 1, "end": 2})[0]
    parts = body.Concat(body.constant([0]), group, channels, body.constant([-1]), axis=0)
    squares = body.ReduceSumSquare(body.Reshape(x, parts), body.constant([2]), keepdims=0)
    batch, size = body.emit("Shape", [x], {"start": 0, "end": 1})[0], body.emit("Shape", [x], {"start": 2})[0]
    return body.Reshape(squares, body.Concat(batch, group, size, axis=0))


def _window(node: onnx_ir.Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    strides, dilations, pads = (tuple(node.attributes[n].as_ints()) for n in _LISTS)
    return strides, dilations, pads


def conv_shape(node: onnx_ir.Node) -> onnx_ir.Shape:
    """[n, F, positions]; a symbolic size that the window keeps stays itself."""
    x, w = node.inputs[0], static_shape(node, node.inputs[1])
    assert x is not None and x.shape is not None  # the check saw to it
    strides, dilations, pads = _window(node)
    dims: list[Any] = [x.shape[0], w[0]]
    for axis, taps in enumerate(w[2:]):
        size, free = x.shape[2 + axis], pads[axis] + pads[len(strides) + axis] - dilations[axis] * (taps - 1)
        if isinstance(size, int):
            dims.append((size + free - 1) // strides[axis] + 1)
        else:
            dims.append(size if free == 0 and strides[axis] == 1 else onnx_ir.SymbolicDim(None))
    return onnx_ir.Shape(dims)


def check_conv(node: onnx_ir.Node) -> None:
    """Check that the weight fits the input, and the window the weight.

    Raises:
        IRError: otherwise.
    """
    x, w, group = node.inputs[0], static_shape(node, node.inputs[1]), node.attributes["group"].as_int()
    if x is None or x.shape is None:
        raise IRError(f"{where(node)}: the rank of input {x.name if x else '?'!r} is unknown; set its shape")
    if not 3 <= len(w) <= 5 or len(x.shape) != len(w):
        raise IRError(f"{where(node)}: x has rank {len(x.shape)}, w {len(w)}; expected the same, from 3 to 5")
    if min(w) < 1 or group < 1 or w[0] % group:
        raise IRError(f"{where(node)}: w is {list(w)}, expected sizes of at least 1 and {group} groups of outputs")
    if isinstance(x.shape[1], int) and x.shape[1] != w[1] * group:
        raise IRError(f"{where(node)}: x has {x.shape[1]} channels, expected {w[1] * group}, group times those of w")
    for name, values in zip(_LISTS, _window(node), strict=True):
        count, least = (2 * (len(w) - 2), 0) if name == "pads" else (len(w) - 2, 1)
        if len(values) != count or min(values) < least:
            raise IRError(f"{where(node)}: {name} is {list(values)}, expected {count} numbers of at least {least}")


def conv_work(node: onnx_ir.Node) -> Work:
    """The convolution, and for each group the squares of its channels and their window; symbolic sizes count as 1."""
    x, w, group = node.inputs[0], static_shape(node, node.inputs[1]), node.attributes["group"].as_int()
    assert x is not None and x.shape is not None  # the check saw to it
    inputs, y = (math.prod(d if isinstance(d, int) else 1 for d in s) for s in (x.shape, conv_shape(node)))
    positions = y // w[0]
    squares = Work(mul=inputs, add=inputs + positions * group * math.prod(w[2:]) + y)
    return dense_work(w, outputs=positions, itemsize=math.ceil(dtype_of(node, x).itemsize)) + squares


# ---- products


def linear_variant(op: Op, node: onnx_ir.Node) -> str:
    """Orientation of the weight; bias; half precision."""
    side = "t" if node.attributes["transB"].as_int() else "n"
    return f"{side}{'.b' if bias_of(op, node) is not None else ''}{'.h' if _is_narrow(node) else ''}"


def linear_body(body: Body, op: Op, node: onnx_ir.Node) -> onnx_ir.Value:
    """MatMul, a bias with −½‖w‖², and −½‖x‖² of each row."""
    write = Writer(body, op, node)
    is_transposed = bool(node.attributes["transB"].as_int())
    norm = body.ReduceSumSquare(write.w, body.constant([1 if is_transposed else 0]), keepdims=0)
    w = body.Transpose(write.w, perm=[1, 0]) if is_transposed else write.w
    y = body.Add(body.MatMul(write.x, w), write.shift(norm))
    squares = body.ReduceSumSquare(write.x, body.constant([-1]), keepdims=1)
    return write.result(body.Add(y, write.weighed(body.Mul(squares, body.constant(-0.5, np.float32)))))


def _matrix(node: onnx_ir.Node) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    w = static_shape(node, node.inputs[1])
    return (w[0], w[1]) if node.attributes["transB"].as_int() else (w[1], w[0])


def linear_shape(node: onnx_ir.Node) -> onnx_ir.Shape:
    """The shape of x, its last axis replaced by the outputs."""
    x = node.inputs[0]
    assert x is not None and x.shape is not None  # the check saw to it
    return onnx_ir.Shape([*x.shape[:-1], _matrix(node)[0]])


def check_linear(node: onnx_ir.Node) -> None:
    """Check that the weight is a matrix that fits the input.

    Raises:
        IRError: otherwise.
    """
    x, w = node.inputs[0], static_shape(node, node.inputs[1])
    if x is None or x.shape is None or len(x.shape) < 1:
        raise IRError(f"{where(node)}: the rank of input {x.name if x else '?'!r} is unknown or 0; set its shape")
    if len(w) != 2 or min(w) < 1:
        raise IRError(f"{where(node)}: w is {list(w)}, expected a matrix; leave the layer a product")
    if isinstance(x.shape[-1], int) and x.shape[-1] != _matrix(node)[1]:
        raise IRError(f"{where(node)}: the last axis of x is {x.shape[-1]}, expected {_matrix(node)[1]} as w has")


def linear_work(node: onnx_ir.Node) -> Work:
    """The product, and the squares of each row; symbolic sizes count as 1."""
    x, w = node.inputs[0], static_shape(node, node.inputs[1])
    assert x is not None and x.shape is not None  # the check saw to it
    rows = math.prod(d if isinstance(d, int) else 1 for d in x.shape[:-1])
    outputs, inputs = _matrix(node)
    squares = Work(mul=rows * inputs, add=rows * (inputs + outputs))
    return dense_work(w, outputs=rows, itemsize=math.ceil(dtype_of(node, x).itemsize)) + squares


# ---- both


def types(node: onnx_ir.Node, shape: onnx_ir.Shape) -> list[Type]:
    """The type of x."""
    return [(dtype_of(node, node.inputs[0]), shape)]


def check_operands(op: Op, node: onnx_ir.Node, outputs: int) -> None:
    """Check the types, the bias and the strength.

    Raises:
        IRError: for the first that does not fit.
    """
    kind = dtype_of(node, node.inputs[0])
    if kind not in (onnx_ir.DataType.FLOAT, *_NARROW):
        raise IRError(f"{where(node)}: x is {kind}, expected FLOAT, FLOAT16 or BFLOAT16; cast it")
    for name in ("w", "bias"):
        value = op.input(node, name)
        if value is not None and dtype_of(node, value) != kind:
            raise IRError(f"{where(node)}: {name} is {dtype_of(node, value)}, expected {kind} as x; cast it")
    bias = bias_of(op, node)
    if bias is not None and static_shape(node, bias) != (outputs,):
        raise IRError(f"{where(node)}: bias is {list(static_shape(node, bias))}, expected [{outputs}]; add it after")
    if "strength" not in op.settings:
        return
    strength = op.input(node, "strength")
    if static_shape(node, strength) != () or dtype_of(node, strength) != onnx_ir.DataType.FLOAT:
        raise IRError(f"{where(node)}: strength is no FLOAT scalar; give one number from 0 to 1")


def conv_sample(
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    *,
    strides: int = 1,
    dilations: int = 1,
    pads: int = 0,
    group: int = 1,
    bias: bool = False,
    size: int = 6,
    strength: float | None = None,
    dtype: type = np.float32,
) -> Example:
    """An example of a convolution with a weight of `shape`; sizes differ between axes, so that an exchange shows."""
    n = len(shape) - 2
    x: np.ndarray = rng.standard_normal((2, shape[1] * group, *range(size, size + n))).astype(dtype)
    w: np.ndarray = (rng.standard_normal(shape) * 0.5).astype(dtype)
    given: np.ndarray | None = rng.standard_normal(shape[0]).astype(dtype) if bias else None
    attributes = {"strides": (strides,) * n, "dilations": (dilations,) * n, "pads": (pads,) * 2 * n, "group": group}
    return Example(name, (x, w, *_strength(strength), given), attributes)


def linear_sample(
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, int],
    *,
    lead: tuple[int, ...] = (3,),
    transposed: bool = False,
    bias: bool = False,
    strength: float | None = None,
    dtype: type = np.float32,
) -> Example:
    """An example of a product with a weight of `shape`, [outputs, inputs] before it is turned."""
    x: np.ndarray = rng.standard_normal((*lead, shape[1])).astype(dtype)
    w: np.ndarray = (rng.standard_normal(shape) * 0.5).astype(dtype)
    given: np.ndarray | None = rng.standard_normal(shape[0]).astype(dtype) if bias else None
    weight = w if transposed else np.ascontiguousarray(w.T)
    return Example(name, (x, weight, *_strength(strength), given), {"transB": int(transposed)})


def _strength(value: float | None) -> tuple[np.ndarray, ...]:
    return () if value is None else (np.array(value, np.float32),)
