"""Bodies of control flow: which a node has, and an If whose condition is known, replaced by the branch it takes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir


def bodies(node: onnx_ir.Node) -> list[onnx_ir.Graph]:
    """The graphs in a node's attributes."""
    found: list[onnx_ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def inline(node: onnx_ir.Node, model: onnx_ir.Model, condition: onnx_ir.TensorProtocol | None) -> int:
    """Put the branch that a constant condition takes in the place of the If; 1 if it was done."""
    graph = node.graph
    if condition is None or condition.size != 1 or not isinstance(graph, onnx_ir.Graph):
        return 0
    body = node.attributes["then_branch" if condition.numpy().item() else "else_branch"].as_graph()
    results = list(body.outputs)
    _rename(body, _names(model, without=node), _node_names(model, without=node))

    for value in list(body.initializers.values()):
        body.initializers.pop(value.name or "")
        graph.register_initializer(value)
    body.outputs.clear()
    for inner in list(body):
        body.remove(inner)
        graph.insert_before(node, inner)
    for output, result in zip(node.outputs, results, strict=True):
        _take(output, result, graph)
    remove(node)
    return 1


def remove(node: onnx_ir.Node) -> None:
    """Take a node out of its graph, and let go of what its bodies read."""
    for body in bodies(node):
        body.outputs.clear()
        for inner in reversed(body):
            remove(inner)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _take(output: onnx_ir.Value, result: onnx_ir.Value, graph: onnx_ir.Graph) -> None:
    """Let `result` stand for the If's `output`, under the output's name where it has a name to give away."""
    producer = result.producer()
    if producer is None or producer.graph is not graph or result.is_graph_output():
        if output.is_graph_output():
            copy_to(output, result)
        else:
            onnx_ir.convenience.replace_all_uses_with(output, result)
        return
    if output.name and (output.uses() or output.is_graph_output()):
        result.name, output.name = output.name, None
    onnx_ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)


def copy_to(output: onnx_ir.Value, source: onnx_ir.Value) -> None:
    """Make an output of a graph an Identity of `source`, which cannot be an output itself; its name stays."""
    node = output.producer()
    assert node is not None and isinstance(node.graph, onnx_ir.Graph)
    made = onnx_ir.Node("", "Identity", [source], num_outputs=1, name=f"{node.name or output.name}.copy")
    copy = made.outputs[0]
    copy.type, copy.shape = output.type or source.type, output.shape or source.shape
    copy.metadata_props.update(output.metadata_props)
    copy.name, output.name = output.name, None
    onnx_ir.convenience.replace_all_uses_with(output, copy, replace_graph_outputs=True)
    node.graph.insert_before(node, made)


def _rename(body: onnx_ir.Graph, taken: set[str], taken_nodes: set[str]) -> None:
    """Give what the body defines names that nothing outside has."""
    for value in (*body.initializers.values(), *(o for n in body for o in n.outputs if o.name)):
        if value.name in taken:
            value.name = _free(value.name or "", taken)
        taken.add(value.name or "")
    for node in body:
        if node.name and node.name in taken_nodes:
            node.name = _free(node.name, taken_nodes)
        taken_nodes.add(node.name or "")


def _free(base: str, taken: set[str]) -> str:
    number = 1
    while f"{base}.{number}" in taken:
        number += 1
    return f"{base}.{number}"


def _names(model: onnx_ir.Model, *, without: onnx_ir.Node) -> set[str]:
    names: set[str] = set()
    for graph in _graphs(model.graph, without):
        names.update(v.name for v in (*graph.inputs, *graph.initializers.values()) if v.name)
        names.update(o.name for node in graph for o in node.outputs if o.name)
    return names


def _node_names(model: onnx_ir.Model, *, without: onnx_ir.Node) -> set[str]:
    return {node.name for graph in _graphs(model.graph, without) for node in graph if node.name}


def _graphs(graph: onnx_ir.Graph, without: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    yield graph
    for node in graph:
        if node is not without:
            for inner in bodies(node):
                yield from _graphs(inner, without)
