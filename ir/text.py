"""The compact text form of a model: one node a line, stable, for people, golden tests and diffs.

    ir 10, opset 21, mc_opt 1
    g(x: f32[N,8]) -> (y: f32[N,4])
      w.codes: u8[16] #5feceb66ffc8
      w.codebook: f32[16] #d4735e3a265e
      w = mc_opt.Lookup(w.codes, w.codebook) {bits=4, shape=[8, 4]}
      y = MatMul(x, w)

Attributes are sorted; those of our ops that have their default value are left out, and so are the
functions of our domain, which the ops imply.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir

from mc_opt.ir.op import DOMAIN, find_op, is_ours, op_names

_DIGITS = 12


def to_text(model: onnx_ir.Model) -> str:
    """The whole model, with a line end after the last line."""
    imports = ", ".join(f"{domain or 'opset'} {version}" for domain, version in sorted(model.opset_imports.items()))
    lines = [f"ir {model.ir_version}, {imports}", *_graph(model.graph, "")]
    for identifier in sorted(model.functions):
        if identifier[0] != DOMAIN:
            lines += _function(model.functions[identifier])
    return "\n".join(lines) + "\n"


def nodes_text(graph: onnx_ir.Graph) -> str:
    """The nodes of a graph alone, without its inputs, outputs and weights."""
    return "\n".join(line for node in graph for line in _node(node, "")) + "\n"


def type_text(value: onnx_ir.Value) -> str:
    """`f32[N,8]`; `?` for what is not known."""
    kind = value.type
    if kind is None:
        return "?" + _shape(value.shape)
    if isinstance(kind, onnx_ir.TensorType):
        return _dtype(kind.dtype) + _shape(value.shape)
    return str(kind)


def digest(tensor: onnx_ir.TensorProtocol) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a tensor's bytes."""
    if tensor.dtype == onnx_ir.DataType.STRING:
        data = b"\0".join(bytes(s) for s in tensor.numpy().reshape(-1))  # the offsets of ONNX strings are not data
        return hashlib.sha256(data).hexdigest()[:_DIGITS]
    if tensor.dtype.bitwidth < 8:
        return hashlib.sha256(tensor.tobytes()).hexdigest()[:_DIGITS]
    # The bytes are hashed where they are: a memory-mapped tensor is read page by page, not copied.
    array = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return hashlib.sha256(array.data).hexdigest()[:_DIGITS]


def tensor_text(tensor: onnx_ir.TensorProtocol) -> str:
    """Type and digest: `f32[8,4] #5feceb66ffc8`."""
    return f"{_dtype(tensor.dtype)}{_shape(tensor.shape)} #{digest(tensor)}"


def _dtype(dtype: onnx_ir.DataType) -> str:
    try:
        return dtype.short_name()
    except TypeError:
        return dtype.name.lower()


def _shape(shape: Iterable[Any] | None) -> str:
    if shape is None:
        return "[*]"
    return "[" + ",".join(_dim(d) for d in shape) + "]"


def _dim(dim: Any) -> str:
    value = getattr(dim, "value", dim)
    return "?" if value is None else str(value)


def _typed(values: Iterable[onnx_ir.Value]) -> str:
    return ", ".join(f"{v.name}: {type_text(v)}" for v in values)


def _names(values: Iterable[onnx_ir.Value | None]) -> str:
    return ", ".join((v.name or "_") if v is not None else "_" for v in values)


def _graph(graph: onnx_ir.Graph, indent: str) -> Iterator[str]:
    yield f"{indent}{graph.name or 'graph'}({_typed(graph.inputs)}) -> ({_typed(graph.outputs)})"
    for name, value in graph.initializers.items():
        yield f"{indent}  {name}: {tensor_text(value.const_value) if value.const_value is not None else '?'}"
    for node in graph:
        yield from _node(node, indent + "  ")


def _function(function: onnx_ir.Function) -> Iterator[str]:
    overload = f":{function.overload}" if function.overload else ""
    attributes = f" {{{', '.join(sorted(function.attributes))}}}" if function.attributes else ""
    title = f"{function.domain}.{function.name}{overload}"
    yield f"{title}({_names(function.inputs)}) -> ({_names(function.outputs)}){attributes}"
    for node in function:
        yield from _node(node, "  ")


def _node(node: onnx_ir.Node, indent: str) -> Iterator[str]:
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
    attributes = [a for _, a in sorted(node.attributes.items()) if not is_implied(node, a)]
    plain = [f"{a.name}={attribute_text(a)}" for a in attributes if not _graphs(a)]
    shown = f" {{{', '.join(plain)}}}" if plain else ""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    outputs = list(node.outputs)
    while len(outputs) > 1 and not outputs[-1].name:
        outputs.pop()
    yield f"{indent}{_names(outputs)} = {domain}{node.op_type}({_names(inputs)}){shown}"
    for attribute in attributes:
        for i, graph in enumerate(_graphs(attribute)):
            yield f"{indent}  {attribute.name}{f'.{i}' if i else ''}:"
            yield from _graph(graph, indent + "    ")


def is_implied(node: onnx_ir.Node, attribute: onnx_ir.Attr) -> bool:
    """Whether an attribute of one of our ops has its default value."""
    if not is_ours(node) or node.op_type not in op_names() or attribute.is_ref():
        return False
    spec = find_op(node.op_type).attributes.get(attribute.name)
    return spec is not None and spec.default is not None and spec.default == attribute.value


def _graphs(attribute: onnx_ir.Attr) -> list[onnx_ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type == onnx_ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == onnx_ir.AttributeType.GRAPHS:
        return list(attribute.as_graphs())
    return []


def attribute_text(attribute: onnx_ir.Attr) -> str:
    """The value of an attribute that holds no graph; tensors as type and digest."""
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    match attribute.type:
        case onnx_ir.AttributeType.TENSOR:
            return tensor_text(attribute.as_tensor())
        case onnx_ir.AttributeType.TENSORS:
            return "[" + ", ".join(tensor_text(t) for t in attribute.as_tensors()) + "]"
        case onnx_ir.AttributeType.FLOAT:
            return _float(attribute.as_float())
        case onnx_ir.AttributeType.FLOATS:
            return "[" + ", ".join(_float(v) for v in attribute.as_floats()) + "]"
        case onnx_ir.AttributeType.STRING:
            return f'"{attribute.as_string()}"'
        case onnx_ir.AttributeType.INTS:
            return str(list(attribute.as_ints()))
        case onnx_ir.AttributeType.STRINGS:
            return "[" + ", ".join(f'"{v}"' for v in attribute.as_strings()) + "]"
        case _:
            return str(attribute.value)


def _float(value: float) -> str:
    """The shortest text that gives the same float32, which is what an ONNX attribute holds."""
    return str(np.float32(value))
