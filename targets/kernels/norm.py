"""Normalisations over a row: layer, root mean square, instance and group; mean first, then deviations from it.

y = (x - mean) / √(variance + ε) · scale + bias
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir
from tvm import relax, te, tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._base import TargetError
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets._relax.mapped import elementwise
from mc_opt.targets.kernels import _loops, _staged
from mc_opt.targets.kernels._loops import Buffer, Expr


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What the kernel of a normalisation is built from.

    Attributes:
        count: rows.
        length: elements of a row.
        epsilon: added to the variance.
        centred: whether the mean is subtracted.
        scale: values of the scale (0 for none), and likewise `bias`.
        statistics: whether mean and 1 / deviation are outputs too.
        period: scales of successive rows: a row's first scale is (row mod period) · length / block.
        block: successive elements that share a scale; 1 for one each.
        skip: whether the sum with a second input is normalised, and is an output too.
    """

    count: Dim
    length: int
    epsilon: float
    centred: bool
    scale: int
    bias: int
    statistics: bool
    period: int = 1
    block: int = 1
    skip: bool = False


def _emit(
    e: Emitter,
    x: relax.Expr,
    scale: relax.Expr | None,
    bias: relax.Expr | None,
    rows: _Rows,
    *,
    skip: relax.Expr | None = None,
) -> list[relax.Var]:
    """The normalised rows, their sums with those of `skip`, and statistics: what of these is asked for."""
    dtype = str(x.ty.dtype)
    own = dataclasses.replace(rows, count=_loops.inside((rows.count,))[0])
    arguments: list[_loops.Argument] = [((own.count, rows.length), dtype)]
    inputs = [e.reshape(x, (rows.count, rows.length))]
    if skip is not None:
        inputs.append(e.reshape(skip, (rows.count, rows.length)))
        arguments.append(arguments[0])
    for given, size in ((scale, rows.scale), (bias, rows.bias)):
        if given is not None:
            inputs.append(e.reshape(given, (size,)))
            arguments.append(((size,), dtype))
    if e.machine.kind == "cuda":
        return _emit_staged(e, inputs, rows)
    results, outputs = (
        [*[((r.count, rows.length), dtype)] * (1 + rows.skip), *([((r.count,), dtype)] * 2 if rows.statistics else [])]
        for r in (own, rows)
    )
    body = functools.partial(_body, own, dtype, e.machine)
    return e.call(_loops.kernel([*arguments, *results], body), inputs, outputs, name="norm")


def _emit_staged(e: Emitter, inputs: Sequence[relax.Expr], rows: _Rows) -> list[relax.Var]:
    what = _staged.Norm(
        epsilon=rows.epsilon,
        centred=rows.centred,
        scale=rows.scale > 0,
        bias=rows.bias > 0,
        statistics=rows.statistics,
        period=rows.period,
        block=rows.block,
    )

    def fn(x: te.Tensor, *parameters: te.Tensor) -> list[te.Tensor]:
        return _staged.norm(x, parameters, what)

    if rows.statistics:
        return e.tuple_te(fn, *inputs, name="norm")
    return [e.te(lambda *tensors: fn(*tensors)[0], *inputs, name="norm")]


def _body(rows: _Rows, dtype: str, machine: Machine, x: Buffer, *rest: Buffer) -> None:
    others = list(rest)
    other = others.pop(0) if rows.skip else None
    scale = others.pop(0) if rows.scale else None
    bias = others.pop(0) if rows.bias else None
    y, *statistics = others
    summed = statistics.pop(0) if rows.skip else x
    length, lanes = rows.length, machine.lanes
    total = functools.partial(_loops.reduce_row, length=length, combine=_add, start=0.0, lanes=lanes, dtype=dtype)
    with _loops.each(rows.count, machine, work=6 * rows.count * length) as row:
        mean, factor = _loops.registers(1, 1, dtype), _loops.registers(1, 1, dtype)
        if other is not None:
            _loops.map_row(functools.partial(_sum, (x, other), summed, row), length, lanes=lanes)
        read = functools.partial(_read, summed, row)
        if rows.centred:
            T.buffer_store(mean, total(read) / tirx.const(length, dtype), [0])

        def deviation(i: Expr, width: int) -> Expr:
            value = read(i, width)
            return value - _loops.splat(mean[0], width) if rows.centred else value

        def square(i: Expr, width: int) -> Expr:
            return deviation(i, width) * deviation(i, width)

        variance = total(square) / tirx.const(length, dtype)
        T.buffer_store(factor, tirx.const(1, dtype) / tirx.sqrt(variance + tirx.const(rows.epsilon, dtype)), [0])
        if statistics:
            T.buffer_store(statistics[0], mean[0], [row])
            T.buffer_store(statistics[1], factor[0], [row])
        first = tirx.floormod(row, rows.period) * (length // rows.block)

        def run(block: Expr, i: Expr, width: int) -> None:
            at = block * rows.block + i
            value = deviation(at, width) * _loops.splat(factor[0], width)
            if scale is not None:
                value = value * _parameter(scale, rows, first, block, i, width)
            if bias is not None:
                value = value + _parameter(bias, rows, first, block, i, width)
            _loops.store(y, value, row, at, lanes=width)

        if rows.block == 1:
            _loops.map_row(functools.partial(run, tirx.const(0, "int32")), length, lanes=lanes)
        else:
            with T.serial(0, length // rows.block) as block:
                _loops.map_row(functools.partial(run, block), rows.block, lanes=lanes)


def _read(x: Buffer, row: Expr, i: Expr, width: int) -> Expr:
    return _loops.load(x, row, i, lanes=width)


def _sum(parts: Sequence[Buffer], out: Buffer, row: Expr, i: Expr, width: int) -> None:
    a, b = (_read(part, row, i, width) for part in parts)
    _loops.store(out, a + b, row, i, lanes=width)


def _parameter(values: Buffer, rows: _Rows, first: Expr, block: Expr, i: Expr, width: int) -> Expr:
    if rows.block == 1:
        return _loops.load(values, first + i, lanes=width)
    return _loops.splat(values[first + block], width)


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _row_parameter(e: Emitter, value: onnx_ir.Value | None, length: int, node: onnx_ir.Node) -> relax.Expr | None:
    """A scale or bias with one value for each element of a row."""
    if value is None:
        return None
    size = dims.product(e.shape(value))
    if size == length:
        return e.plain(value)
    array = e.constant(value)
    if size == 1 and array is not None:
        return e.weight(np.full((length,), array.reshape(()), array.dtype))
    if size == 1:
        flat = e.reshape(e.plain(value), (1,))
        return e.te(lambda a: te.compute((length,), lambda _: a(0), name="spread"), flat, name="spread")
    raise TargetError(
        f"{node.op_type} {node.name!r}: scale or bias {value.name!r} has {size} values, expected 1 or {length};"
        " apply it by a Mul or Add of its own"
    )


def layer_norm(e: Emitter, node: onnx_ir.Node) -> None:
    """LayerNormalization and RMSNormalization over the axes from `axis` on."""
    x, scale, *rest = node.inputs
    assert x is not None
    shape = e.shape(x)
    axis = int(e.attribute(node, "axis", -1)) % len(shape)
    count, length = dims.product(shape[:axis]), dims.product(shape[axis:])
    if not isinstance(length, int):
        raise ValueError(f"it normalises over {dims.text(length)} elements; expected a fixed number")
    scales = _row_parameter(e, scale, length, node)
    biases = _row_parameter(e, rest[0] if rest else None, length, node)
    statistics = any(v is not None and v.name and v.uses() for v in node.outputs[1:]) or any(
        v in e.model.graph.outputs for v in node.outputs[1:]
    )
    rows = _Rows(
        count=count,
        length=length,
        epsilon=float(e.attribute(node, "epsilon", 1e-5)),
        centred=node.op_type == "LayerNormalization",
        scale=length if scales is not None else 0,
        bias=length if biases is not None else 0,
        statistics=statistics,
    )
    made = _emit(e, e.plain(x), scales, biases, rows)
    e.set(node.outputs[0], e.reshape(made[0], shape))
    for value, result in zip(node.outputs[1:], made[1:], strict=False):
        e.set(value, e.reshape(result, (*shape[:axis], *[1] * (len(shape) - axis))))


def skip_norm(e: Emitter, node: onnx_ir.Node) -> None:
    """SkipSimplifiedLayerNormalization: a sum, and its rows divided by their root mean squares."""
    x, skip, scale, *rest = node.inputs
    y, *others = node.outputs
    assert x is not None and skip is not None and scale is not None
    if any(v is not None for v in rest) or any(v.uses() or v.is_graph_output() for v in others[:2]):
        raise ValueError("it has a bias or outputs of statistics; expected neither")
    total = others[2] if len(others) > 2 else onnx_ir.Value(name=f"{y.name}.sum")
    at_once = e.machine.kind != "cuda" and dims.same_shape(e.shape(x), e.shape(skip))
    if not at_once:
        elementwise(e, total, [x, skip], lambda a, b: a + b, name="add")
    shape = e.shape(x if at_once else total)
    length = shape[-1]
    if not isinstance(length, int):
        raise ValueError(f"it normalises over {dims.text(length)} elements; expected a fixed number")
    rows = _Rows(
        count=dims.product(shape[:-1]),
        length=length,
        epsilon=float(e.attribute(node, "epsilon", 1e-5)),
        centred=False,
        scale=length,
        bias=0,
        statistics=False,
        skip=at_once,
    )
    made = _emit(
        e,
        e.plain(x if at_once else total),
        _row_parameter(e, scale, length, node),
        None,
        rows,
        skip=e.plain(skip) if at_once else None,
    )
    e.set(y, e.reshape(made[0], shape))
    if at_once:
        e.set(total, e.reshape(made[1], shape))


def channel_norm(e: Emitter, node: onnx_ir.Node) -> None:
    """InstanceNormalization and GroupNormalization: rows are one channel, or the channels of one group."""
    x, scale, bias = node.inputs
    assert x is not None and scale is not None and bias is not None
    shape = e.shape(x)
    n, channels = shape[:2]
    groups = channels if node.op_type == "InstanceNormalization" else int(e.attribute(node, "num_groups", 1))
    spatial = dims.product(shape[2:])
    scales, biases = e.plain(scale), e.plain(bias)
    if not isinstance(channels // groups * spatial, int):
        raise ValueError("it normalises over an open number of elements; expected a fixed one")
    rows = _Rows(
        count=dims.product([n, groups]),
        length=channels // groups * spatial,
        epsilon=float(e.attribute(node, "epsilon", 1e-5)),
        centred=True,
        scale=channels,
        bias=channels,
        statistics=False,
        period=groups,
        block=spatial,
    )
    e.set(node.outputs[0], e.reshape(_emit(e, e.plain(x), scales, biases, rows)[0], shape))


HANDLERS: dict[str, Handler] = {
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
    "InstanceNormalization": channel_norm,
    "GroupNormalization": channel_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": skip_norm,
}
