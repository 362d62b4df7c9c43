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
