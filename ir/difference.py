"""The difference of two models: what was added, removed and changed, by which pass and rule, and what it stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir

from mc_opt.ir import views
from mc_opt.ir.changes import Change, Detail, Diff, Kind, Rename, Total, What
from mc_opt.ir.history import Origin, Touched, origins, read_history, since
from mc_opt.ir.matching import Matching, Side, constant_of, match_by_name, match_by_structure, names_agree, same_tensor
from mc_opt.ir.op import DOMAIN
from mc_opt.ir.rewrite import PASS, RULE
from mc_opt.ir.sites import layer_of
from mc_opt.ir.storage import Storage, layer_changes, storage_of
from mc_opt.ir.text import attribute_text, is_implied, tensor_text, to_text, type_text

_GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


def diff(a: onnx_ir.Model, b: onnx_ir.Model) -> Diff:
    """What changed from `a` to `b`; both as `load_model` gives them, so that an older opset is no change.

    Nodes are the same by name, or else by structure; weights are compared by their bytes, and those that both models
    share in memory are not read.
    """
    first, second = Side.of(a), Side.of(b)
    stores = storage_of(a), storage_of(b)
    comparison, changes = _best(first, second, stores)
    return Diff(
        before=_total(first, stores[0]),
        after=_total(second, stores[1]),
        changes=comparison.explained(changes),
        renames=tuple(comparison.renames()),
        layers=layer_changes(*stores),
    )


def _best(first: Side, second: Side, stores: tuple[Storage, Storage]) -> tuple[_Comparison, tuple[Change, ...]]:
    """The comparison by names; by structure alone where that shows that names changed rather than nodes."""
    by_structure: tuple[_Comparison, tuple[Change, ...]] | None = None
    if len(first.titles) == len(second.titles) and not names_agree(first, second):
        by_structure = _compared(first, second, match_by_structure(first, second), stores)
        if not by_structure[1]:
            return by_structure
    by_name = _compared(first, second, match_by_name(first, second), stores)
    if _names_may_mislead(by_name[1], first, second):
        by_structure = by_structure or _compared(first, second, match_by_structure(first, second), stores)
    return by_name if by_structure is None or len(by_structure[1]) >= len(by_name[1]) else by_structure


def _names_may_mislead(changes: tuple[Change, ...], first: Side, second: Side) -> bool:
    """Whether nodes, as many as before, are wired otherwise, or most of what is there is new or not as it was."""
    wired = any(
        c.what in ("input", "output") or any(d.what.startswith(("inputs", "results")) for d in c.details)
        for c in changes
    )
    if wired and len(first.titles) == len(second.titles):
        return True
    new = [c for c in changes if c.what == "node" and c.kind != "removed" and [d.what for d in c.details] != ["graph"]]
    return 2 * len(new) > len(second.titles)


def _compared(
    first: Side, second: Side, matching: Matching, stores: tuple[Storage, Storage]
) -> tuple[_Comparison, tuple[Change, ...]]:
    comparison = _Comparison(first, second, matching, stores)
    return comparison, comparison.changes()


def _total(side: Side, stored: Storage) -> Total:
    return Total(len(side.titles), stored.total.parameters, stored.total.bytes)


@dataclass(frozen=True)
class _Comparison:
    """Two models under one matching."""

    a: Side
    b: Side
    matching: Matching
    stores: tuple[Storage, Storage]

    # ---- what changed

    def changes(self) -> tuple[Change, ...]:
        return (*self._model(), *self._interface(), *self._nodes(), *self._weights(), *self._functions())

    def _model(self) -> Iterator[Change]:
        details = []
        before, after = (
            {("opset" if d in ("", "ai.onnx") else d): v for d, v in side.model.opset_imports.items() if d != DOMAIN}
            for side in (self.a, self.b)
        )
        used = {n.domain for side in (self.a, self.b) for n in side.titles}
        for domain in sorted({*before, *after}):
            if before.get(domain) != after.get(domain) and (domain == "opset" or domain in used):
                details.append(Detail(domain, _or_none(before.get(domain)), _or_none(after.get(domain))))
        if details:
            yield Change("model", "changed", self.b.model.graph.name or "", "", "", tuple(details))

    def _interface(self) -> Iterator[Change]:
        first, second = self.a.model.graph, self.b.model.graph
        yield from self._ends("input", list(first.inputs), list(second.inputs))
        yield from self._ends("output", list(first.outputs), list(second.outputs))

    def _ends(self, what: What, first: list[onnx_ir.Value], second: list[onnx_ir.Value]) -> Iterator[Change]:
        left = list(second)
        for value in first:
            twin = next((v for v in left if self.matching.same(value, v)), None)
            if twin is None:
                yield Change(what, "removed", str(value.name), type_text(value))
                continue
            left.remove(twin)
            if type_text(value) != type_text(twin):
                detail = Detail("type", type_text(value), type_text(twin))
                yield Change(what, "changed", str(twin.name), type_text(twin), "", (detail,))
        for value in left:
            yield Change(what, "added", str(value.name), type_text(value))

    def _nodes(self) -> Iterator[Change]:
        twins = {b: a for a, b in self.matching.nodes.items()}
        places = {node: i for i, node in enumerate(self.a.titles)}
        rows: list[tuple[tuple[float, int], Change]] = []
        for node, title in self.a.titles.items():
            twin = self.matching.nodes.get(node)
            if twin is None:
                rows.append(((places[node], 0), self._node("removed", node, title, self.stores[0])))
            elif details := tuple(self._details(node, twin)):
                rows.append(
                    ((places[node], 0), self._node("changed", twin, self.b.titles[twin], self.stores[1], details))
                )
        last = -1.0
        for number, (node, title) in enumerate(self.b.titles.items()):
            if node in twins:
                last = places[twins[node]]
            else:
                rows.append(((last + 0.5, number), self._node("added", node, title, self.stores[1])))
        yield from (change for _, change in sorted(rows, key=lambda row: row[0]))

    def _node(
        self, kind: Kind, node: onnx_ir.Node, title: str, stored: Storage, details: tuple[Detail, ...] = ()
    ) -> Change:
        weights = [v for v in (*node.outputs, *node.inputs) if v is not None and v in stored.owners]
        weights.sort(key=lambda v: stored.owners[v].startswith("("))
        layer = stored.owners[weights[0]] if weights else ""
        return Change("node", kind, title, op_text(node), layer, details)

    def _details(self, a: onnx_ir.Node, b: onnx_ir.Node) -> Iterator[Detail]:
        if op_text(a) != op_text(b):
            yield Detail("op", op_text(a), op_text(b))
        if self._moved(a, b):
            yield Detail("graph", self._place(a, self.a), self._place(b, self.b))
        yield from self._attributes(a, b)
        yield from self._inputs(a, b)
        for x_out, y_out in zip(a.outputs, b.outputs, strict=False):
            if not _may_be(x_out, y_out):
                yield Detail(f"type of {y_out.name}", type_text(x_out), type_text(y_out))
        for graph, twin in zip(views.subgraphs(a), views.subgraphs(b), strict=False):
            outs, twin_outs = list(graph.outputs), list(twin.outputs)
            if len(outs) != len(twin_outs) or not all(map(self.matching.same, outs, twin_outs)):
                yield Detail(f"results of {graph.name or 'graph'}", _names(outs), _names(twin_outs))

    def _place(self, node: onnx_ir.Node, side: Side) -> str:
        holder = _holder(node, side)
        return "main" if holder is None else f"in {side.titles[holder]}"

    def _moved(self, a: onnx_ir.Node, b: onnx_ir.Node) -> bool:
        x, y = _holder(a, self.a), _holder(b, self.b)
        if x is None or y is None:
            return x is not y
        return self.matching.nodes.get(x) is not y

    def _attributes(self, a: onnx_ir.Node, b: onnx_ir.Node) -> Iterator[Detail]:
        for name in sorted({*a.attributes, *b.attributes}):
            x, y = a.attributes.get(name), b.attributes.get(name)
            if x is y or any(z is not None and z.type in _GRAPHS and not z.is_ref() for z in (x, y)):
                continue
            texts = [_NONE if z is None or is_implied(n, z) else attribute_text(z) for n, z in ((a, x), (b, y))]
            if texts[0] != texts[1]:
                yield Detail(name, *texts)

    def _inputs(self, a: onnx_ir.Node, b: onnx_ir.Node) -> Iterator[Detail]:
        first, second = _trimmed(a), _trimmed(b)
        if len(first) != len(second) or not all(map(self.matching.same, first, second)):
            yield Detail("inputs", _names(first), _names(second))
        for x, y in zip(first, second, strict=False):
            if x is None or y is None or not self.matching.same(x, y):
                continue
            old, new = constant_of(x), constant_of(y)
            if old is not None and new is not None and not same_tensor(old, new):
                yield Detail(f"weight {y.name}", tensor_text(old), tensor_text(new))

    def _weights(self) -> Iterator[Change]:
        first, second = _constants(self.a), _constants(self.b)
        was_named, named = (
            {str(v.name): v for n in side.titles for v in n.outputs if v.name} for side in (self.a, self.b)
        )
        kept = set()
        for value in first:
            twin = self.matching.values.get(value)
            if twin is None and not self.matching.by_structure:
                twin = named.get(str(value.name))
            kept.add(twin)
            if (change := self._weight(value, twin)) is not None:
                yield change
        for value in second:
            if value in kept:
                continue
            was = None if self.matching.by_structure else was_named.get(str(value.name))
            if was is not None and (change := self._weight(was, value)) is None:
                continue
            maker = was.producer() if was is not None else None
            details = (Detail("made by", op_text(maker), "stored"),) if maker is not None else ()
            yield Change("weight", "added", str(value.name), type_text(value), self._layer(value, 1), details)

    def _weight(self, a: onnx_ir.Value, b: onnx_ir.Value | None) -> Change | None:
        if b is None:
            return Change("weight", "removed", str(a.name), type_text(a), self._layer(a, 0))
        old, new = constant_of(a), constant_of(b)
        if old is not None and new is not None and same_tensor(old, new):
            return None
        maker = b.producer()
        after = tensor_text(new) if new is not None else f"made by {op_text(maker)}" if maker else "an input"
        detail = Detail("stored", tensor_text(old) if old is not None else "computed", after)
        return Change("weight", "changed", str(b.name), type_text(b), self._layer(b, 1), (detail,))

    def _layer(self, value: onnx_ir.Value, side: int) -> str:
        return self.stores[side].owners.get(value) or layer_of(value)

    def _functions(self) -> Iterator[Change]:
        first, second = ({i: f for i, f in side.model.functions.items() if i[0] != DOMAIN} for side in (self.a, self.b))
        for identifier in sorted({*first, *second}):
            name = ".".join(identifier[:2])
            if identifier not in second:
                yield Change("function", "removed", name, "")
            elif identifier not in first:
                yield Change("function", "added", name, "")
            elif (x := _body(first[identifier])) != (y := _body(second[identifier])):
                yield Change("function", "changed", name, "", "", (Detail("body", x, y),))

    # ---- what has another name

    def renames(self) -> Iterator[Rename]:
        for node, twin in self.matching.nodes.items():
            if self.a.titles[node] != self.b.titles[twin]:
                yield Rename("node", self.a.titles[node], self.b.titles[twin])
        for value, other in self.matching.values.items():
            if value.name != other.name and value.name and other.name:
                yield Rename("value", value.name, other.name)

    # ---- who changed it

    def explained(self, changes: Iterable[Change]) -> tuple[Change, ...]:
        history = since(read_history(self.a.model), read_history(self.b.model))
        was = {self.b.titles[b]: self.a.titles[a] for a, b in self.matching.nodes.items()}
        value_was = {str(b.name): str(a.name) for a, b in self.matching.values.items()}
        return tuple(
            dataclasses.replace(change, by=self._by(change, history, was=was, value_was=value_was))
            for change in changes
        )

    def _by(
        self, change: Change, history: tuple[Touched, ...], *, was: Mapping[str, str], value_was: Mapping[str, str]
    ) -> tuple[Origin, ...]:
        if change.what != "node":
            return origins(history, values={change.name, value_was.get(change.name, change.name)})
        found = origins(history, nodes={change.name, was.get(change.name, change.name)})
        node = self.b.nodes.get(change.name) if change.kind == "added" or not found else None
        own = own_origin(node) if node is not None and change.kind != "removed" else None
        named = tuple(o for o in found if o.rule or own is None)
        return named if own is None or own in named else (own, *named)


def _holder(node: onnx_ir.Node, side: Side) -> onnx_ir.Node | None:
    return side.holders.get(node.graph) if isinstance(node.graph, onnx_ir.Graph) else None


def own_origin(node: onnx_ir.Node) -> Origin | None:
    """The pass and rule that a node says it was made by."""
    made_by = node.metadata_props.get(PASS)
    return Origin(made_by, node.metadata_props.get(RULE, "")) if made_by else None


def op_text(node: onnx_ir.Node) -> str:
    """`Conv`, `com.microsoft.Gelu`."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


_NONE = "-"


def _or_none(value: object) -> str:
    return _NONE if value is None else str(value)


def _trimmed(node: onnx_ir.Node) -> list[onnx_ir.Value | None]:
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _names(values: Iterable[onnx_ir.Value | None]) -> str:
    return ", ".join(_NONE if v is None else str(v.name) for v in values)


def _constants(side: Side) -> list[onnx_ir.Value]:
    return [v for g in side.model.graphs() for v in g.initializers.values() if not v.is_graph_input()]


def _may_be(a: onnx_ir.Value, b: onnx_ir.Value) -> bool:
    """Whether two stated types may be of one value: what is not known in one of them, or symbolic, fits anything."""
    if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
        return False
    if a.shape is None or b.shape is None:
        return True
    return len(a.shape) == len(b.shape) and all(
        x == y or not isinstance(x, int) or not isinstance(y, int) for x, y in zip(a.shape, b.shape, strict=True)
    )


def _body(function: onnx_ir.Function) -> str:
    graph = onnx_ir.Graph((), (), nodes=())
    holder = onnx_ir.Model(graph, ir_version=10, functions=(function,))
    return to_text(holder).partition("\n")[2].partition("\n")[2]
