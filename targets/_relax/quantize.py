"""Ops of quantised models, from QuantizeLinear to integer products, and a BatchNormalization that stayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt.targets._base import TargetError
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets._relax.mapped import constant, held, mapped
from mc_opt.targets._relax.shape import first
from mc_opt.targets.kernels import _tile, conv, gemm

Expr = Any


def _batch_norm(e: Emitter, node: onnx_ir.Node) -> None:
    """Y = x·a + b with a = γ/√(σ² + ε), b = β − μ·a, computed while building where they are known."""
    x, output = first(node), node.outputs[0]
    epsilon = e.attribute(node, "epsilon", 1e-5)
    values = [v for v in node.inputs[1:5] if v is not None]
    arrays = [e.constant(v) for v in values]
    shape, layout = e.shape(x), e.layout(x)
    if all(a is not None for a in arrays):
        gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
        scale = gamma / np.sqrt(variance + epsilon)
        dtype = e.dtype(x)
        constants = [scale.astype(dtype), (beta - mean * scale).astype(dtype)]
        operands = [held(e, x), *((e.weight(a), "plain") for a in constants)]

        def folded(r: Any, i: Any) -> Expr:
            return r[0](*i) * r[1](i[1]) + r[2](i[1])

        mapped(e, output, shape, operands, folded, name="batch_norm", layout=layout)
        return

    def element(r: Any, i: Any) -> Expr:
        gamma, beta, mean, variance = (p(i[1]) for p in r[1:])
        inverse = gamma / tirx.sqrt(variance + constant(epsilon, e.dtype(x)))
        return (r[0](*i) - mean) * inverse + beta

    operands = [held(e, x), *((e.plain(v), "plain") for v in values)]
    mapped(e, output, shape, operands, element, name="batch_norm", layout=layout)


def _scale_index(e: Emitter, node: onnx_ir.Node) -> Any:
    """From a logical index of x to the index of its scale: one for all, one a slice of an axis, or blocks of it."""
    x, scale = first(node), node.inputs[1]
    assert scale is not None
    rank, own = len(e.shape(x)), e.shape(scale)
    axis = e.attribute(node, "axis", 1) % max(rank, 1)
    block = e.attribute(node, "block_size", 0)
    if block:
        return lambda i: (*i[:axis], tirx.floordiv(i[axis], block), *i[axis + 1 :])
    return lambda i: (i[axis],) if own and own != (1,) else (0,) * len(own)


def _dequantize(e: Emitter, node: onnx_ir.Node) -> None:
    x, scale, zero = first(node), node.inputs[1], (*node.inputs, None)[2]
    assert scale is not None
    at, dtype = _scale_index(e, node), e.dtype(scale)
    operands = [held(e, x), (e.plain(scale), "plain")]
    if zero is not None:
        operands.append((e.plain(zero), "plain"))

    def element(r: Any, i: Any) -> Expr:
        code = r[0](*i).astype("int32")
        if zero is not None:
            code = code - r[2](*at(i)).astype("int32")
        return code.astype(dtype) * r[1](*at(i))

    mapped(e, node.outputs[0], e.shape(x), operands, element, name="dequantize", layout=e.layout(x))


def _quantize(e: Emitter, node: onnx_ir.Node) -> None:
    x, scale, zero = first(node), node.inputs[1], (*node.inputs, None)[2]
    assert scale is not None
    kind = e.attribute(node, "output_dtype", 0)
    dtype = e.dtype(zero) if zero is not None else str(np.dtype(onnx_ir.DataType(kind or 2).numpy()))
    limits = np.iinfo(dtype)
    at = _scale_index(e, node)
    operands = [held(e, x), (e.plain(scale), "plain")]
    if zero is not None:
        operands.append((e.plain(zero), "plain"))

    def element(r: Any, i: Any) -> Expr:
        code = tirx.nearbyint(r[0](*i) / r[1](*at(i)))
        if zero is not None:
            code = code + r[2](*at(i)).astype("float32")
        low, high = constant(float(limits.min), "float32"), constant(float(limits.max), "float32")
        return tirx.max(low, tirx.min(high, code)).astype("int32").astype(dtype)

    mapped(e, node.outputs[0], e.shape(x), operands, element, name="quantize", layout=e.layout(x))


def _matmul_integer(e: Emitter, node: onnx_ir.Node) -> None:
    """y = Σ_k (a − zero of the row) · (b − zero of the column) in int32, by the tile of the float product."""
    a, b, *zeros = node.inputs
    assert a is not None and b is not None
    shape_a, shape_b = e.shape(a), e.shape(b)
    matrix_a = (1, *shape_a) if len(shape_a) == 1 else shape_a
    matrix_b = (*shape_b, 1) if len(shape_b) == 1 else shape_b
    lead = np.broadcast_shapes(matrix_a[:-2], matrix_b[:-2])
    full = (*lead, matrix_a[-2], matrix_b[-1])
    left = _centred(e, a, matrix_a, zeros[0] if zeros else None, is_row=True)
    right = _centred(e, b, matrix_b, zeros[1] if len(zeros) > 1 else None, is_row=False)
    tile = _tile.choose(1, full[-2], full[-1], e.machine)
    packed = gemm.pack_dynamic(e, right, tile.columns)
    y = gemm.product(e, left, packed, None, tile=tile, columns=full[-1], name="matmul_integer")
    rows = full[-2:-1] if len(shape_a) > 1 else ()
    e.set(node.outputs[0], e.reshape(y, (*lead, *rows, *(full[-1:] if len(shape_b) > 1 else ()))))


def _conv_integer(e: Emitter, node: onnx_ir.Node) -> None:
    """y = Σ (x − zero) · (w − zero of the output) in int32, by the tile of the float convolution.

    Where no sum can leave the integers that float32 holds, floats compute it: they multiply and add in one step.
    """
    x, weight, *zeros = node.inputs
    assert x is not None and weight is not None
    points = [None if v is None else e.constant(v) for v in zeros]
    if any(p is None and v is not None for p, v in zip(points, zeros, strict=True)):
        raise TargetError(f"ConvInteger {node.name!r}: its zero points are computed; run fold-constants first")
    of_x, of_w = (0 if p is None else p.astype(np.int32) for p in (*points, None, None)[:2])
    shape = e.shape(weight)
    array = e.constant(weight)
    kind = "int32"
    if array is None:
        if np.any(of_w):
            raise TargetError(f"ConvInteger {node.name!r}: its weight is computed and has a zero point; fold it")
        packed = conv.computed_weight(e, _centred(e, weight, shape, None, is_row=False))
    else:
        centre = np.reshape(of_w, (-1, *[1] * (len(shape) - 1)))
        kind = _exact_in(array.astype(np.int64) - centre, np.reshape(of_x, -1)[0], e.dtype(x))
        fixed = conv.constant_weight(e, weight, shape, lambda a: (a.astype(np.int32) - centre).astype(kind))
        assert fixed is not None  # it is constant
        packed = fixed
    zero = tirx.const(int(np.reshape(of_x, -1)[0]), "int32")

    def centred(a: te.Tensor) -> te.Tensor:
        return te.compute(a.shape, lambda *i: (a(*i).astype("int32") - zero).astype(kind), name="centred")

    held_x = e.te(centred, e.nhwc(x), name="centred")
    window = conv.window(e, node, shape[2:], e.shape(x)[2:])
    groups = int(e.attribute(node, "group", 1))
    y = conv.convolution(e, held_x, packed, None, window=window, groups=groups, name="conv_integer")
    if kind != "int32":
        y = e.te(lambda a: te.compute(a.shape, lambda *i: a(*i).astype("int32"), name="cast"), y, name="cast")
    e.set(node.outputs[0], y, "nhwc")


def _exact_in(weight: np.ndarray, zero: int, dtype: str) -> str:
    """float32 if no sum of codes of `dtype` less `zero`, times a row of the weight, leaves ±2²⁴; else int32."""
    limits = np.iinfo(dtype)
    most = max(abs(int(limits.min) - int(zero)), abs(int(limits.max) - int(zero)))
    rows = np.abs(weight.reshape(weight.shape[0], -1)).sum(1)
    return "float32" if int(rows.max(initial=0)) * most <= 1 << 24 else "int32"


def _centred(
    e: Emitter, value: onnx_ir.Value, shape: Sequence[int], zero: onnx_ir.Value | None, *, is_row: bool
) -> relax.Expr:
    """The codes [.., m, n] in int32, less the zero of all, of each row [m] or of each column [n]."""
    operands = [e.reshape(e.plain(value), shape)]
    if zero is not None:
        own = e.shape(zero)
        operands.append(e.reshape(e.plain(zero), (*own, 1) if is_row and len(own) == 1 and own != (1,) else own))

    def fn(*tensors: te.Tensor) -> te.Tensor:
        def element(*i: Expr) -> Expr:
            code, *points = (_aligned(x, i) for x in tensors)
            return code - points[0] if points else code

        return te.compute(tuple(shape), element, name="centred")

    return e.te(fn, *operands, name="centred")


def _aligned(x: te.Tensor, index: Sequence[Expr]) -> Expr:
    """An element of x as int32 at an index that may be longer; axes of length 1 broadcast."""
    extents = [int(s) for s in x.shape]
    own = index[len(index) - len(extents) :]
    return x(*(0 if s == 1 else i for i, s in zip(own, extents, strict=True))).astype("int32")


HANDLERS: dict[str, Handler] = {
    "BatchNormalization": _batch_norm,
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "MatMulInteger": _matmul_integer,
    "QuantizeLinear": _quantize,
}
