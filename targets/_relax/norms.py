"""Normalisations of rows that a model spells out, as one node each: five kernels of a row become one.

    y = x · 1 / √(mean x² + ε) · scale,   and with x = a + b the sum too, which the next layer adds to
    y = (x - mean x) / √(mean (x - mean x)² + ε) · scale + bias

A framework's module is exported as the ops that it computes. Of ONNX's function RMSNormalization and of ONNX Runtime's
SkipSimplifiedLayerNormalization, which adds first, kernels take a row at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir
from onnx_ir import convenience

SKIP = ("com.microsoft", "SkipSimplifiedLayerNormalization")


def recognise(model: onnx_ir.Model) -> None:
    """Replace what makes up a normalisation and is read by nothing else; the sums before them where there are any."""
    for last in list(model.graph):
        found = _normalised(last)
        if found is None:
            _shift(model, last)
            continue
        x, scale, epsilon = found
        attributes = [onnx_ir.AttrFloat32("epsilon", epsilon)]
        y, old = _renamed(last.outputs[0]), _behind(last, x)
        added = x.producer()
        # A node that holds the scale may come after the sum.
        if added is not None and _is_sum_of_two(added) and scale.producer() is None:
            total = _renamed(x)
            inputs, outputs = [*added.inputs, scale], [y, *(_nothing(y, k) for k in range(2)), total]
            made = onnx_ir.Node(*SKIP, inputs, attributes, outputs=outputs, name=last.name)
            model.graph.insert_before(added, made)
            x.replace_all_uses_with(total, replace_graph_outputs=True)
            old.append(added)
        else:
            attributes.append(onnx_ir.AttrInt64("axis", -1))
            made = onnx_ir.Node("", "RMSNormalization", [x, scale], attributes, outputs=[y], name=last.name)
            centred = _centred(x, [*old, made])
            if centred is not None:
                made.op_type = "LayerNormalization"
                made.replace_input_with(0, centred[0])
                old += centred[1]
            model.graph.insert_before(last, made)
        last.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)
        model.graph.remove(old, safe=True)


def _centred(x: onnx_ir.Value, users: list[onnx_ir.Node]) -> tuple[onnx_ir.Value, list[onnx_ir.Node]] | None:
    """(z, the nodes that take its mean off), when x is z - mean z over the last axis and read by `users` alone."""
    less = x.producer()
    if less is None or less.op_type != "Sub" or less.domain or x.is_graph_output() or x.shape is None:
        return None
    z, mean = less.inputs[0], _made_by(less.inputs[1], "ReduceMean")
    if z is None or mean is None or mean.inputs[0] is not z or not _is_over_last_axis(mean, x.shape.rank()):
        return None
    is_read = any(use.node not in users for use in x.uses())
    return None if is_read else (z, [less, mean])


def _shift(model: onnx_ir.Model, last: onnx_ir.Node) -> None:
    """Let a normalisation without a bias add the constant row that a node behind it adds."""
    for bias, value in _either_way(last, "Add"):
        made = _made_by(value, "LayerNormalization")
        if made is None or len(made.inputs) > 2 or not _is_constant(bias):
            continue
        if value is not made.outputs[0] or any(v.uses() or v.is_graph_output() for v in made.outputs[1:]):
            continue
        x, scale = made.inputs
        if scale is None or scale.shape is None or bias.shape != scale.shape or scale.shape.rank() != 1:
            continue
        y = _renamed(last.outputs[0])
        attributes = made.attributes.values()
        whole = onnx_ir.Node("", made.op_type, [x, scale, bias], attributes, outputs=[y], name=last.name)
        model.graph.insert_before(last, whole)
        last.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)
        model.graph.remove([last, made], safe=True)
        return


def _normalised(last: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value, float] | None:
    """(x, scale, ε) of the normalisation that ends with this node."""
    for scale, product in _either_way(last, "Mul"):
        if scale.shape is None or scale.shape.rank() != 1 or not _is_constant(scale):
            continue
        for x, square in _over_roots(product):
            epsilon = _epsilon(square, x)
            if epsilon is not None and x.shape is not None and x.shape[-1:] == scale.shape[:]:
                return x, scale, epsilon
    return None


def _over_roots(product: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Value, onnx_ir.Value]]:
    """(x, s) of x / √s in every way of writing it that exporters have."""
    divided = _made_by(product, "Div")
    if divided is not None and divided.inputs[0] is not None:
        yield from ((divided.inputs[0], s) for s in _under_root(divided.inputs[1]))
    for x, factor in _either_way(_made_by(product, "Mul"), "Mul"):
        reciprocal, quotient, power = (_made_by(factor, kind) for kind in ("Reciprocal", "Div", "Pow"))
        if reciprocal is not None:
            yield from ((x, s) for s in _under_root(reciprocal.inputs[0]))
        if quotient is not None and _number(quotient.inputs[0]) == 1:
            yield from ((x, s) for s in _under_root(quotient.inputs[1]))
        if power is not None and power.inputs[0] is not None and _number(power.inputs[1]) == -0.5:
            yield x, power.inputs[0]


def _under_root(value: onnx_ir.Value | None) -> Iterator[onnx_ir.Value]:
    root = _made_by(value, "Sqrt")
    if root is not None and root.inputs[0] is not None:
        yield root.inputs[0]


def _epsilon(square: onnx_ir.Value, x: onnx_ir.Value) -> float | None:
    """ε, when `square` is mean x² + ε over the last axis."""
    for epsilon, mean in _either_way(_made_by(square, "Add"), "Add"):
        number, node = _number(epsilon), _made_by(mean, "ReduceMean")
        if number is None or node is None or x.shape is None or not _is_over_last_axis(node, x.shape.rank()):
            continue
        power, product = (_made_by(node.inputs[0], kind) for kind in ("Pow", "Mul"))
        if power is not None and power.inputs[0] is x and _number(power.inputs[1]) == 2:
            return number
        if product is not None and product.inputs[0] is x and product.inputs[1] is x:
            return number
    return None


def _is_over_last_axis(node: onnx_ir.Node, rank: int) -> bool:
    """Whether a ReduceMean takes rows of a value of this rank, and keeps the axis."""
    keeps, given = node.attributes.get("keepdims"), node.attributes.get("axes")
    if keeps is not None and keeps.as_int() != 1:
        return False
    axes = None if given is None else list(given.as_ints())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        held = convenience.get_const_tensor(node.inputs[1])
        axes = None if held is None else held.numpy().reshape(-1).tolist()
    return axes in ([-1], [rank - 1])


def _is_sum_of_two(node: onnx_ir.Node) -> bool:
    """Whether it adds values that are both computed; their sizes may be known only when kernels are made."""
    values = [v for v in node.inputs if v is not None and v.shape is not None and not _is_constant(v)]
    total = node.outputs[0]
    is_sum = node.op_type == "Add" and not node.domain and not total.is_graph_output()
    return (
        is_sum
        and total.dtype == onnx_ir.DataType.FLOAT
        and len(values) == 2
        and len({len(v.shape or ()) for v in values}) == 1
    )


def _either_way(node: onnx_ir.Node | None, kind: str) -> Iterator[tuple[onnx_ir.Value, onnx_ir.Value]]:
    """The operands of a node of two, in both orders."""
    if node is None or node.op_type != kind or node.domain:
        return
    a, b = node.inputs
    if a is not None and b is not None:
        yield a, b
        yield b, a


def _made_by(value: onnx_ir.Value | None, kind: str) -> onnx_ir.Node | None:
    """The node of this kind that makes a value for nobody but its one reader."""
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return None
    node = value.producer()
    return node if node is not None and not node.domain and node.op_type == kind else None


def _behind(last: onnx_ir.Node, x: onnx_ir.Value) -> list[onnx_ir.Node]:
    """The nodes between x and the last, which only they read; the last first."""
    found, waiting = [], [last]
    while waiting:
        node = waiting.pop()
        found.append(node)
        inputs = (v for v in node.inputs if v is not None and v is not x and not _is_constant(v))
        waiting += [maker for v in inputs if (maker := v.producer()) is not None]
    return found


def _is_constant(value: onnx_ir.Value) -> bool:
    return convenience.get_const_tensor(value) is not None


def _number(value: onnx_ir.Value | None) -> float | None:
    """The one number of a constant."""
    held = None if value is None else convenience.get_const_tensor(value)
    return float(held.numpy().reshape(())) if held is not None and held.size == 1 else None


def _renamed(value: onnx_ir.Value) -> onnx_ir.Value:
    """A value to stand for another, by its name."""
    return onnx_ir.Value(name=value.name, shape=value.shape, type=value.type)


def _nothing(value: onnx_ir.Value, number: int) -> onnx_ir.Value:
    """An output that nobody asks for."""
    return onnx_ir.Value(name=f"{value.name}.unused{number}")
