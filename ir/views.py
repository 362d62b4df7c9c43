"""Questions about a model that a graph library answers: cycles, reach, longest path.

A view has a vertex for every node of the main graph and its subgraphs, by the node's name, and an edge
for every value that one takes from another. What a subgraph computes flows into the node that holds it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import cast

import networkx as nx
import onnx_ir

from mc_opt.ir.errors import IRError

View = nx.DiGraph


def graph_of(model: onnx_ir.Model) -> nx.DiGraph:
    """The model's nodes as vertices (attributes `op_type`, `node`), its values as edges.

    An edge has the attributes `values` (names) and `places`: (number of the output, number of the input), or
    (-1, number of the graph) from what stands inside a node to that node.
    """
    view: nx.DiGraph = nx.DiGraph()
    titles = titles_of(model)
    for node, title in titles.items():
        view.add_node(title, op_type=node.op_type, node=node)
    for node, title in titles.items():
        for index, value in enumerate(node.inputs):
            if value is not None and (producer := value.producer()) in titles and producer is not None:
                _connect(view, titles[producer], title, value.name or "?", (value.index() or 0, index))
        for number, graph in enumerate(subgraphs(node)):
            for inner in graph:
                # The holder waits for everything inside it, and its outputs come from there.
                _connect(view, titles[inner], title, ", ".join(o.name or "?" for o in inner.outputs), (-1, number))
    return view


def titles_of(model: onnx_ir.Model) -> dict[onnx_ir.Node, str]:
    """A different name for every node: its own, or what it makes when it has none or another node has it."""
    titles: dict[onnx_ir.Node, str] = {}
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        base = title_of(node)
        title, number = base, 1
        while title in taken:
            number += 1
            title = f"{base}#{number}"
        taken.add(title)
        titles[node] = title
    return titles


def title_of(node: onnx_ir.Node) -> str:
    """A node's name, or what it makes when it has none."""
    return node.name or next((o.name for o in node.outputs if o.name), None) or node.op_type


def subgraphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """The graphs that a node holds: branches, loop bodies; in the order of their attributes' names."""
    for _, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _connect(view: nx.DiGraph, source: str, target: str, value: str, place: tuple[int, int]) -> None:
    if view.has_edge(source, target):
        edge = view.edges[source, target]
        edge["values"] = edge["values"] if value in edge["values"] else (*edge["values"], value)
        edge["places"] = (*edge["places"], place)
    else:
        view.add_edge(source, target, values=(value,), places=(place,))


# ---- structure: Weisfeiler-Lehman refinement

Palette = dict[Hashable, int]
"""Numbers ("colours") for what looks alike. Two views that share a palette share its colours, without collisions."""


def colour(palette: Palette, look: Hashable) -> int:
    """The colour of a look; a look that is new gets the next one."""
    return palette.setdefault(look, len(palette))


def refined(view: nx.DiGraph, colours: Mapping[str, int], palette: Palette) -> dict[str, int]:
    """One round of Weisfeiler-Lehman: a node's colour and those of its neighbours, by direction and place."""
    # networkx's own hashes of directed graphs changed with version 3.5, and do not tell in from out with edge labels.
    return {
        name: colour(palette, (colours[name], _around(view.pred[name], colours), _around(view.succ[name], colours)))
        for name in view
    }


def fed(view: nx.DiGraph, colours: Mapping[str, int], palette: Palette) -> dict[str, int]:
    """A node's colour and those of the nodes that it takes values from; none for a node that takes none."""
    return {
        name: colour(palette, (colours[name], _around(edges, colours))) for name, edges in view.pred.items() if edges
    }


def ancestry(view: nx.DiGraph, colours: Mapping[str, int], palette: Palette) -> dict[str, int]:
    """The refinement along the edges to its end: nodes of one colour compute the same from the same.

    Raises:
        IRError: when the graph has a cycle.
    """
    if not nx.is_directed_acyclic_graph(view):
        raise IRError("the graph has a cycle, expected none; ir.find_cycle names it")
    found: dict[str, int] = {}
    for name in nx.topological_sort(view):
        found[name] = colour(palette, (colours[name], _around(view.pred[name], found)))
    return found


def _around(edges: Mapping[str, Mapping[str, tuple[int, int]]], colours: Mapping[str, int]) -> tuple[object, ...]:
    return tuple(sorted((edge["places"], colours[name]) for name, edge in edges.items()))


def reverse(view: nx.DiGraph) -> nx.DiGraph:
    """The same view with every edge turned round."""
    return view.reverse(copy=False)


def find_cycle(model: onnx_ir.Model) -> tuple[str, ...] | None:
    """The node names along a shortest cycle, from the first in the model's order, or None."""
    found = list(cycles(model))
    return min(found, key=len) if found else None


def cycles(model: onnx_ir.Model) -> Iterator[tuple[str, ...]]:
    """A shortest cycle of every knot (strongly connected component) of the graph."""
    view = graph_of(model)
    order = {name: i for i, name in enumerate(view)}
    for knot in nx.strongly_connected_components(view):
        if len(knot) == 1 and not any(view.has_edge(name, name) for name in knot):
            continue
        yield _shortest_cycle(view.subgraph(knot), order)


def _shortest_cycle(knot: nx.DiGraph, order: dict[str, int]) -> tuple[str, ...]:
    best: list[str] = []
    for name in sorted(knot, key=order.__getitem__):
        # No search goes deeper than the best cycle so far, so a large knot costs no more than its short cycles.
        reach = nx.single_source_shortest_path(knot, name, cutoff=len(best) - 2 if best else None)
        closing = [reach[previous] for previous in knot.predecessors(name) if previous in reach]
        best = min([*closing, *([best] if best else [])], key=len, default=best)
        if len(best) == 1:
            break
    start = best.index(min(best, key=order.__getitem__))
    return tuple(best[start:] + best[:start])


def upstream(view: nx.DiGraph, name: str) -> frozenset[str]:
    """Every node that `name` depends on."""
    _known(view, [name])
    return frozenset(nx.ancestors(view, name))


def downstream(view: nx.DiGraph, name: str) -> frozenset[str]:
    """Every node that depends on `name`."""
    _known(view, [name])
    return frozenset(nx.descendants(view, name))


def path_between(view: nx.DiGraph, source: str, target: str) -> tuple[str, ...] | None:
    """The node names along a shortest path, or None when `target` does not depend on `source`."""
    _known(view, [source, target])
    if not nx.has_path(view, source, target):
        return None
    return tuple(cast("list[str]", nx.shortest_path(view, source, target)))


def longest_path(view: nx.DiGraph) -> tuple[str, ...]:
    """The node names along a longest chain: the model's depth.

    Raises:
        IRError: when the graph has a cycle.
    """
    if not nx.is_directed_acyclic_graph(view):
        raise IRError("the graph has a cycle, expected none; ir.find_cycle names it")
    return tuple(cast("list[str]", nx.dag_longest_path(view, weight=None, default_weight=1)))


def users(view: nx.DiGraph) -> dict[str, tuple[str, ...]]:
    """The nodes that take each value, weights included: value name to node names in the model's order."""
    found: dict[str, dict[str, None]] = {}
    for title, node in view.nodes(data="node"):
        for value in node.inputs:
            if value is not None and value.name:
                found.setdefault(value.name, {})[title] = None
    return {name: tuple(titles) for name, titles in found.items()}


def before(view: nx.DiGraph, names: Iterable[str]) -> tuple[str, ...]:
    """The nodes that these take values from."""
    return tuple(dict.fromkeys(source for name in names for source in view.predecessors(name)))


def after(view: nx.DiGraph, names: Iterable[str]) -> tuple[str, ...]:
    """The nodes that take values from these."""
    return tuple(dict.fromkeys(target for name in names for target in view.successors(name)))


def components(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """What pairs connect among the numbers below `count`: each set ascending, the sets by their first member."""
    ties: nx.Graph = nx.Graph()
    ties.add_nodes_from(range(count))
    ties.add_edges_from(pairs)
    return tuple(sorted(tuple(sorted(found)) for found in nx.connected_components(ties)))


def label(view: nx.DiGraph, name: str) -> str:
    """A node for people: its op type and its name."""
    return f"{view.nodes[name]['op_type']} {name}"


def _known(view: nx.DiGraph, names: Iterable[str]) -> None:
    for name in names:
        if name not in view:
            raise IRError(f"{name}: the model has no node of this name; `mc-opt inspect` lists them")
