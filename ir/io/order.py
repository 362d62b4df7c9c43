"""The order of a graph: names that are defined once, nodes that can run one after the other, cycles named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir

from mc_opt.ir.errors import IRError


def check_names(graph: onnx.GraphProto, outer: frozenset[str], where: str) -> bool:
    """Whether the nodes are in an order to run; refuses names that nothing defines or that two things define."""
    inputs = [i.name for i in graph.input]
    weights = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    produced = [name for node in graph.node for name in node.output if name]
    for kind, names in (("input", inputs), ("weight", weights), ("value", [*{*inputs, *weights}, *produced])):
        if len(set(names)) != len(names):
            twice = next(n for n in sorted(names) if names.count(n) > 1)
            raise IRError(f"{where}: {kind} {twice!r} is defined twice; expected every name once; export it again")
    known = outer.union(inputs, weights, produced)
    ready = set(outer.union(inputs, weights))
    ordered = True
    for node in graph.node:
        label = f"{where}: node {node.name or ', '.join(node.output)!r} ({node.op_type})"
        for name in node.input:
            if name and name not in known:
                raise IRError(f"{label} reads {name!r}, which nothing produces; export the model again")
        ordered &= all(name in ready for name in node.input if name)
        for inner in subgraphs(node):
            ordered &= check_names(inner, frozenset(known), label)
            # A body may read what stands further down; the sort finds out.
            ordered &= all(name in ready for name in _free_names(inner) if name in known)
        ready.update(node.output)
    for output in graph.output:
        if output.name not in known:
            raise IRError(f"{where}: output {output.name!r} is produced by no node; export the model again")
    return ordered


def _free_names(graph: onnx.GraphProto) -> set[str]:
    """The names that a body reads from outside."""
    own = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    own.update(name for node in graph.node for name in node.output)
    read = {name for node in graph.node for name in node.input if name} | {o.name for o in graph.output}
    for node in graph.node:
        for inner in subgraphs(node):
            read |= _free_names(inner)
    return read - own


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a control-flow node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def sort(model: onnx_ir.Model, path: Path) -> None:
    """Bring the nodes into an order to run, bodies too; a cycle is an error that names it."""
    try:
        model.graph.sort()
    except ValueError as error:
        raise IRError(
            f"{path}: the graph is cyclic: {' -> '.join(_cycle(model.graph))}; expected none; export the model again"
        ) from error


def _cycle(graph: onnx_ir.Graph) -> list[str]:
    """The values of one cycle, in order, the first repeated at the end."""
    done: set[onnx_ir.Node] = set()
    for start in graph.all_nodes():
        trail: list[onnx_ir.Node] = []
        stack: list[tuple[onnx_ir.Node, Iterator[onnx_ir.Node]]] = [(start, _needed(start))]
        while stack:
            node, needed = stack[-1]
            if node not in trail:
                trail.append(node)
            following = next((n for n in needed if n not in done), None)
            if following is None:
                done.add(node)
                trail.pop()
                stack.pop()
            elif following in trail:
                loop = [*trail[trail.index(following) :], following]
                return [next((o.name for o in n.outputs if o.name), n.op_type) for n in reversed(loop)]
            else:
                stack.append((following, _needed(following)))
    return []


def _needed(node: onnx_ir.Node) -> Iterator[onnx_ir.Node]:
    """The nodes that must run before `node`: its producers, and those of its bodies."""
    for value in node.inputs:
        if value is not None and (producer := value.producer()) is not None:
            yield producer
    for attribute in node.attributes.values():
        if not attribute.is_ref() and attribute.type == onnx_ir.AttributeType.GRAPH:
            yield from attribute.as_graph()
        elif not attribute.is_ref() and attribute.type == onnx_ir.AttributeType.GRAPHS:
            for inner in attribute.as_graphs():
                yield from inner
