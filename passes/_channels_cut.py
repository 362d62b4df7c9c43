"""Remove channels: slice every constant along the axes where they are, and fix shapes and attributes."""

from __future__ import annotations

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context
from mc_opt.passes._channels import STAYS, Channels
from mc_opt.passes._channels_axes import array_type, dims_of, integer, whole_numbers

# Where ops state sizes of their results, by the index of the input.
_SIZES = {"Reshape": 1, "Expand": 1, "Resize": 3}


def cut(model: onnx_ir.Model, channels: Channels, removed: np.ndarray, ctx: Context, *, rule: str) -> None:
    """Remove units in place.

    Args:
        model: the one that `channels` were found in, unchanged since.
        channels: its units.
        removed: bool [count], whether a unit goes.
        ctx: reads and keeps the constants.
        rule: what the history says of what changed.
    """
    changed: set[onnx_ir.Value] = set()
    for value, axes in channels.units.items():
        kept = {k: _kept(units, removed) for k, units in enumerate(axes) if units is not None}
        kept = {k: places for k, places in kept.items() if len(places) < _dim(value, k)}
        if kept:
            changed.add(value)
            _shrink(value, kept, ctx, rule)
    for node in list(model.graph):
        if any(value in changed for value in (*node.inputs, *node.outputs)):
            ctx.did(rule, node)
            _settle(node, channels, removed, changed)


def _kept(units: np.ndarray, removed: np.ndarray) -> np.ndarray:
    places: np.ndarray = np.flatnonzero((units == STAYS) | ~removed[units])
    return places


def _dim(value: onnx_ir.Value, axis: int) -> int:
    dim = dims_of(value)[axis]
    assert isinstance(dim, int)
    return dim


def _shrink(value: onnx_ir.Value, kept: dict[int, np.ndarray], ctx: Context, rule: str) -> None:
    dims = [len(kept[k]) if k in kept else dim for k, dim in enumerate(dims_of(value))]
    tensor = array_type(value)
    if tensor is not None:
        array = tensor.numpy()
        for k, places in kept.items():
            array = np.take(array, places, axis=k)
        ctx.did(rule, value)
        held = ctx.keep(np.ascontiguousarray(array), str(value.name))
        value.const_value = held
        producer = value.producer()
        if producer is not None:
            name = next(iter(producer.attributes))
            producer.attributes.pop(name)
            producer.attributes["value"] = onnx_ir.AttrTensor("value", held)
    value.shape = onnx_ir.Shape(dims)


def _settle(node: onnx_ir.Node, channels: Channels, removed: np.ndarray, changed: set[onnx_ir.Value]) -> None:
    """Make what a node says in attributes and constant sizes agree with its new shapes."""
    match node.op_type:
        case "Conv" if integer(node, "group", 1) > 1 and _dim(_input(node, 1), 1) == 1:
            _set(node, "group", _dim(_input(node, 0), 1))
        case "LSTM" | "GRU" | "RNN":
            _set(node, "hidden_size", _dim(_input(node, 2), 2))
        case "Split":
            _resplit(node, changed)
        case "Reshape" | "Expand" | "Resize":
            _resize(node, changed)


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _set(node: onnx_ir.Node, name: str, value: int) -> None:
    node.attributes[name] = onnx_ir.AttrInt64(name, value)


def _resplit(node: onnx_ir.Node, changed: set[onnx_ir.Value]) -> None:
    axis = integer(node, "axis") % len(dims_of(node.outputs[0]))
    if not any(value in changed for value in node.outputs):
        return
    sizes = [_dim(value, axis) for value in node.outputs]
    if "split" in node.attributes:
        node.attributes["split"] = onnx_ir.AttrInt64s("split", sizes)
        return
    node.attributes.pop("num_outputs", None)
    _put_constant(node, 1, sizes)


def _resize(node: onnx_ir.Node, changed: set[onnx_ir.Value]) -> None:
    index = _SIZES[node.op_type]
    sizes = whole_numbers(node, index)
    if sizes is None or node.outputs[0] not in changed:
        return
    dims = dims_of(node.outputs[0])
    own = dims[len(dims) - len(sizes) :]
    numbers = []
    for old, dim in zip(sizes, own, strict=True):
        # 0 and -1 stand for what they say; where an Expand says 1, its input says the size.
        stays = old <= 0 or (old == 1 and node.op_type == "Expand")
        numbers.append(int(dim) if isinstance(dim, int) and not stays else old)
    _put_constant(node, index, numbers)


def _put_constant(node: onnx_ir.Node, index: int, numbers: list[int]) -> None:
    """Give a node a constant list of its own; the old one goes when nothing else uses it."""
    graph = node.graph
    assert isinstance(graph, onnx_ir.Graph)
    old = node.inputs[index] if index < len(node.inputs) else None
    base = f"{node.outputs[0].name}.sizes" if old is None else str(old.name)
    new = ir.initializer(graph, base, np.array(numbers, np.int64))
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, new)
    if old is None or old.uses() or old.is_graph_output():
        return
    producer = old.producer()
    if producer is not None:
        graph.remove(producer, safe=True)
    elif str(old.name) in graph.initializers:
        graph.initializers.pop(str(old.name))
