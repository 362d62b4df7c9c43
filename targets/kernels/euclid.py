"""Euclid layers: the convolution or product of the plain layer, and the squares of the input once for all outputs.

    y[.., f] = Σ x·w + (bias[f] − ½‖w_f‖²) − ½·box(Σ_c x²)

‖w_f‖² is known while building, also of packed weights. The squares of all channels of a group are summed first; the
window then sums one number a position, an axis at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from tvm import relax, te, tirx

from mc_opt import ir
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter, Handler, Layout
from mc_opt.targets._relax.mapped import mapped
from mc_opt.targets.kernels import conv, gemm, lookup_gemv
from mc_opt.targets.kernels._window import Window


def euclid_conv(e: Emitter, node: onnx_ir.Node) -> None:
    """EuclidConv: a convolution whose epilogue adds the map of squares."""
    x, weight, bias = (*node.inputs, None)[:3]
    assert x is not None and weight is not None
    groups = int(e.attribute(node, "group", 1))
    window = conv.window(e, node, e.shape(weight)[2:], e.shape(x)[2:])
    held = e.nhwc(x)
    y = conv.convolution(
        e,
        held,
        conv.constant_weight(e, weight, e.shape(weight), lambda array: array)
        or conv.computed_weight(e, e.plain(weight)),
        _bias(e, weight, bias, axis=0),
        window=window,
        groups=groups,
        name="euclid_conv",
        shift=_box(e, held, window, groups),
    )
    e.set(node.outputs[0], y, "nhwc")


def euclid_linear(e: Emitter, node: onnx_ir.Node) -> None:
    """EuclidLinear: a product, and the squares of each row."""
    x, weight, bias = (*node.inputs, None)[:3]
    assert x is not None and weight is not None
    transposed = bool(e.attribute(node, "transB", 0))
    *lead, depth = e.shape(x)
    columns = e.shape(weight)[0 if transposed else 1]
    rows = dims.product(lead)
    a = e.reshape(e.plain(x), (rows, depth))
    added = _bias(e, weight, bias, axis=0 if transposed else 1)
    given = e.weight(added) if isinstance(added, np.ndarray) else added
    y = None
    if lookup_gemv.takes(e, rows, weight):
        y = lookup_gemv.product(e, a, weight, given, transposed=transposed)
    if y is None:
        tile = gemm.tile_for(rows, columns, e)
        packed = gemm.right_operand(e, weight, tile, transposed=transposed)
        y = gemm.product(e, a, packed, given, tile=tile, columns=columns, name="euclid_linear")
    squares = e.te(functools.partial(_squares, groups=1, factor=-0.5), a, name="squares")
    result = node.outputs[0]
    operands: list[tuple[relax.Expr, Layout]] = [(y, "plain"), (e.reshape(squares, (rows,)), "plain")]
    mapped(e, result, (rows, columns), operands, lambda r, i: r[0](*i) + r[1](i[0]), name="euclid_add", widens=True)
    e.set(result, e.reshape(e.plain(result), (*lead, columns)))


def _bias(e: Emitter, weight: onnx_ir.Value, bias: onnx_ir.Value | None, *, axis: int) -> np.ndarray | relax.Expr:
    """bias − ½‖w‖² of each output: known where weight and bias are, else computed by the model."""
    array = _known(e, weight)
    given = None if bias is None else e.constant(bias)
    others = tuple(a for a in range(len(e.shape(weight))) if a != axis)
    if array is not None and (bias is None or given is not None):
        half = np.square(array, dtype=np.float64).sum(others) * -0.5
        return (half if given is None else half + given).astype(array.dtype)
    if array is not None:
        norm = e.weight((np.square(array, dtype=np.float64).sum(others) * -0.5).astype(array.dtype))
    else:
        norm = e.te(functools.partial(_norms, axis=axis), e.plain(weight), name="weight_squares")
    if bias is None:
        return norm
    return e.te(
        lambda a, b: te.compute(a.shape, lambda i: a(i) + b(i), name="bias"), norm, e.plain(bias), name="euclid_bias"
    )


def _known(e: Emitter, weight: onnx_ir.Value) -> np.ndarray | None:
    """The weight dense, if it is known while building: only its norms stay."""
    array = e.constant(weight)
    if array is not None:
        return array
    lookup = e.lookup(weight)
    if lookup is None:
        return None
    return ir.decode(
        lookup.codes,
        lookup.codebook,
        lookup.scale,
        lookup.offset,
        bits=lookup.bits,
        shape=lookup.shape,
        axes=lookup.axes,
        group_size=lookup.group_size,
    )


def _norms(w: te.Tensor, *, axis: int) -> te.Tensor:
    """−½‖w‖² along all axes but one."""
    steps = [te.reduce_axis((0, s), name=f"r{k}") for k, s in enumerate(dims.sizes(w)) if k != axis]

    def element(i: Any) -> Any:
        value = w(*steps[:axis], i, *steps[axis:])
        return te.sum(value * value * tirx.const(-0.5, w.dtype), axis=steps)

    return te.compute((w.shape[axis],), element, name="norms")


def _box(e: Emitter, x: relax.Expr, window: Window, groups: int) -> relax.Expr:
    """x: [n, *spatial, c] -> −½ Σ x² over each window and the channels of each group: [n, *positions, groups]."""
    n, *spatial, _ = dims.sizes(x)
    positions = window.output(spatial)
    box = e.te(functools.partial(_squares, groups=groups, factor=-0.5), x, name="squares")
    # One group: the map's last axis is a spatial one, along which vectors lie.
    tail = () if groups == 1 else (groups,)
    size = conv.extended(window, positions)
    box = conv.padded(e, box, [p[0] for p in window.pads], size, channels=groups)
    box = e.reshape(box, (n, *size, *tail))
    for axis, (k, s, d) in enumerate(zip(window.kernel, window.strides, window.dilations, strict=True)):
        if k > 1 or s > 1:
            fn = functools.partial(
                _along, axis=1 + axis, taps=[t * d for t in range(k)], stride=s, size=positions[axis]
            )
            box = e.te(fn, box, name="box")
    return e.reshape(box, (n, *positions, groups))


def _squares(x: te.Tensor, *, groups: int, factor: float) -> te.Tensor:
    """x: [.., groups·c] -> factor · Σ_c x²: [.., groups]."""
    *lead, channels = dims.sizes(x)
    each = channels // groups
    weight = tirx.const(factor, x.dtype)
    if each == 1:
        return te.compute((*lead, channels), lambda *i: x(*i) * x(*i) * weight, name="squares")
    c = te.reduce_axis((0, each), name="c")

    def element(*i: Any) -> Any:
        value = x(*i[:-1], c if groups == 1 else i[-1] * each + c)
        return te.sum(value * value, axis=c)

    total = te.compute((*lead, groups), element, name="sums")
    return te.compute((*lead, groups), lambda *i: total(*i) * weight, name="squares")


def _along(x: te.Tensor, *, axis: int, taps: Sequence[int], stride: int, size: int) -> te.Tensor:
    """Sums of taps along one axis, written out: the taps of a window are few."""
    shape = [*dims.sizes(x)]
    shape[axis] = size

    def element(*i: Any) -> Any:
        terms = [x(*i[:axis], i[axis] * stride + t, *i[axis + 1 :]) for t in taps]
        return functools.reduce(_plus, terms)

    return te.compute(tuple(shape), element, name="box")


def _plus(a: Any, b: Any) -> Any:
    return a + b


HANDLERS: dict[str, Handler] = {"mc_opt.EuclidConv": euclid_conv, "mc_opt.EuclidLinear": euclid_linear}
