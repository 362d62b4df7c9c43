"""Nodes whose inputs are all known while building, evaluated by ONNX's own reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir
from onnx.reference import ReferenceEvaluator


def evaluate(node: onnx_ir.Node, inputs: Sequence[np.ndarray | None], model: onnx_ir.Model) -> tuple[np.ndarray, ...]:
    """The outputs of one node for given inputs, at the model's opset and with the model's functions."""
    if node.op_type == "GatherElements" and node.domain == "":
        data, indices = inputs
        assert data is not None and indices is not None
        return (_gather_elements(data, indices, node.attributes.get_int("axis", 0) % data.ndim),)
    names = ["" if array is None else f"i{k}" for k, array in enumerate(inputs)]
    outputs = [f"o{k}" for k in range(len(node.outputs))]
    proto = onnx_ir.to_proto(node)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(outputs)
    graph = onnx.GraphProto(name="fold", node=[proto])
    for name, array in zip(names, inputs, strict=True):
        if array is not None:
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    functions = [
        onnx_ir.to_proto(function)
        for function in model.functions.values()
        if (function.domain, function.name, function.overload) == (node.domain, node.op_type, node.overload)
    ]
    single = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions)
    feeds = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
    results = ReferenceEvaluator(single).run(None, feeds)
    return tuple(np.asarray(array) for array in results)


def _gather_elements(data: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    """ONNX's GatherElements; its reference (onnx 1.23) refuses a matrix of one row that is read by a longer one."""
    cut = tuple(slice(None) if a == axis else slice(n) for a, n in enumerate(indices.shape))
    return np.take_along_axis(data[cut], np.where(indices < 0, indices + data.shape[axis], indices), axis)
