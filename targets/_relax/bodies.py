"""Standard ops without a kernel that other ops make up: they run as ONNX's own body, or as one that is given here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import onnx
import onnx_ir
from onnx_ir.passes.common import InlinePass

_STANDARD = ("", "ai.onnx")


def expand(model: onnx_ir.Model, kernels: Collection[tuple[str, str]]) -> list[str]:
    """Replace nodes without a kernel by the bodies of their ops, where there are bodies; says which."""
    notes: list[str] = []
    version = model.opset_imports[""]
    while True:  # a body may use such ops itself
        bodies = [
            (node, body)
            for node in model.graph
            if node.domain in _STANDARD
            and (node.domain, node.op_type) not in kernels
            and (body := _body(node, version))
        ]
        if not bodies:
            return notes
        for number, (node, body) in enumerate(bodies):
            node.overload = body.overload = str(number)
            del body.opset_import[:]
            body.opset_import.append(onnx.helper.make_opsetid("", version))
            function = onnx_ir.serde.deserialize_function(body)
            model.functions[function.identifier()] = function
            notes.append(f"{node.op_type} {node.name}: runs as a body of other ops; no kernel takes it")
        InlinePass(lambda function: function.domain in _STANDARD)(model)


def _body(node: onnx_ir.Node, version: int) -> onnx.FunctionProto | None:
    if not onnx.defs.has(node.op_type, version, ""):
        return None
    schema: Any = onnx.defs.get_schema(node.op_type, version, "")  # its stubs lack the functions
    # The body refers to attributes, and a call need not spell out those that have a default.
    for name, attribute in schema.attributes.items():
        if name not in node.attributes and attribute.default_value.name:
            node.attributes[name] = onnx_ir.serde.deserialize_attribute(attribute.default_value)
    if node.op_type in _OURS:
        return _OURS[node.op_type](node)
    if schema.has_function:
        text = schema.get_function_with_opset_version(version)
        return onnx.FunctionProto.FromString(text) if text else None
    return _context_body(node, schema, version)


def _context_body(node: onnx_ir.Node, schema: Any, version: int) -> onnx.FunctionProto | None:
    """The body that ONNX makes from a node's types and attributes, if its ops still mean the same at `version`."""
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= version]
    if not versions:
        return None
    call = onnx_ir.serde.serialize_node(node).SerializeToString()
    types = [b"" if v is None else onnx_ir.serde.serialize_value(v).type.SerializeToString() for v in node.inputs]
    text = schema.get_context_dependent_function_with_opset_version(max(versions), call, types)
    if not text:
        return None
    body = onnx.FunctionProto.FromString(text)
    return body if all(_means_the_same(inner.op_type, max(versions), version) for inner in body.node) else None


def _means_the_same(op_type: str, old: int, new: int) -> bool:
    before, after = (onnx.defs.get_schema(op_type, version, "") for version in (old, new))
    return set(before.attributes) == set(after.attributes) and len(before.inputs) == len(after.inputs)


def _lrn(node: onnx_ir.Node) -> onnx.FunctionProto:
    """y = x / (bias + α · mean of x² over `size` channels)^β, the mean as a pooling with the pixels as channels."""
    size = node.attributes["size"].as_int()
    alpha, beta, bias = (node.attributes[name].as_float() for name in ("alpha", "beta", "bias"))
    pads = [(size - 1) // 2, size // 2]
    return _function(
        "LRN",
        f"""
        rows = Constant <value_ints = [0, 0, -1]> ()
        alpha32 = Constant <value_float = {alpha!r}> ()
        alpha = CastLike (alpha32, x)
        beta32 = Constant <value_float = {beta!r}> ()
        beta = CastLike (beta32, x)
        bias32 = Constant <value_float = {bias!r}> ()
        bias = CastLike (bias32, x)
        square = Mul (x, x)
        flat = Reshape (square, rows)
        turned = Transpose <perm = [0, 2, 1]> (flat)
        pooled = AveragePool <kernel_shape = [{size}], pads = {pads}, count_include_pad = 1> (turned)
        back = Transpose <perm = [0, 2, 1]> (pooled)
        shape = Shape (x)
        mean = Reshape (back, shape)
        scaled = Mul (alpha, mean)
        base = Add (bias, scaled)
        divisor = Pow (base, beta)
        y = Div (x, divisor)
        """,
    )


def _lp_normalization(node: onnx_ir.Node) -> onnx.FunctionProto:
    """y = x / ‖x‖ along one axis, 0 where the norm is 0."""
    axis, p = node.attributes["axis"].as_int(), node.attributes["p"].as_int()
    return _function(
        "LpNormalization",
        f"""
        axes = Constant <value_ints = [{axis}]> ()
        zero32 = Constant <value_float = 0.0> ()
        zero = CastLike (zero32, x)
        norm = ReduceL{p} <keepdims = 1> (x, axes)
        none = Equal (norm, zero)
        ratio = Div (x, norm)
        y = Where (none, zero, ratio)
        """,
    )


def _function(name: str, nodes: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(f'<domain: "", opset_import: ["" : 21]> {name} (x) => (y) {{ {nodes} }}')


_OURS: dict[str, Callable[[onnx_ir.Node], onnx.FunctionProto]] = {"LRN": _lrn, "LpNormalization": _lp_normalization}
