"""Which node and value of one model is which of another: by name first, then by structure (Weisfeiler-Lehman)."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir

from mc_opt.ir import views
from mc_opt.ir.text import attribute_text, digest, is_implied, type_text

_DIGESTED = 1 << 20
"""Bytes up to which a constant's content tells nodes apart; of larger ones the type does, so that none is read."""
_BLOCK = 1 << 24
_RADIUS = 4


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models: its nodes by their titles, in order."""

    model: onnx_ir.Model
    titles: Mapping[onnx_ir.Node, str]

    @classmethod
    def of(cls, model: onnx_ir.Model) -> Side:
        """A model as one side."""
        return cls(model, views.titles_of(model))

    @functools.cached_property
    def nodes(self) -> Mapping[str, onnx_ir.Node]:
        """Title to node."""
        return {title: node for node, title in self.titles.items()}

    @functools.cached_property
    def view(self) -> views.View:
        """The graph of the nodes."""
        return views.graph_of(self.model)

    @functools.cached_property
    def holders(self) -> Mapping[onnx_ir.Graph, onnx_ir.Node]:
        """The node that holds each inner graph."""
        return {graph: node for node in self.titles for graph in views.subgraphs(node)}

    @functools.cached_property
    def interface(self) -> Mapping[onnx_ir.Value, Hashable]:
        """Places of the values that graphs take: number of the graph in its node, number of the input."""
        return {v: (g, i) for g, graph in self._graphs() for i, v in enumerate(graph.inputs)}

    @functools.cached_property
    def results(self) -> Mapping[onnx_ir.Value, Hashable]:
        """Places of the values that graphs put out."""
        return {v: (g, i) for g, graph in self._graphs() for i, v in enumerate(graph.outputs)}

    def _graphs(self) -> Iterator[tuple[int, onnx_ir.Graph]]:
        yield -1, self.model.graph
        for node in self.titles:
            yield from enumerate(views.subgraphs(node))


@dataclass(frozen=True)
class Matching:
    """What of the first model is what of the second.

    Attributes:
        nodes: nodes that are the same one.
        values: their results, inputs of graphs, and constants.
        by_structure: names counted for nothing: values of one name are not the same for that.
    """

    nodes: dict[onnx_ir.Node, onnx_ir.Node] = field(default_factory=dict)
    values: dict[onnx_ir.Value, onnx_ir.Value] = field(default_factory=dict)
    by_structure: bool = False

    def same(self, a: onnx_ir.Value | None, b: onnx_ir.Value | None) -> bool:
        """Whether a node that took `a` takes the same when it takes `b`."""
        if a is None or b is None:
            return a is b
        return self.values.get(a) is b or (not self.by_structure and a.name == b.name)


def constant_of(value: onnx_ir.Value) -> onnx_ir.TensorProtocol | None:
    """The tensor of an initialiser that nobody can set from outside, or of a Constant node."""
    node = value.producer()
    if node is not None:
        attribute = node.attributes.get("value") if node.op_type == "Constant" and node.domain == "" else None
        return None if attribute is None else attribute.as_tensor()
    return value.const_value if value.is_initializer() and not value.is_graph_input() else None


def names_agree(a: Side, b: Side) -> bool:
    """Whether every node of `a` finds one of its op under its name."""
    return all(title in b.nodes and _op(n) == _op(b.nodes[title]) for n, title in a.titles.items())


def match_by_name(a: Side, b: Side) -> Matching:
    """Nodes of one name and op; nodes of one op whose first results have one name; then the rest by structure."""
    pairs = {n: b.nodes[t] for n, t in a.titles.items() if t in b.nodes and _op(n) == _op(b.nodes[t])}
    results = [{n: (_op(n), n.outputs[0].name) for n in side.titles if n.outputs} for side in (a, b)]
    _pair(pairs, *results, fresh=True)
    if _left_alike(pairs, a, b):
        _complete(pairs, a, b)
    taken = set(pairs.values())
    for node, title in a.titles.items():
        if node not in pairs and title in b.nodes and b.nodes[title] not in taken:
            pairs[node] = b.nodes[title]  # the name stayed, the op is another one
    return _with_values(pairs, a, b)


def match_by_structure(a: Side, b: Side) -> Matching:
    """Names counted for nothing: nodes that agree in all above and below them, in one of the two, in what is near."""
    palette: views.Palette = {}
    digests: dict[int, str] = {}
    looks: dict[Side, tuple[Looks, ...]] = {}
    for side in (a, b):
        colours = {title: views.colour(palette, _look(node, side, digests)) for node, title in side.titles.items()}
        above = views.ancestry(side.view, colours, palette)
        below = views.ancestry(views.reverse(side.view), colours, palette)
        both = views.ancestry(views.reverse(side.view), above, palette)
        looks[side] = tuple(_by_node(side, way) for way in (both, above, below))
    pairs: dict[onnx_ir.Node, onnx_ir.Node] = {}
    for way in range(3):
        _pair(pairs, looks[a][way], looks[b][way], fresh=way > 0)
    if _left_alike(pairs, a, b):
        _complete(pairs, a, b)
    return _with_values(pairs, a, b, by_structure=True)


# ---- nodes

Looks = Mapping[onnx_ir.Node, Hashable]


def _op(node: onnx_ir.Node) -> tuple[str, str, str]:
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type, node.overload


def _left_alike(pairs: Mapping[onnx_ir.Node, onnx_ir.Node], a: Side, b: Side) -> bool:
    """Whether nodes of one op are left on both sides."""
    taken = set(pairs.values())
    left = {_op(n) for n in a.titles if n not in pairs}
    return any(_op(n) in left for n in b.titles if n not in taken)


def _complete(pairs: dict[onnx_ir.Node, onnx_ir.Node], a: Side, b: Side) -> None:
    """Pair nodes in the same surroundings: those that are paired already count as one, whatever they are."""
    digests: dict[int, str] = {}
    for look in (functools.partial(_look, digests=digests), lambda node, _side: _op(node)):
        looks = [{node: look(node, side) for node in side.titles} for side in (a, b)]
        while _pair_round(pairs, a, b, looks):
            pass


def _pair_round(pairs: dict[onnx_ir.Node, onnx_ir.Node], a: Side, b: Side, looks: Sequence[Looks]) -> bool:
    palette: views.Palette = {}
    numbers = {node: i for i, pair in enumerate(pairs.items()) for node in pair}
    tries: dict[Side, list[Mapping[str, int]]] = {}
    for side, look in zip((a, b), looks, strict=True):
        colours = {
            title: views.colour(palette, ("pair", numbers[n]) if n in numbers else look[n])
            for n, title in side.titles.items()
        }
        radii = [colours]
        for _ in range(_RADIUS):
            radii.append(views.refined(side.view, radii[-1], palette))
        one_way = [views.fed(view, colours, palette) for view in (side.view, views.reverse(side.view))]
        tries[side] = [*radii[:0:-1], *one_way]
    before = len(pairs)
    for number in range(_RADIUS + 2):
        if len(pairs) > before:  # the new pairs say more about the rest than less of the surroundings does
            break
        _pair(pairs, _by_node(a, tries[a][number]), _by_node(b, tries[b][number]), fresh=False)
    return len(pairs) > before


def _by_node(side: Side, colours: Mapping[str, int]) -> Looks:
    return {node: colours[title] for node, title in side.titles.items() if title in colours}


def _pair(pairs: dict[onnx_ir.Node, onnx_ir.Node], a: Looks, b: Looks, *, fresh: bool) -> None:
    """Pair the nodes that are left and look alike; `fresh`: only where the look has no second on its side."""
    taken = set(pairs.values())
    first = {n: look for n, look in a.items() if n not in pairs}
    second = {n: look for n, look in b.items() if n not in taken}
    _pair_classes(pairs, first, second, unique=fresh)


def _pair_classes(
    pairs: dict[onnx_ir.Node, onnx_ir.Node], first: Looks, second: Looks, *, unique: bool = False
) -> None:
    """Pair what looks alike, in the models' order, where there are as many on both sides."""
    classes: dict[Hashable, list[onnx_ir.Node]] = defaultdict(list)
    for node, look in second.items():
        classes[look].append(node)
    own: dict[Hashable, list[onnx_ir.Node]] = defaultdict(list)
    for node, look in first.items():
        own[look].append(node)
    for look, nodes in own.items():
        others = classes.get(look, [])
        if len(nodes) == len(others) and not (unique and len(nodes) > 1):
            pairs.update(zip(nodes, others, strict=True))


def _look(node: onnx_ir.Node, side: Side, digests: dict[int, str]) -> Hashable:
    """All of a node but names: op, attributes, constants, and what it takes from or hands to the outside."""
    attributes = tuple(
        (a.name, attribute_text(a))
        for _, a in sorted(node.attributes.items())
        if a.type not in _GRAPHS and not is_implied(node, a)
    )
    inputs = tuple(_input_look(v, side, digests) for v in node.inputs)
    return _op(node), attributes, inputs, tuple(side.results.get(v) for v in node.outputs)


_GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


def _input_look(value: onnx_ir.Value | None, side: Side, digests: dict[int, str]) -> Hashable:
    if value is None:
        return "none"
    if value in side.interface:
        return side.interface[value]
    tensor = constant_of(value) if value.producer() is None else None
    if tensor is None:
        return "computed"
    if tensor.nbytes > _DIGESTED:
        return tensor.dtype, tuple(tensor.shape)
    if id(tensor) not in digests:
        digests[id(tensor)] = digest(tensor)
    return tensor.dtype, tuple(tensor.shape), digests[id(tensor)]


# ---- values


def _with_values(pairs: dict[onnx_ir.Node, onnx_ir.Node], a: Side, b: Side, *, by_structure: bool = False) -> Matching:
    """The matching of values that follows from one of nodes."""
    values: dict[onnx_ir.Value, onnx_ir.Value] = {}
    if by_structure:
        values.update(zip(a.model.graph.inputs, b.model.graph.inputs, strict=False))
    else:
        _name_values(values, _taken(a), _taken(b))
        _name_values(values, _stored(a), _stored(b))
    claimed = set(values.values())
    for node, other in pairs.items():
        values.update(zip(node.outputs, other.outputs, strict=False))
        for body, other_body in zip(views.subgraphs(node), views.subgraphs(other), strict=False):
            values.update(zip(body.inputs, other_body.inputs, strict=False))
        for x, y in zip(node.inputs, other.inputs, strict=False):
            if x is None or y is None or x in values or y in claimed or x.producer() or y.producer():
                continue
            if _is_like(x, y):
                values[x] = y
                claimed.add(y)
    # Inputs that nothing uses have their place alone.
    unused = [v for v in _taken(a) if v not in values], [v for v in _taken(b) if v not in claimed]
    if len(unused[0]) == len(unused[1]):
        values.update((x, y) for x, y in zip(*unused, strict=True) if type_text(x) == type_text(y))
    return Matching(pairs, values, by_structure)


def _taken(side: Side) -> list[onnx_ir.Value]:
    return list(side.model.graph.inputs)


def _stored(side: Side) -> list[onnx_ir.Value]:
    return [v for graph in side.model.graphs() for v in graph.initializers.values() if not v.is_graph_input()]


def _name_values(
    values: dict[onnx_ir.Value, onnx_ir.Value], first: Iterable[onnx_ir.Value], second: Iterable[onnx_ir.Value]
) -> None:
    names = {v.name: v for v in second}
    values.update((v, names[v.name]) for v in first if v.name in names)


def _is_like(a: onnx_ir.Value, b: onnx_ir.Value) -> bool:
    """Whether two values without a producer may be one value of two names: inputs both, or constants of one type."""
    x, y = constant_of(a), constant_of(b)
    if x is None or y is None:
        return x is y and a.dtype == b.dtype
    return x.dtype == y.dtype and tuple(x.shape) == tuple(y.shape)


def same_tensor(a: onnx_ir.TensorProtocol, b: onnx_ir.TensorProtocol) -> bool:
    """Whether two tensors hold the same bytes; one tensor is not read for that, mapped ones are read in place."""
    if a is b:
        return True
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    if a.dtype == onnx_ir.DataType.STRING or a.dtype.bitwidth < 8:
        return digest(a) == digest(b)
    x, y = (np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8) for t in (a, b))
    blocks = range(0, x.size, _BLOCK)
    return all(np.array_equal(x[i : i + _BLOCK], y[i : i + _BLOCK]) for i in blocks)
