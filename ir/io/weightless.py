"""Models without their weights, for onnx's C functions, which would copy every byte of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx_ir

# Small constants go along: conversion and shape inference read scales, axes, paddings and shapes.
_SMALL = 1024
_KEY = "mc_opt.weight:"


def weightless(model: onnx_ir.Model) -> tuple[onnx.ModelProto, dict[str, onnx_ir.TensorProtocol]]:
    """The proto of a model whose larger initialisers are stubs, and the tensors by the stubs' keys.

    A stub keeps name, type and shape; it says that its data is external, at a location that is the key.
    """
    tensors: dict[str, onnx_ir.TensorProtocol] = {}
    bare = model.clone()
    for graph in graphs(bare):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _SMALL or tensor.dtype == onnx_ir.DataType.STRING:
                continue
            key = f"{_KEY}{len(tensors)}"
            tensors[key] = tensor
            value.const_value = onnx_ir.ExternalTensor(
                key, 0, None, tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=value.name or ""
            )
    return onnx_ir.to_proto(bare), tensors


def restore(model: onnx_ir.Model, tensors: Mapping[str, onnx_ir.TensorProtocol]) -> None:
    """Put the tensors of `weightless` back in place of their stubs."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, onnx_ir.ExternalTensor):
                value.const_value = tensors[str(value.const_value.location)]


def graphs(model: onnx_ir.Model) -> Iterator[onnx_ir.Graph]:
    """The main graph and every graph inside it, outer before inner; not those of functions."""
    return (graph for _, graph in walk(model.graph))


def walk(graph: onnx_ir.Graph, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], onnx_ir.Graph]]:
    """Every graph with its path: the outputs and attributes that lead to it, which conversion keeps."""
    yield path, graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == onnx_ir.AttributeType.GRAPH:
                yield from walk(attribute.as_graph(), (*path, first_output(node), attribute.name))
            elif attribute.type == onnx_ir.AttributeType.GRAPHS:
                for i, inner in enumerate(attribute.as_graphs()):
                    yield from walk(inner, (*path, first_output(node), f"{attribute.name}.{i}"))


def first_output(node: onnx_ir.Node) -> str:
    """The name of the first output that has one: conversion keeps it."""
    return next((o.name for o in node.outputs if o.name), "")
