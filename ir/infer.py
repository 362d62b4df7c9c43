"""Types and shapes of a few new nodes, from those of their inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx
import onnx.checker
import onnx.shape_inference
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.io.shapes import describe
from mc_opt.ir.op import find_op, is_ours, where

# Shape inference reads axes, sizes and shapes, never a weight.
_SMALL = 1024
_NOISE = re.compile(r"\[\w+Error\]|\(op_type:[^)]*\):?|Inference error\(s\):")


def infer_types(nodes: Sequence[onnx_ir.Node], model: onnx_ir.Model) -> None:
    """Give the outputs of the nodes, in topological order, the types and shapes that they lack.

    Raises:
        IRError: when an op refuses its inputs.
    """
    for node in nodes:
        if all(o.type is not None and o.shape is not None for o in node.outputs):
            continue
        found = _ours(node) if is_ours(node) else _standard(node, model)
        for output, (tensor_type, shape) in zip(node.outputs, found, strict=True):
            output.type = output.type or tensor_type
            output.shape = output.shape if output.shape is not None else shape


Found = tuple[onnx_ir.TypeProtocol | None, onnx_ir.Shape | None]


def _ours(node: onnx_ir.Node) -> list[Found]:
    return [(onnx_ir.TensorType(dtype), shape) for dtype, shape in find_op(node.op_type).types(node)]


def misfit(node: onnx_ir.Node, model: onnx_ir.Model) -> str | None:
    """Why a standard op refuses the types and shapes of its inputs, with these; None if it takes them."""
    try:
        _infer(node, model)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        takes = ", ".join(f"{v.name} {describe(v)}" for v in node.inputs if v is not None)
        return f"{where(node)}: takes {takes or 'nothing'}: {_reason(error)}"
    return None


def _reason(error: Exception) -> str:
    """What onnx says, without the kinds of errors and the node, which it repeats at every level."""
    text = _NOISE.sub("", " ".join(str(error).split())).strip(" :")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _standard(node: onnx_ir.Node, model: onnx_ir.Model) -> list[Found]:
    try:
        return _infer(node, model)
    except onnx.shape_inference.InferenceError as error:
        raise IRError(f"{where(node)} does not fit its inputs: {error}; correct the rule that made it") from error


def _infer(node: onnx_ir.Node, model: onnx_ir.Model) -> list[Found]:
    version = model.opset_imports.get(node.domain)
    if version is None or not onnx.defs.has(node.op_type, version, node.domain):
        return [(None, None)] * len(node.outputs)
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None or value.name is None or value.type is None:
            continue
        types[value.name] = onnx_ir.serde.serialize_value(value).type
        if value.const_value is not None and value.const_value.nbytes <= _SMALL:
            data[value.name] = onnx_ir.serde.serialize_tensor(value.const_value)
    imports = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    made = onnx.shape_inference.infer_node_outputs(
        schema, onnx_ir.serde.serialize_node(node), types, data, opset_imports=imports
    )
    return [_read(made.get(o.name or "")) for o in node.outputs]


def _read(proto: onnx.TypeProto | None) -> Found:
    if proto is None:
        return None, None
    return onnx_ir.serde.deserialize_type_proto_for_type(proto), onnx_ir.serde.deserialize_type_proto_for_shape(proto)
