"""Which rule made each change of a pass: what the pass said of it, or else the nearest change that it did say so of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Log

Thing = tuple[str, str]
"""A node ("node") or anything else that has a name ("value")."""


def record(old: onnx_ir.Model, new: onnx_ir.Model, *, made_by: str, log: Log) -> None:
    """Write into `new` what a pass did to `old`: every node and constant that changed, by rule, and what was renamed.

    A rule comes from the pass itself: on the nodes that it signed, and by `ctx.did`. It reaches what is connected to
    these: a constant that a removed node took, a node that lost its only use, one whose result another now makes.
    """
    found = ir.diff(old, new)
    changed = {_thing(change): change for change in found.changes}
    rules = _said(changed, new, made_by=made_by, log=log)
    for thing, change in changed.items():
        if change.what == "output" and change.kind == "changed":
            rules.setdefault(thing, "type inferred again")
    _spread(rules, changed, _links(changed, old, new))
    touched: dict[str, dict[str, list[str]]] = {}
    for thing, change in changed.items():
        rule = rules.get(thing, log.rule)
        signed = change.kind == "added" and ir.Origin(made_by, rule) in change.by
        if not signed:
            touched.setdefault(rule, {"node": [], "value": []})[thing[0]].append(thing[1])
    for thing, rule in _renamed(found, log).items():
        touched.setdefault(rule, {"node": [], "value": []})[thing[0]].append(thing[1])
    entries = [
        ir.Touched(ir.Origin(made_by, rule), tuple(names["node"]), tuple(names["value"]))
        for rule, names in sorted(touched.items())
    ]
    if found.renames:
        renamed: dict[str, dict[str, str]] = {"node": {}, "value": {}}
        for rename in found.renames:
            renamed[rename.what][rename.before] = rename.after
        entries.append(ir.Touched(ir.Origin(made_by, ""), (), (), renamed["node"], renamed["value"]))
    ir.add_history(new, entries)


def _renamed(found: ir.Diff, log: Log) -> dict[Thing, str]:
    """What the pass said that it removes and the diff takes as renamed: a later pass may leave no likeness to match."""
    before = [("node" if rename.what == "node" else "value", rename.before) for rename in found.renames]
    return {thing: log.rules[thing] for thing in before if thing in log.rules}


def _thing(change: ir.Change) -> Thing:
    return ("node" if change.what == "node" else "value", change.name)


def _said(changed: Mapping[Thing, ir.Change], new: onnx_ir.Model, *, made_by: str, log: Log) -> dict[Thing, str]:
    """The rules that the pass stated: by `ctx.did`, or on a node that it signed."""
    rules = {thing: rule for thing, rule in log.rules.items() if thing in changed}
    for node, title in ir.titles_of(new).items():
        thing = ("node", title)
        origin = ir.own_origin(node)
        if thing in changed and origin is not None and origin.made_by == made_by and origin.rule:
            rules.setdefault(thing, origin.rule)
    return rules


def _links(changed: Mapping[Thing, ir.Change], old: onnx_ir.Model, new: onnx_ir.Model) -> dict[Thing, list[Thing]]:
    """What each change is connected to: by a value that one makes or is and the other takes or makes, or by holding."""
    makers: dict[str, set[Thing]] = defaultdict(set)
    users: dict[str, set[Thing]] = defaultdict(set)
    links: dict[Thing, dict[Thing, None]] = defaultdict(dict)
    for thing in changed:
        if thing[0] == "value":
            makers[thing[1]].add(thing)
    for model in (old, new):
        titles = ir.titles_of(model)
        for node, holder in _nodes(model.graph, None):
            thing = ("node", titles[node])
            if thing not in changed:
                continue
            for value in node.outputs:
                makers[str(value.name)].add(thing)
            for taken in node.inputs:
                if taken is not None:
                    users[str(taken.name)].add(thing)
            if holder is not None and (above := ("node", titles[holder])) in changed:
                links[thing][above] = links[above][thing] = None
    for name, things in makers.items():
        for one in things:
            for other in things | users[name]:
                if one != other:
                    links[one][other] = links[other][one] = None
    order = {thing: i for i, thing in enumerate(changed)}
    return {thing: sorted(others, key=order.__getitem__) for thing, others in links.items()}


def _nodes(graph: onnx_ir.Graph, holder: onnx_ir.Node | None) -> Iterator[tuple[onnx_ir.Node, onnx_ir.Node | None]]:
    for node in graph:
        yield node, holder
        for inner in ir.subgraphs(node):
            yield from _nodes(inner, node)


def _spread(rules: dict[Thing, str], changed: Mapping[Thing, ir.Change], links: Mapping[Thing, list[Thing]]) -> None:
    """Give every change that is connected to one with a rule the rule of the nearest, of the first among equals."""
    edge = [thing for thing in changed if thing in rules]
    while edge:
        reached: list[Thing] = []
        for thing in edge:
            for other in links.get(thing, ()):
                if other not in rules:
                    rules[other] = rules[thing]
                    reached.append(other)
        edge = reached
