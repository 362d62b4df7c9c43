"""Softmax and LogSoftmax along any axis, in three passes over a row that stays in the cache.

softmax(x)_i = e^(x_i - m) / Σ_j e^(x_j - m),   m = max_j x_j
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import onnx_ir
from tvm import relax, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels import _loops, _math, _staged
from mc_opt.targets.kernels._loops import Buffer, Expr

_LOWEST = {"float16": -65504.0, "float32": -3.4028234663852886e38, "float64": -1.7976931348623157e308}


def softmax(e: Emitter, node: onnx_ir.Node) -> None:
    """Softmax or LogSoftmax in the layout in which the input is held."""
    value = node.inputs[0]
    assert value is not None
    rank = len(e.shape(value))
    axis = int(e.attribute(node, "axis", -1)) % rank
    layout = e.layout(value)
    if layout == "nhwc":
        x = e.nhwc(value)
        axis = rank - 1 if axis == 1 else max(axis - 1, 0)
    else:
        x = e.plain(value)
    e.set(node.outputs[0], along(e, x, axis, log=node.op_type == "LogSoftmax"), layout)


def along(e: Emitter, x: relax.Expr, axis: int, *, log: bool = False) -> relax.Expr:
    """x of any shape -> the same shape, normalised along one axis."""
    shape = dims.sizes(x)
    dtype = str(x.ty.dtype)
    outer, length, inner = dims.product(shape[:axis]), shape[axis], dims.product(shape[axis + 1 :])
    if 0 in shape:
        return x
    if e.machine.kind == "cuda":
        y = e.te(functools.partial(_staged.softmax, log=log), e.reshape(x, (outer, length, inner)), name="softmax")
        return e.reshape(y, shape)
    is_last = dims.same(inner, 1)
    flat = (outer, length) if is_last else (outer, length, inner)
    own = _loops.inside(flat)
    body = functools.partial(_rows if is_last else _columns, own, dtype, e.machine, log)
    function = _loops.kernel([(own, dtype), (own, dtype)], body)
    y = e.call(function, [e.reshape(x, flat)], [(flat, dtype)], name="log_softmax" if log else "softmax")[0]
    return e.reshape(y, shape)


def _exp(x: Expr, dtype: str) -> Expr:
    return _math.exp_not_positive(x) if dtype == "float32" else tirx.exp(x)


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _rows(shape: Sequence[Dim], dtype: str, machine: Machine, log: bool, x: Buffer, y: Buffer) -> None:
    outer, length = shape
    lanes = machine.lanes
    row = functools.partial(_loops.reduce_row, length=length, lanes=lanes, dtype=dtype)
    with _loops.each(outer, machine, work=8 * outer * length) as o:
        highest = row(lambda i, w: _loops.load(x, o, i, lanes=w), combine=tirx.max, start=_LOWEST[dtype])

        def exponential(i: Expr, width: int) -> Expr:
            shifted = _loops.load(x, o, i, lanes=width) - _loops.splat(highest, width)
            _loops.store(y, _exp(shifted, dtype), o, i, lanes=width)
            return _loops.load(y, o, i, lanes=width)

        total = row(exponential, combine=_add, start=0.0)
        factor = _loops.registers(1, 1, dtype)
        T.buffer_store(factor, tirx.log(total) if log else tirx.const(1, dtype) / total, [0])

        def finish(i: Expr, width: int) -> None:
            held = _loops.splat(factor[0], width)
            if log:  # the highest first: added to a logarithm, a large one would leave nothing of it
                value = _loops.load(x, o, i, lanes=width) - _loops.splat(highest, width) - held
            else:
                value = _loops.load(y, o, i, lanes=width) * held
            _loops.store(y, value, o, i, lanes=width)

        _loops.map_row(finish, length, lanes=lanes)


def _columns(shape: Sequence[Dim], dtype: str, machine: Machine, log: bool, x: Buffer, y: Buffer) -> None:
    outer, length, inner = shape

    def columns(o: Expr, i: Expr, width: int) -> None:
        highest, total = _loops.registers(1, width, dtype), _loops.registers(1, width, dtype)

        def keep(register: Buffer, value: Any) -> None:
            _loops.store(register, value, 0, lanes=width)

        def held(register: Buffer) -> Expr:
            return _loops.load(register, 0, lanes=width)

        keep(highest, _loops.splat(_LOWEST[dtype], width, dtype))
        keep(total, _loops.splat(0.0, width, dtype))
        with T.serial(0, length) as k:
            keep(highest, tirx.max(held(highest), _loops.load(x, o, k, i, lanes=width)))
        with T.serial(0, length) as k:
            value = _exp(_loops.load(x, o, k, i, lanes=width) - held(highest), dtype)
            _loops.store(y, value, o, k, i, lanes=width)
            keep(total, held(total) + _loops.load(y, o, k, i, lanes=width))
        if log:
            keep(total, _math.log(held(total)) if dtype == "float32" else tirx.log(held(total)))
        with T.serial(0, length) as k:
            if log:
                value = _loops.load(x, o, k, i, lanes=width) - held(highest) - held(total)
            else:
                value = _loops.load(y, o, k, i, lanes=width) / held(total)
            _loops.store(y, value, o, k, i, lanes=width)

    with _loops.each(outer, machine, work=8 * outer * length * inner) as o:
        _loops.map_row(functools.partial(columns, o), inner, lanes=machine.lanes)


HANDLERS: dict[str, Handler] = {"Softmax": softmax, "LogSoftmax": softmax}
