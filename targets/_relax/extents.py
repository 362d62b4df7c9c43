"""Shape arithmetic while building: integers that are known but for the open dimensions of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir

from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter

# An array of extents for arrays of extents; None when only the run can tell.
_Rule = Callable[[Emitter, onnx_ir.Node, Sequence[np.ndarray]], np.ndarray | None]


_KINDS = {int(onnx_ir.DataType.INT32): "int32", int(onnx_ir.DataType.INT64): "int64"}


def fold(e: Emitter, node: onnx_ir.Node) -> bool:
    """Compute a node of extents, and say whether that was possible."""
    if node.domain not in ("", "ai.onnx"):
        return False
    is_open = any(v is not None and e.constant(v) is None and e.sizes(v) is not None for v in node.inputs)
    if not is_open:
        return False
    if node.op_type == "Equal":
        return _equal(e, node)
    if node.op_type == "Where":
        return _where(e, node)
    rule = _RULES.get(node.op_type)
    given = [e.sizes(v) for v in node.inputs if v is not None]
    arrays = [array for array in given if array is not None]
    if rule is None or len(arrays) != len(given):
        return False
    result = rule(e, node, arrays)
    if result is None:
        return False
    kind = _KINDS[e.attribute(node, "to", 0)] if node.op_type == "Cast" else e.dtype(_first(node))
    e.set_sizes(node.outputs[0], result, kind)
    return True


def _first(node: onnx_ir.Node) -> onnx_ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _array(items: Sequence[Dim], shape: Sequence[int]) -> np.ndarray:
    """An array of extents; numpy itself would look into expressions."""
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(tuple(shape))


def _ints(array: np.ndarray) -> list[int] | None:
    items = array.reshape(-1).tolist()
    return [int(x) for x in items] if dims.is_static(items) else None


def _elementwise(fn: Callable[[Dim, Dim], Dim | None]) -> _Rule:
    def rule(_e: Emitter, _node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
        a, b = np.broadcast_arrays(*arrays, subok=False)
        items = [fn(x, y) for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)]
        return None if any(x is None for x in items) else _array(items, a.shape)

    return rule


def _quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b where rounding down and rounding towards zero are the same."""
    return dims.divide(a, b) if dims.is_natural(a) and dims.is_natural(b) and not dims.same(b, 0) else None


def _same(_e: Emitter, node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    return arrays[0]


def _cast(e: Emitter, node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    return arrays[0] if e.attribute(node, "to", 0) in _KINDS else None


def _squeeze(_e: Emitter, _node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    axes = _ints(arrays[1]) if len(arrays) > 1 else None
    return np.squeeze(arrays[0], None if axes is None else tuple(axes))


def _unsqueeze(_e: Emitter, _node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    axes = _ints(arrays[1])
    return None if axes is None else np.expand_dims(arrays[0], tuple(axes))


def _reshape(_e: Emitter, _node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    shape = _ints(arrays[1])
    return None if shape is None else arrays[0].reshape(shape)


def _gather(e: Emitter, node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    indices = _ints(arrays[1])
    if indices is None:
        return None
    if arrays[0].ndim != 1:
        return None
    return _array([arrays[0][k] for k in indices], arrays[1].shape)


def _concat(e: Emitter, node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    return np.concatenate(arrays, e.attribute(node, "axis", 0))


def _slice(_e: Emitter, _node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    data, *rest = arrays
    words = [_ints(a) for a in rest]
    if data.ndim != 1 or any(w is None for w in words):
        return None
    start, end, *more = [w[0] for w in words if w is not None]
    step = more[1] if len(more) > 1 else 1
    return data[start : None if step < 0 and end < -(2**31) else end : step]


def _product(e: Emitter, node: onnx_ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    if arrays[0].ndim != 1:
        return None
    return _array([dims.product(arrays[0].tolist())], (1,) if e.attribute(node, "keepdims", 1) else ())


def _equal(e: Emitter, node: onnx_ir.Node) -> bool:
    """Whether extents are equal, where that is the same for every size."""
    given = [e.sizes(v) for v in node.inputs]
    if any(a is None for a in given):
        return False
    a, b = np.broadcast_arrays(*[x for x in given if x is not None])
    items = []
    for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True):
        if not (dims.same(x, y) or _differ(x, y)):
            return False
        items.append(dims.same(x, y))
    e.set_constant(node.outputs[0], np.array(items, bool).reshape(a.shape))
    return True


def _differ(a: Dim, b: Dim) -> bool:
    """Whether two extents are different for every size: a size is never negative or 0."""
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    number, other = (a, b) if isinstance(a, int) else (b, a)
    return isinstance(number, int) and number <= 0 and dims.is_natural(other)


def _where(e: Emitter, node: onnx_ir.Node) -> bool:
    condition, a, b = e.constant(node.inputs[0]), e.sizes(node.inputs[1]), e.sizes(node.inputs[2])
    if condition is None or a is None or b is None:
        return False
    condition, a, b = np.broadcast_arrays(condition, a, b)
    items = [x if c else y for c, x, y in zip(condition.reshape(-1), a.reshape(-1), b.reshape(-1), strict=True)]
    picked = node.inputs[1]
    assert picked is not None
    e.set_sizes(node.outputs[0], _array(items, a.shape), e.dtype(picked))
    return True


_RULES: dict[str, _Rule] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _elementwise(_quotient),
    "Gather": _gather,
    "Identity": _same,
    "Mul": _elementwise(lambda a, b: a * b),
    "ReduceProd": _product,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _elementwise(lambda a, b: a - b),
    "Unsqueeze": _unsqueeze,
}
