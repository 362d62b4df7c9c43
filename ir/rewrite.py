"""Edit a graph: name, register, replace a weight; what is made carries the pass and the rule that made it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import constant, find_op, is_ours
from mc_opt.ir.sites import WeightSite, names_of

PASS = "mc_opt.pass"
RULE = "mc_opt.rule"


def free_name(graph: onnx_ir.Graph, base: str) -> str:
    """`base`, or `base.1`, `base.2`, ...: the first that no value of the graph and its subgraphs carries."""
    return free(base, names_of(graph))


def free(base: str, names: set[str]) -> str:
    """As `free_name`, against names that are known already."""
    name, number = base, 0
    while name in names:
        number += 1
        name = f"{base}.{number}"
    return name


def initializer(graph: onnx_ir.Graph, name: str, data: np.ndarray | onnx_ir.TensorProtocol) -> onnx_ir.Value:
    """Register a new constant in `graph` under `name`, or the next free name."""
    value = constant(data, free_name(graph, name))
    graph.register_initializer(value)
    return value


def provenance(node: onnx_ir.Node, by: tuple[str, str]) -> None:
    """Write who made the node, by = (pass, rule), in its metadata and its name."""
    made_by, rule = by
    node.metadata_props[PASS] = made_by
    node.metadata_props[RULE] = rule
    output = next((o.name for o in node.outputs if o.name), node.op_type)
    node.name = f"{made_by}/{output}"


def replace_weight(
    site: WeightSite, nodes: onnx_ir.Node | Sequence[onnx_ir.Node], *, by: tuple[str, str]
) -> onnx_ir.Value:
    """Put nodes that make the weight in the place of its initialiser; the decoded value.

    The output of the last node takes the weight's name, type, shape, metadata and every use; constants and
    values of the nodes that have no name yet get one that derives from it (`fc.w.codes`, `fc.w.scale.codes`),
    and constants are registered in the weight's graph. The nodes stand before the weight's first consumer.

    Args:
        site: the weight, from `weight_sites`.
        nodes: in topological order, the last one makes the weight.
        by: the pass and the rule.

    Raises:
        IRError: when the last node's output is not of the weight's type and shape.
    """
    nodes = [nodes] if isinstance(nodes, onnx_ir.Node) else list(nodes)
    old, new, graph = site.value, nodes[-1].outputs[0], site.graph
    _check_replacement(site, new)
    name, tensor_type, shape = site.name, old.type, old.shape

    old.replace_all_uses_with(new)
    graph.initializers.pop(name)
    old.name = None
    new.name, new.type, new.shape, new.const_value = name, tensor_type, shape, None
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)

    for node in reversed(nodes):
        _name_inputs(node, graph, site.names)
    graph.insert_before(_first_user(graph, {n for n, _ in site.consumers}), nodes)
    for node in nodes:
        provenance(node, by)
    return new


def replace_node(
    node: onnx_ir.Node, nodes: Sequence[onnx_ir.Node], *, by: tuple[str, str], names: set[str]
) -> onnx_ir.Value:
    """Put nodes in the place of one with a single output; the new output.

    The output of the last node takes the old one's name, type, shape, metadata and every use; values on the way get
    names that derive from it (`y.1`). Constants must be registered already; those of the old node stay.

    Args:
        node: what goes.
        nodes: in topological order, the last one makes the result.
        by: the pass and the rule.
        names: every value name of the model; grows by the new ones.

    Raises:
        IRError: when the node's own output is not one, or in no graph any more.
    """
    graph = node.graph
    if not isinstance(graph, onnx_ir.Graph) or len(node.outputs) != 1:
        raise IRError(f"{node.name}: {node.op_type} cannot be replaced, expected a node of a graph with one output")
    old, new = node.outputs[0], nodes[-1].outputs[0]
    name, tensor_type, shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = None
    new.name, new.type, new.shape = name, tensor_type, _merged(new.shape, shape)
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    for made in nodes[:-1]:
        made.outputs[0].name = free(f"{name}", names)
        names.add(made.outputs[0].name)
    graph.insert_after(node, nodes)
    graph.remove(node, safe=True)
    for made in nodes:
        made.metadata_props.update(node.metadata_props)
        provenance(made, by)
    return new


def _merged(new: onnx_ir.Shape | None, old: onnx_ir.Shape | None) -> onnx_ir.Shape | None:
    """The new shape, with the old one's dimensions where it knows none."""
    if new is None or old is None or len(new) != len(old):
        return new if new is not None else old
    known = [isinstance(dim, int) or dim.value is not None for dim in new]
    return onnx_ir.Shape([a if is_known else b for a, b, is_known in zip(new, old, known, strict=True)])


def _check_replacement(site: WeightSite, new: onnx_ir.Value) -> None:
    if not site.value.is_initializer():
        raise IRError(f"{site.layer}: the weight was replaced already; take sites from a fresh ir.weight_sites")
    dims = tuple(new.shape) if new.shape is not None else None
    if new.dtype != site.value.dtype or dims != site.shape:
        raise IRError(
            f"{site.layer}: the replacement is {new.dtype}{list(dims or ())}, expected "
            f"{site.value.dtype}{list(site.shape)}, the weight's own; decode to that"
        )


def _name_inputs(node: onnx_ir.Node, graph: onnx_ir.Graph, names: set[str]) -> None:
    """Name what the node takes after its output, and register the constants."""
    formal = find_op(node.op_type).formal(len(node.inputs)) if is_ours(node) else []
    for index, value in enumerate(node.inputs):
        if value is None or value.graph is not None:
            continue
        if value.name is None or value.name in names:
            part = formal[index] if index < len(formal) else str(index + 1)
            value.name = free(value.name or f"{node.outputs[0].name}.{part}", names)
        names.add(value.name)
        if value.const_value is not None and value.producer() is None:
            graph.register_initializer(value)


def _first_user(graph: onnx_ir.Graph, consumers: set[onnx_ir.Node]) -> onnx_ir.Node:
    """The first node of `graph` that is one of the consumers, or holds one in a subgraph."""
    for node in graph:
        if node in consumers or any(inner in consumers for inner in _nested(node)):
            return node
    raise IRError(f"graph {graph.name!r}: none of the weight's consumers is in it; take sites from a fresh walk")


def _nested(node: onnx_ir.Node) -> list[onnx_ir.Node]:
    inner: list[onnx_ir.Node] = []
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            inner += attribute.as_graph().all_nodes()
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            inner += [n for graph in attribute.as_graphs() for n in graph.all_nodes()]
    return inner
