"""What a training loss asks of a graph: which outputs are scores of classes, which inner values two models share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir

from mc_opt import ir

Meaning = Literal["logits", "probabilities", "log-probabilities", "values"]

# What makes scores, and the axis that counts the classes.
_LINEAR = {"Conv": 1, "ConvTranspose": 1, "SeKronConv": 1, "Gemm": -1, "MatMul": -1, "KronLinear": -1}
_COPIES = ("Identity", "Cast", "Dropout")
_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_AFFINE = ("Add", "Sub", "Mul", "Div")
_POOLS = ("GlobalAveragePool", "AveragePool")
_NO_ACTIVATION = (*_COPIES, *_RESHAPES, *_POOLS, "Add", "Concat", "Conv", "Gemm", "MatMul", "MaxPool", "Pad", "Sum")
_LAYER_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization")


@dataclass(frozen=True)
class Reading:
    """What a value holds, and the axis along which a row of it lies."""

    meaning: Meaning
    axis: int


def is_float(value: onnx_ir.Value) -> bool:
    """Whether a value is floating point, as far as the graph says."""
    return value.dtype is None or value.dtype.is_floating_point()


def sizes(value: onnx_ir.Value) -> tuple[int | None, ...] | None:
    """A value's shape with None for open dimensions; None when even the rank is open."""
    return None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)


def may_equal(a: tuple[int | None, ...] | None, b: tuple[int | None, ...] | None) -> bool:
    """Whether two shapes can be the same: of one rank, and equal where both are fixed."""
    if a is None or b is None:
        return True
    return len(a) == len(b) and all(x is None or y is None or x == y for x, y in zip(a, b, strict=True))


# ---- outputs


def reading(value: onnx_ir.Value) -> Reading:
    """What an output holds (our rule).

    Logits come from a linear layer with at least two results a row, through nothing but affine maps by constants,
    means over positions and moves; probabilities from a Softmax, through moves. What passes any other function, as
    Sigmoid, Relu or a normalisation to length 1, is plain values, whose rows lie along the last axis (axis 1 of
    convolution maps).
    """
    shape = sizes(value)
    found = _reading(value)
    if found is None or shape is None or shape[found.axis] in (0, 1):
        return Reading("values", 1 if shape is not None and len(shape) == 4 else -1)
    return found


def _reading(value: onnx_ir.Value) -> Reading | None:
    node, shape = value.producer(), sizes(value)
    source = node.inputs[0] if node is not None and node.inputs else None
    if node is None or source is None or not shape:
        return None
    match node.op_type:
        case "Softmax" | "LogSoftmax":
            meaning: Meaning = "probabilities" if node.op_type == "Softmax" else "log-probabilities"
            return Reading(meaning, _integer(node, "axis", -1) % len(shape))
        case "Log":
            inner = _reading(source)
            return Reading("log-probabilities", inner.axis) if inner and inner.meaning == "probabilities" else None
        case linear if linear in _LINEAR:
            return Reading("logits", _LINEAR[linear] % len(shape)) if len(shape) > 1 else None
        case copy if copy in _COPIES:
            return _reading(source)
        case "Transpose" | "Flatten" | "Reshape" | "Squeeze" | "Unsqueeze":
            return _moved(node, source, shape)
        case "Div" if (axis := _softmax_axis(node)) is not None:
            return Reading("probabilities", axis)
        case "Add" | "Sub" | "Mul" | "Div" | "BatchNormalization" | "GlobalAveragePool" | "AveragePool" | "ReduceMean":
            return _mapped(node, shape)
    return None


def _softmax_axis(node: onnx_ir.Node) -> int | None:
    """The axis of a softmax that is written out, as exp(x) / Σ exp(x); None when it is none."""
    exponential, total = node.inputs[0], node.inputs[1]
    shape = sizes(exponential) if exponential is not None else None
    while total is not None and (maker := total.producer()) is not None and maker.op_type in (*_RESHAPES, "Expand"):
        total = maker.inputs[0]
    summed = total.producer() if total is not None else None
    if _maker(node, 0) != "Exp" or summed is None or summed.op_type != "ReduceSum" or not shape:
        return None
    axes = _reduced_axes(summed, len(shape))
    return axes.pop() if summed.inputs[0] is exponential and len(axes) == 1 else None


def _moved(node: onnx_ir.Node, source: onnx_ir.Value, shape: tuple[int | None, ...]) -> Reading | None:
    """The reading behind a Transpose or a reshape: where its axis went, if it is still an axis of its own."""
    inner, before = _reading(source), sizes(source)
    if inner is None or before is None:
        return None
    if node.op_type == "Transpose":
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(shape))[::-1]
        return Reading(inner.meaning, list(order).index(inner.axis))
    place = (before[inner.axis], _product(before[inner.axis + 1 :]))
    found = [i for i, size in enumerate(shape) if (size, _product(shape[i + 1 :])) == place and None not in place]
    return Reading(inner.meaning, found[0]) if found else None


def _mapped(node: onnx_ir.Node, shape: tuple[int | None, ...]) -> Reading | None:
    """The reading behind an affine map or a mean over positions, which leave logits logits."""
    computed = [v for v in node.inputs if v is not None and not _is_constant(v)]
    inner = _reading(computed[0]) if len(computed) == 1 else None
    if inner is None or inner.meaning != "logits":
        return None
    if node.op_type in _AFFINE:
        before = sizes(computed[0])
        return inner if before is not None and len(before) == len(shape) else None
    if node.op_type in (*_POOLS, "BatchNormalization"):
        return inner if inner.axis == 1 else None
    axes = _reduced_axes(node, len(sizes(computed[0]) or ()))
    if inner.axis in axes:
        return None
    kept = _integer(node, "keepdims", 1)
    return inner if kept else Reading("logits", inner.axis - sum(a < inner.axis for a in axes))


def _reduced_axes(node: onnx_ir.Node, rank: int) -> set[int]:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = onnx_ir.convenience.get_const_tensor(given) if given is not None else None
    if tensor is not None:
        return {int(a) % rank for a in tensor.numpy().reshape(-1)}
    if "axes" in node.attributes:
        return {a % rank for a in node.attributes["axes"].as_ints()}
    return set(range(rank))


def _product(shape: tuple[int | None, ...]) -> int | None:
    known = [d for d in shape if d is not None]
    return math.prod(known) if len(known) == len(shape) else None


def _is_constant(value: onnx_ir.Value) -> bool:
    return onnx_ir.convenience.get_const_tensor(value) is not None and not value.is_graph_input()


def _integer(node: onnx_ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


# ---- inner values


def attention_scores(model: onnx_ir.Model) -> dict[str, int]:
    """The scores that each attention takes the Softmax of, by name in graph order, and the axis it is taken along."""
    found: dict[str, int] = {}
    for node in model.graph:
        scores = node.inputs[0] if _is_attention(node) else None
        if scores is not None and scores.producer() is not None and scores.name:
            found[scores.name] = _integer(node, "axis", -1)
    return found


def _is_attention(node: onnx_ir.Node) -> bool:
    """Whether a node is a Softmax whose result, moved at most, goes into a product."""
    if node.op_type != "Softmax":
        return False
    stack = [node]
    while stack:
        for user in (use.node for value in stack.pop().outputs for use in value.uses()):
            if user.op_type in ("MatMul", "Einsum"):
                return True
            if user.op_type in (*_COPIES, *_RESHAPES, "Transpose"):
                stack.append(user)
    return False


def telling_values(model: onnx_ir.Model) -> tuple[str, ...]:
    """The inner values that tell most about a model (our choice, after KroneckerBERT, arXiv 2109.06243, section 3).

    Attention scores before the Softmax, what is read from embedding tables, and the last normalisation of each block:
    of LayerNormalization the last one before each attention and at the end (all, without attention), of
    BatchNormalization those without an activation behind them, as at the end of a residual block, or else the last
    one in a row of equal shapes. A model without attention and normalisation has the outputs of all layers with
    weights instead.
    """
    scores = tuple(attention_scores(model))
    norms = (*_layer_norms(model), *_batch_norms(model))
    if not scores and not norms:
        return tuple(dict.fromkeys(_layer_outputs(model)))
    tables = (name for name in _layer_outputs(model, "Gather"))
    return tuple(dict.fromkeys((*tables, *scores, *norms)))


def _layer_outputs(model: onnx_ir.Model, op_type: str = "") -> Iterator[str]:
    for site in ir.weight_sites(model):
        if not isinstance(site, ir.WeightSite):
            continue
        for node, _ in site.consumers:
            value = node.outputs[0]
            inner = node.graph is model.graph and not value.is_graph_output()
            if value.name and inner and op_type in ("", node.op_type):
                yield value.name


def _layer_norms(model: onnx_ir.Model) -> Iterator[str]:
    attention = any(_is_attention(node) for node in model.graph)
    last = ""
    for node in model.graph:
        if _is_attention(node) and last:
            yield last
            last = ""
        value = _normalised(node)
        if value is not None and value.name:
            if not attention:
                yield value.name
            last = value.name
    if attention and last:
        yield last


def _normalised(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """What a LayerNormalization gives, as one op or as (x - mean) / sqrt(variance + e) · scale + bias."""
    if node.op_type in _LAYER_NORMS:
        return node.outputs[0]
    if node.op_type != "Div" or _maker(node, 1) != "Sqrt" or _maker(node, 0) != "Sub":
        return None
    centred = node.inputs[0].producer() if node.inputs[0] is not None else None
    if centred is None or _maker(centred, 1) != "ReduceMean":
        return None
    value = node.outputs[0]
    for op_type in ("Mul", "Add"):
        users = [use.node for use in value.uses()]
        if len(users) == 1 and users[0].op_type == op_type and any(v and _is_constant(v) for v in users[0].inputs):
            value = users[0].outputs[0]
    return value


def _maker(node: onnx_ir.Node, index: int) -> str:
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    return producer.op_type if producer is not None else ""


def _batch_norms(model: onnx_ir.Model) -> Iterator[str]:
    values = [node.outputs[0] for node in model.graph if node.op_type == "BatchNormalization"]
    ends = [v for v in values if v.name and v.uses() and all(use.node.op_type in _NO_ACTIVATION for use in v.uses())]
    for index, value in enumerate(values):
        last = value is values[-1] or sizes(value) is None or sizes(value) != sizes(values[index + 1])
        if value.name and (value in ends if ends else last):
            yield value.name


def shared_values(model: onnx_ir.Model, reference: onnx_ir.Model) -> tuple[str, ...]:
    """The names of the computed float values that two models have in the same shape, in the reference's order."""
    ours = _computed(model)
    return tuple(
        name
        for name, value in _computed(reference).items()
        if name in ours and is_float(value) and is_float(ours[name]) and may_equal(sizes(value), sizes(ours[name]))
    )


def _computed(model: onnx_ir.Model) -> Mapping[str, onnx_ir.Value]:
    """Values that follow from the inputs: a weight that a form computes is no value of the model."""
    from_inputs = set(model.graph.inputs)
    found: dict[str, onnx_ir.Value] = {}
    for node in model.graph:
        if any(v in from_inputs for v in node.inputs) or next(ir.subgraphs(node), None) is not None:
            from_inputs.update(node.outputs)
            found.update((o.name, o) for o in node.outputs if o.name)
    return found
