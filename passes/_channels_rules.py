"""What each standard op says about channels: which axes of its inputs and outputs stand for the same ones.

A rule returns the axes of the outputs, having tied or fixed every axis of the inputs; None leaves the op to
`Walk.opaque`, as an op without a rule is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._channels_axes import (
    ONE,
    Axis,
    Place,
    Rule,
    Walk,
    array_type,
    dims_of,
    integer,
    whole_numbers,
)
from mc_opt.passes._channels_moves import MOVES

Axes = list[list[Axis]]


def _value(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_constant(value: onnx_ir.Value | None) -> bool:
    return value is not None and array_type(value) is not None


def _runs_over(node: onnx_ir.Node, what: str = "runs over it") -> str:
    return f"{node.op_type} {ir.title_of(node)} {what}"


def elementwise(walk: Walk, node: onnx_ir.Node) -> Axes:
    """Numbers meet at equal positions; an axis of 1 meets all of the other's, and ties nothing."""
    return [_broadcast(walk, [v for v in node.inputs if v is not None], dims_of(node.outputs[0]))] * len(node.outputs)


def _broadcast(walk: Walk, values: Sequence[onnx_ir.Value], dims: Sequence[object], *, skip: int = 0) -> list[Axis]:
    """The axes of a result of these dims; `skip` axes at the end of each value take no part."""
    made: list[Axis] = []
    for k in range(len(dims) - skip):
        tied: Axis | None = None
        for value in values:
            own = dims_of(value)
            axis = k - (len(dims) - len(own))
            if axis >= 0 and own[axis] != 1:
                tied = walk.tie(tied, walk.of(value)[axis])
        made.append(ONE if tied is None else tied)
    return made


def conv(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Rows of the weight make channels, its columns sum over those of x; depthwise, a row is its channel's."""
    x, w = node.inputs[0], node.inputs[1]
    sizes = [d for d in dims_of(w) if isinstance(d, int)] if w is not None else []
    if x is None or w is None or len(sizes) < len(dims_of(w)):
        return None
    groups, given, rows, columns = integer(node, "group", 1), walk.of(x), walk.of(w)[0], sizes[1]
    if groups == 1:
        walk.tie(given[1], walk.of(w)[1])
    elif columns == 1:
        own = given[1]
        rows = walk.tie(rows, own if isinstance(own, ir.Skip) else np.repeat(own, sizes[0] // groups))
    else:
        # Equal counts a group: channel k of one group goes with channel k of every other one.
        _tie_blocks(walk, given[1], groups)
        _tie_blocks(walk, rows, groups)
        if not isinstance(given[1], ir.Skip):
            walk.tie(given[1][:columns], walk.of(w)[1])
    for axis in walk.of(w)[2:]:
        walk.fix(axis, _runs_over(node))
    _slide(walk, node)
    _bias(walk, node, rows)
    if groups == 1 or columns > 1:
        walk.sums.append(Place(node, 0, 1))
    if _is_constant(w):
        walk.makers.append(Place(node, 1, 0))
    return [[given[0], rows, *_windows(node)]]


def _tie_blocks(walk: Walk, axis: Axis, groups: int) -> None:
    if isinstance(axis, ir.Skip):
        return
    blocks = axis.reshape(groups, -1)
    for block in blocks[1:]:
        walk.tie(blocks[0], block)


def _bias(walk: Walk, node: onnx_ir.Node, rows: Axis) -> None:
    bias = _value(node, 2)
    if bias is not None:
        walk.tie(rows, walk.of(bias)[0])


def _slide(walk: Walk, node: onnx_ir.Node) -> None:
    assert node.inputs[0] is not None
    for axis in walk.of(node.inputs[0])[2:]:
        walk.fix(axis, _runs_over(node))


def _windows(node: onnx_ir.Node) -> list[Axis]:
    return [ir.Skip(_runs_over(node)) for _ in dims_of(node.outputs[0])[2:]]


def conv_transpose(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Columns of the weight, which stand first, sum; its second axis makes channels."""
    x, w = node.inputs[0], node.inputs[1]
    if x is None or w is None or integer(node, "group", 1) != 1:
        return None
    columns, rows, *kernel = walk.of(w)
    walk.tie(walk.of(x)[1], columns)
    for axis in kernel:
        walk.fix(axis, _runs_over(node))
    _slide(walk, node)
    _bias(walk, node, rows)
    walk.sums.append(Place(node, 0, 1))
    if _is_constant(w):
        walk.makers.append(Place(node, 1, 1))
    return [[walk.of(x)[0], rows, *_windows(node)]]


def pool(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Windows of one channel."""
    if node.inputs[0] is None or len(node.outputs) > 1:
        return None
    _slide(walk, node)
    return [[*walk.of(node.inputs[0])[:2], *_windows(node)]]


def per_channel(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """BatchNormalization and InstanceNormalization: parameters and statistics of one channel."""
    x, *parameters = (v for v in node.inputs if v is not None)
    if len(node.outputs) > 1:
        return None
    channels: Axis = walk.of(x)[1]
    for value in parameters:
        channels = walk.tie(channels, walk.of(value)[0])
    rest = walk.of(x)[2:]
    if node.op_type == "InstanceNormalization":
        rest = [walk.fix(axis, _runs_over(node)) for axis in rest]
    return [[walk.of(x)[0], channels, *rest]]


def matmul(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """The last axis of a and the last but one of b are summed over; the others meet as elementwise."""
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None or min(len(dims_of(a)), len(dims_of(b))) < 2:
        return None
    walk.tie(walk.of(a)[-1], walk.of(b)[-2])
    outer = _broadcast(walk, (a, b), dims_of(node.outputs[0]), skip=2)
    _product(walk, node, (len(dims_of(a)) - 2, len(dims_of(a)) - 1), (len(dims_of(b)) - 1, len(dims_of(b)) - 2))
    return [[*outer, walk.of(a)[-2], walk.of(b)[-1]]]


def gemm(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """The product of two matrices, each as it is or transposed."""
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return None
    left, right = integer(node, "transA"), integer(node, "transB")
    walk.tie(walk.of(a)[1 - left], walk.of(b)[right])
    made = [walk.of(a)[left], walk.of(b)[1 - right]]
    _product(walk, node, (left, 1 - left), (1 - right, right))
    if (bias := _value(node, 2)) is not None:
        for k, dim in enumerate(reversed(dims_of(bias))):
            if dim != 1:
                made[1 - k] = walk.tie(made[1 - k], walk.of(bias)[-1 - k])
    return [made]


def _product(walk: Walk, node: onnx_ir.Node, a: tuple[int, int], b: tuple[int, int]) -> None:
    """Note where a product sums and what its weights make; a, b: the axis that stays, the one that is summed over."""
    first, second = (_is_constant(v) for v in node.inputs[:2])
    weight, given = ((0, a), (1, b)) if first and not second else ((1, b), (0, a))
    walk.sums.append(Place(node, given[0], given[1][1]))
    if first or second:
        walk.makers.append(Place(node, weight[0], weight[1][0]))


def gather(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Whole rows of a table; its other axes stay what they are."""
    table, indices = node.inputs[0], node.inputs[1]
    if table is None or indices is None:
        return None
    axis = integer(node, "axis") % len(dims_of(table))
    walk.fix(walk.of(table)[axis], _runs_over(node, "reads along it"))
    for index_axis in walk.of(indices):
        walk.fix(index_axis, _runs_over(node, "reads by it"))
    for k in range(len(dims_of(table))):
        if k != axis and _is_constant(table):
            walk.makers.append(Place(node, 0, k))
    places: list[Axis] = [ir.Skip(_runs_over(node, "reads along it")) for _ in dims_of(indices)]
    return [[*walk.of(table)[:axis], *places, *walk.of(table)[axis + 1 :]]]


def softmax(walk: Walk, node: onnx_ir.Node) -> Axes:
    """One axis (all from it on before opset 13) is normalised."""
    x = node.inputs[0]
    assert x is not None
    rank = len(dims_of(x))
    axis = integer(node, "axis", -1 if walk.opset >= 13 else 1) % rank
    last = axis + 1 if walk.opset >= 13 else rank
    why = _runs_over(node)
    return [[walk.fix(a, why) if axis <= k < last else a for k, a in enumerate(walk.of(x))]]


def reduce(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """Axes that are reduced stay whole."""
    x = node.inputs[0]
    assert x is not None
    rank = len(dims_of(x))
    given = (integer(node, "axis"),) if node.op_type.startswith("Arg") else whole_numbers(node, 1, "axes")
    if given is None and _value(node, 1) is not None:
        return None
    every = () if integer(node, "noop_with_empty_axes") else tuple(range(rank))
    gone = {a % rank for a in given or every}
    for k in gone:
        walk.fix(walk.of(x)[k], _runs_over(node))
    kept = integer(node, "keepdims", 1)
    return [[ONE if k in gone else axis for k, axis in enumerate(walk.of(x)) if kept or k not in gone]]


_GATES: Mapping[str, int] = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(walk: Walk, node: onnx_ir.Node) -> Axes | None:
    """A hidden unit is a row of every gate in W, R and both biases, a column of R, and a number of each state."""
    x, w, r = node.inputs[0], node.inputs[1], node.inputs[2]
    if x is None or w is None or r is None or not (_is_constant(w) and _is_constant(r)):
        return None
    gates, why = _GATES[node.op_type], _runs_over(node)
    hidden = walk.of(r)[2]
    if isinstance(hidden, ir.Skip):
        return None
    walk.tie(walk.of(x)[2], walk.of(w)[2])
    walk.tie(np.tile(hidden, gates), walk.of(w)[1])
    walk.tie(np.tile(hidden, gates), walk.of(r)[1])
    for index, copies in ((3, 2 * gates), (7, 3)):
        if (value := _value(node, index)) is not None:
            walk.tie(np.tile(hidden, copies), walk.of(value)[1])
            walk.fix(walk.of(value)[0], why)
    for index in (5, 6):
        if (value := _value(node, index)) is not None:
            walk.tie(hidden, walk.of(value)[-1])
            for axis in walk.of(value)[:-1]:
                walk.fix(axis, why)
    for axis in (*walk.of(x)[:2], walk.of(w)[0], walk.of(r)[0]):
        walk.fix(axis, why)
    walk.sums += [Place(node, 0, 2), Place(node, 2, 2)]
    walk.makers += [Place(node, 1, 1), Place(node, 2, 1)]
    return [[*[ir.Skip(why)] * (len(dims_of(v)) - 1), hidden] if v.shape else [] for v in node.outputs]


_ELEMENTWISE = re.findall(
    r"\w+",
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh Cast CastLike Ceil Celu Clip Cos Cosh Div Dropout Elu Equal "
    "Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less "
    "LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign "
    "Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor",
)

_REDUCE = re.findall(
    r"\w+",
    "ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp "
    "ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare",
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_REDUCE, reduce),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), per_channel),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool", "MaxPool"), pool),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), softmax),
    **dict.fromkeys(_GATES, recurrent),
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "MatMul": matmul,
    "Gemm": gemm,
    "Gather": gather,
    **MOVES,
}
"""By op; what moves numbers and computes nothing stands in `_channels_moves`."""
