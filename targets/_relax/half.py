"""Half precision is how values are stored: what computes does so in float32, as in ONNX Runtime."""

from __future__ import annotations

import onnx_ir

_HALF = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
# Ops that move elements or pick some of them; there is nothing to round.
_MOVES = {
    *("Abs", "Cast", "CastLike", "Compress", "Concat", "ConstantOfShape", "DepthToSpace", "Dropout", "Expand"),
    *("EyeLike", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Max", "MaxPool", "Min", "Neg"),
    *("GlobalMaxPool", "Pad", "Relu", "Reshape", "ReverseSequence", "ScatterND", "Shape", "Size", "Slice"),
    *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
}


def widen(model: onnx_ir.Model) -> None:
    """Put casts around every standard op that computes in half precision.

    A sum of a thousand float16 products would otherwise be wrong in its second digit.
    """
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type in _MOVES:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in _HALF:
                node.replace_input_with(index, _widened(model.graph, node, value, index))
        for value in node.outputs:
            if value.dtype in _HALF:
                _narrow(model.graph, node, value)


def _widened(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value, index: int) -> onnx_ir.Value:
    cast = _cast(value, onnx_ir.DataType.FLOAT, f"{node.outputs[0].name}.wide{index}")
    graph.insert_before(node, cast)
    return cast.outputs[0]


def _narrow(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value) -> None:
    """The value's readers get a cast; the graph's output is told apart from a reader."""
    dtype, name = value.dtype, value.name
    assert dtype is not None
    cast = _cast(value, dtype, f"{name}.half")
    narrow = cast.outputs[0]
    value.replace_all_uses_with(narrow, replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    value.name, narrow.name = f"{name}.wide", name
    value.dtype = onnx_ir.DataType.FLOAT
    graph.insert_after(node, cast)


def _cast(value: onnx_ir.Value, dtype: onnx_ir.DataType, name: str) -> onnx_ir.Node:
    made = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(dtype))
    return onnx_ir.Node("", "Cast", [value], [onnx_ir.AttrInt64("to", int(dtype))], outputs=[made], name=name)
