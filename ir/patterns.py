"""Rules on several nodes: onnxscript's matcher finds them, our applier replaces what was found.

onnxscript's own applier renames nodes, forgets their metadata, overwrites a constant that two matches share
and does not end when a replacement matches again; this one does none of that.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir import op as dialect
from mc_opt.ir.errors import IRError
from mc_opt.ir.infer import infer_types
from mc_opt.ir.rewrite import free, provenance
from mc_opt.ir.sites import LAYER, Skip, layer_of, names_of

OnSkip = Callable[[str, Skip], None]


class Replacement:
    """Records what a rule puts in the place of its match.

    `op.Conv(x, w, strides=[2, 2])` makes a node and returns its first output; `attributes=node.attributes`
    carries those of a matched node over, and the ops of our dialect go by their names as well. Nothing touches
    the graph until the rule has returned.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx_ir.Node] = []
        self.constants: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def constant(self, data: np.ndarray | onnx_ir.TensorProtocol, *, like: onnx_ir.Value) -> onnx_ir.Value:
        """A new constant in the place of `like`, whose name and layer it takes.

        A value that something outside the match still uses keeps its name; the constant's then derives from it.
        """
        value = dialect.constant(data)
        value.metadata_props.update(like.metadata_props)
        self.constants[value] = like
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[onnx_ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[onnx_ir.Value]:
        """Make a node of any domain; its outputs."""
        if domain == dialect.DOMAIN:
            made = dialect.node(op_type, inputs, attributes)
        else:
            attrs = onnx_ir.convenience.convert_attributes(attributes or {})
            made = onnx_ir.Node(domain, op_type, inputs, attrs, num_outputs=outputs)
        self.nodes.append(made)
        return made.outputs

    def __getattr__(self, op_type: str) -> Callable[..., onnx_ir.Value]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)

        def append(
            *inputs: onnx_ir.Value | None, attributes: Mapping[str, Any] | None = None, **more: Any
        ) -> onnx_ir.Value:
            domain = dialect.DOMAIN if op_type in dialect.op_names() else ""
            return self.node(op_type, inputs, {**(attributes or {}), **more}, domain=domain)[0]

        return append


class Rule:
    """A rewrite of several nodes: `pattern` writes the expression, `check` declines with a reason, `replace` makes
    the new one.

    A rule looks at its match alone. `check` and `replace` take by name those variables of the pattern that they
    want.
    """

    layer: ClassVar[str] = "w"
    """The variable of the pattern that names the layer when the rule declines."""

    @property
    def name(self) -> str:
        """The class name in words: `FoldBatchNorm` is `fold-batch-norm`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__.lstrip("_")).lower()

    # The subclasses name their own variables, so the three methods have no common signature.
    pattern: Callable[..., Any]
    """pattern(op, *variables): the expression to find, in onnxscript's pattern language; it ends in one node."""

    check: Callable[..., Skip | None]
    """check(**variables): the reason to leave the match alone, or None."""

    replace: Callable[..., onnx_ir.Value | Sequence[onnx_ir.Value] | Skip]
    """replace(op, **variables): one value for each output of the pattern, made with a `Replacement`."""


def apply_rules(
    model: onnx_ir.Model, rules: Sequence[Rule], *, by: str, on_skip: OnSkip = lambda layer, skip: None
) -> int:
    """Replace what the rules match, first rule first, in the graph and its subgraphs; the number of rewrites.

    An output keeps its name, type and metadata; a new node takes name and metadata of the matched node of its
    op type; constants that nothing uses any more go away.

    Args:
        model: edited in place.
        rules: tried on each node in this order; the first that matches and does not decline wins.
        by: the pass, for provenance.
        on_skip: told the layer and the reason when a rule declines.

    Raises:
        IRError: when a rule's replacement does not fit what it replaces.
    """
    matchers = [(rule, _matcher(rule)) for rule in rules]
    names = names_of(model.graph)
    count = 0
    # A snapshot: what a rule has put in is not visited, so a replacement that matches again does not loop.
    for node in list(model.graph.all_nodes()):
        for rule, matcher in matchers:
            if node.graph is None:  # a rewrite took it away
                break
            if _rewrite(model, node, rule, matcher, names=names, by=by, on_skip=on_skip):
                count += 1
                break
    return count


def _matcher(rule: Rule) -> Any:
    from onnxscript.rewriter import pattern  # 0.3 s: only passes with patterns pay for it

    expression = pattern.Pattern(rule.pattern, name=rule.name)
    if not expression._target_pattern.has_single_output_node:
        raise IRError(f"{rule.name}: the pattern ends in several nodes, expected one; split the rule")
    return expression


def _rewrite(
    model: onnx_ir.Model,
    root: onnx_ir.Node,
    rule: Rule,
    matcher: Any,
    *,
    names: set[str],
    by: str,
    on_skip: OnSkip,
) -> bool:
    graph = root.graph
    if not isinstance(graph, onnx_ir.Graph):
        return False
    match = matcher.match(model, graph, root, check_nodes_are_removable=False)
    if not match:
        return False
    bindings = dict(match.bindings)
    named = bindings.get(rule.layer)
    layer = layer_of(named) if isinstance(named, onnx_ir.Value) else layer_of(root.outputs[0])
    matched, outputs = list(dict.fromkeys(match.nodes)), list(match.outputs)
    skip = _shared(matched, outputs) or _call(getattr(rule, "check", None), bindings)
    if skip is not None:
        on_skip(layer, skip)
        return False
    op = Replacement()
    made = _call(rule.replace, {"op": op, **bindings})
    if isinstance(made, Skip):
        on_skip(layer, made)
        return False
    new = [made] if isinstance(made, onnx_ir.Value) else list(made)
    if len(new) != len(outputs):
        raise IRError(f"{layer}: {rule.name} gave {len(new)} values, expected {len(outputs)}; correct the rule")
    _apply(model, root, matched, op, list(zip(outputs, new, strict=True)), names=names, by=(by, rule.name))
    return True


def _call(method: Callable[..., Any] | None, bindings: Mapping[str, Any]) -> Any:
    """Call a rule's method with those variables that it names."""
    if method is None:
        return None
    parameters = inspect.signature(method).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return method(**bindings)
    return method(**{name: value for name, value in bindings.items() if name in parameters})


def _shared(matched: Sequence[onnx_ir.Node], outputs: Sequence[onnx_ir.Value]) -> Skip | None:
    """The reason not to remove the matched nodes: something else needs a value that they make on the way."""
    for value in (o for node in matched for o in node.outputs if o not in outputs):
        if value.is_graph_output():
            return Skip(f"{value.name!r} is also a graph output")
        for user in value.consumers():
            if user not in matched:
                return Skip(f"{value.name!r} is also used by {user.op_type} {user.name or user.outputs[0].name!r}")
    return None


def _apply(
    model: onnx_ir.Model,
    root: onnx_ir.Node,
    matched: Sequence[onnx_ir.Node],
    op: Replacement,
    pairs: Sequence[tuple[onnx_ir.Value, onnx_ir.Value]],
    *,
    names: set[str],
    by: tuple[str, str],
) -> None:
    graph = root.graph
    assert graph is not None
    operands = list(dict.fromkeys(i for node in matched for i in node.inputs if i is not None))
    for old, value in pairs:
        new = _own(op, old, value)
        if new.producer() in op.nodes:
            _take_over(old, new, by)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    _name_outputs(op.nodes, root, names)
    graph.insert_after(root, op.nodes)
    first = {node.op_type: node for node in reversed(matched)}
    for node in op.nodes:
        _sign(node, first.get(node.op_type), by)
    graph.remove(matched, safe=True)
    _drop_unused(operands)
    for value, like in op.constants.items():
        _register(graph, value, like, names)
    infer_types(op.nodes, model)


def _own(op: Replacement, old: onnx_ir.Value, value: onnx_ir.Value) -> onnx_ir.Value:
    """The value that stands for `old`: a graph output needs a node of its own to keep its name."""
    if old.is_graph_output() and value.producer() not in op.nodes:
        return op.node("Identity", [value])[0]
    return value


def _take_over(old: onnx_ir.Value, new: onnx_ir.Value, by: tuple[str, str]) -> None:
    if new.dtype is not None and old.dtype is not None and new.dtype != old.dtype:
        raise IRError(
            f"{old.name}: {by[1]} of {by[0]} makes {new.dtype}, expected {old.dtype} as before; correct the rule"
        )
    new.name, new.type, new.doc_string = old.name, old.type, old.doc_string
    new.shape = old.shape if old.shape is not None else new.shape
    new.metadata_props.update(old.metadata_props)
    old.name = None


def _name_outputs(nodes: Sequence[onnx_ir.Node], root: onnx_ir.Node, names: set[str]) -> None:
    """Values on the way take names that derive from the result's: `y.1`, `y.2`."""
    result = next((o.name for node in reversed(nodes) for o in node.outputs if o.name), None) or root.op_type
    for output in (o for node in nodes for o in node.outputs if o.name is None):
        output.name = free(result, names)
        names.add(output.name)


def _sign(node: onnx_ir.Node, like: onnx_ir.Node | None, by: tuple[str, str]) -> None:
    """Write who made the node; one that stands for a matched node keeps that one's name."""
    if like is not None:
        node.metadata_props.update(like.metadata_props)
        node.doc_string = like.doc_string
    provenance(node, by)
    if like is not None and like.name:
        node.name, like.name = like.name, None


def _drop_unused(values: Sequence[onnx_ir.Value]) -> None:
    """Remove constants that nothing uses any more, and what was computed from constants for them alone."""
    stack = list(values)
    while stack:
        value = stack.pop()
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        graph, producer = value.graph, value.producer()
        if value.is_initializer() and graph is not None and value.name is not None:
            graph.initializers.pop(value.name)
        elif producer is not None and producer.graph is not None and not any(o.uses() for o in producer.outputs):
            stack += [i for i in producer.inputs if i is not None]
            producer.graph.remove(producer, safe=True)


def _register(graph: onnx_ir.Graph, value: onnx_ir.Value, like: onnx_ir.Value, names: set[str]) -> None:
    """Name a new constant after the one it stands for, and put it into the graph if the new nodes use it."""
    if not value.uses():
        return
    if like.graph is None and like.name is not None:
        value.name, like.name = like.name, None
    else:
        value.name = free(like.name or "constant", names)
        value.metadata_props.setdefault(LAYER, layer_of(like))
    names.add(value.name)
    graph.register_initializer(value)
