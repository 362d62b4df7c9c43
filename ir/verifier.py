"""Check that a model is sound: names, types, order, our ops and their functions, and onnx's own checker.

(The file is not called `verify`: a module of that name would take the place of the function in `mc_opt.ir`.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, assert_never

import onnx
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.infer import misfit
from mc_opt.ir.op import DOMAIN, VERSION, find_op, is_ours, where
from mc_opt.ir.views import find_cycle, subgraphs

Level = Literal["full", "structure"]

OLDEST_OPSET = 21
OLDEST_IR = 10
# The checker reads small constants (axes, shapes, paddings); larger ones it gets as inputs of their type.
_SMALL = 1024
_STANDARD = ("", "ai.onnx")
_MEND = "correct the node, or the shape of an input"


def verify(model: onnx_ir.Model, *, level: Level = "full") -> None:
    """Check a model; nothing is changed.

    Args:
        model: the model.
        level: `structure` checks names, types, order, our ops and their functions; `full` also what only the
            data of our ops shows, and runs onnx's checker with strict shape inference, without the weights.

    Raises:
        IRError: for the first thing that is wrong: where, what, and what to do.
    """
    match level:
        case "full" | "structure":
            pass
        case _:
            assert_never(level)
    _check_imports(model)
    _Walk(model).graph(model.graph)
    for function in model.functions.values():
        if function.domain != DOMAIN:
            _Walk(model, typed=False).function(function)
    _check_functions(model)
    if level == "full":
        for node in _nodes(model):
            if is_ours(node):
                find_op(node.op_type).check_data(node)
        _run_checker(model)


def _nodes(model: onnx_ir.Model) -> Iterable[onnx_ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        if function.domain != DOMAIN:
            yield from function.all_nodes()


def _check_imports(model: onnx_ir.Model) -> None:
    opset = model.opset_imports.get("")
    if opset is None or opset < OLDEST_OPSET:
        raise IRError(f"model: opset is {opset}, expected {OLDEST_OPSET} or newer; read it with ir.load_model")
    if model.ir_version < OLDEST_IR:
        raise IRError(f"model: IR version is {model.ir_version}, expected {OLDEST_IR} or newer; use ir.load_model")
    for node in _nodes(model):
        if node.domain not in model.opset_imports and node.domain not in _STANDARD:
            advice = "call ir.add_functions" if is_ours(node) else f"add opset_imports[{node.domain!r}]"
            raise IRError(f"{where(node)}: domain {node.domain!r} is not among the model's imports; {advice}")
        if node.domain in _STANDARD and not onnx.defs.has(node.op_type, opset, ""):
            raise IRError(f"{where(node)}: opset {opset} has no op {node.op_type!r}; correct its name or its domain")
    if model.opset_imports.get(DOMAIN, VERSION) != VERSION:
        raise IRError(
            f"model: {DOMAIN} has version {model.opset_imports[DOMAIN]}, expected {VERSION}; "
            "the file was made by another version of mc-opt"
        )


class _Walk:
    """One walk in order through a graph and what it holds, knowing which value each name means at that point."""

    def __init__(self, model: onnx_ir.Model, *, typed: bool = True) -> None:
        self.model = model
        self.typed = typed
        self.known: dict[str, onnx_ir.Value] = {}
        # Values of foreign ops, whose types nobody knows, and what is computed from them.
        self.untyped: set[onnx_ir.Value] = set()

    def graph(self, graph: onnx_ir.Graph) -> None:
        added: list[str] = []
        for value in graph.inputs:
            self._define(value, "an input", added)
            self._check_type(value, None)
        for name, value in graph.initializers.items():
            self._check_initializer(name, value)
            if not value.is_graph_input():
                self._define(value, "an initialiser", added)
        for node in graph:
            self._node(node, added)
        self._outputs(graph.outputs, f"graph {graph.name!r}")
        if graph is self.model.graph:
            _check_parted(graph)
        for name in added:
            del self.known[name]

    def function(self, function: onnx_ir.Function) -> None:
        added: list[str] = []
        for value in function.inputs:
            self._define(value, "an input", added)
        for node in function:
            self._node(node, added)
        self._outputs(function.outputs, f"function {function.domain}.{function.name}")

    def _node(self, node: onnx_ir.Node, added: list[str]) -> None:
        for value in node.inputs:
            if value is not None and self.known.get(value.name or "") is not value:
                raise self._undefined(value, where(node))
        for inner in subgraphs(node):
            self.graph(inner)
        if is_ours(node):
            _check_ours(node)
        for output in node.outputs:
            if output.name:
                self._define(output, f"an output of {node.op_type} {node.name or ''}".rstrip(), added)
                self._check_type(output, node)
            elif output.uses() or output.is_graph_output():
                raise IRError(f"{where(node)}: output {output.index()} is used and has no name; name it")

    def _define(self, value: onnx_ir.Value, role: str, added: list[str]) -> None:
        name = value.name
        if not name:
            raise IRError(f"{role.removeprefix('an ')} of the graph has no name, expected one; name it")
        if name in self.known:
            other = self.known[name]
            made = other.producer()
            first = f"made by {where(made)}" if made is not None else "an input or an initialiser"
            raise IRError(
                f"{name}: the name stands for two values ({first}, and {role}), expected one; "
                "take new names from ir.free_name"
            )
        self.known[name] = value
        added.append(name)

    def _check_initializer(self, name: str, value: onnx_ir.Value) -> None:
        if value.name != name:
            raise IRError(f"{name}: the initialiser registered so is called {value.name!r}; register it again")
        if value.producer() is not None:
            raise IRError(f"{name}: an initialiser that a node also makes; remove it from the initialisers")
        tensor = value.const_value
        if tensor is None:
            raise IRError(f"{name}: an initialiser without data; set const_value, or remove it")
        dims = tuple(value.shape) if value.shape is not None else None
        if value.dtype != tensor.dtype or dims != tuple(tensor.shape):
            raise IRError(
                f"{name}: the initialiser is typed {value.dtype}{list(dims or ())}, but its data is {tensor.dtype}"
                f"{list(tensor.shape)}; set type and shape with const_value"
            )

    def _check_type(self, value: onnx_ir.Value, node: onnx_ir.Node | None) -> None:
        if value.type is not None or not self.typed:
            return
        if node is None:
            # The inputs of a loop's body may be typed by the loop alone.
            if value.graph is self.model.graph:
                raise IRError(f"{value.name}: the input has no type, expected one; set value.type")
            self.untyped.add(value)
            return
        inner = [o for graph in subgraphs(node) for o in graph.outputs]
        foreign = node.domain not in _STANDARD and not is_ours(node)
        if foreign or any(v is not None and v in self.untyped for v in (*node.inputs, *inner)):
            self.untyped.add(value)
        elif value.uses() or value.is_graph_output():
            reason = misfit(node, self.model)
            if reason is not None:
                raise IRError(f"{reason}; {_MEND}")
            raise IRError(f"{where(node)}: output {value.name!r} has no type, expected one; set type and shape")

    def _outputs(self, outputs: Iterable[onnx_ir.Value], owner: str) -> None:
        for value in outputs:
            if self.known.get(value.name or "") is not value:
                raise self._undefined(value, f"{owner}, output {value.name!r}")

    def _undefined(self, value: onnx_ir.Value, user: str) -> IRError:
        """Why a value is not known where it is used."""
        producer = value.producer()
        if value.name in self.known:
            return IRError(f"{user} takes a second value called {value.name!r}, expected the one of the graph; rewire")
        if producer is None:
            if value.const_value is not None:
                return IRError(
                    f"{user} takes the constant {value.name!r}, which no graph holds; register it with ir.initializer"
                )
            return IRError(f"{user} takes {value.name!r}, which nothing makes; expected an input or a node's output")
        if producer.graph is None:
            return IRError(f"{user} takes {value.name!r} of {producer.op_type}, which is in no graph; insert the node")
        cycle = find_cycle(self.model)
        if cycle is not None:
            path = " -> ".join([*cycle, cycle[0]])
            return IRError(f"{user} depends on itself: {path}; expected no cycle, cut it at one of these nodes")
        return IRError(
            f"{user} takes {value.name!r} before {where(producer)} makes it, or from a subgraph that is not around "
            "it; sort the graph"
        )


def _check_parted(graph: onnx_ir.Graph) -> None:
    """A run gives its results by name, so no two outputs may be one value."""
    seen: set[onnx_ir.Value] = set()
    for value in graph.outputs:
        if value in seen:
            raise IRError(
                f"{value.name}: is an output of the graph twice, expected a name for each; copy it by an Identity"
            )
        seen.add(value)


def _check_ours(node: onnx_ir.Node) -> None:
    op = find_op(node.op_type)
    op.check(node)
    for output, (dtype, shape) in zip(node.outputs, op.types(node), strict=True):
        if output.dtype != dtype or output.shape is None or not _fits(output.shape, shape):
            dims = "unknown" if output.shape is None else list(output.shape)
            raise IRError(
                f"{where(node)}: the output is typed {output.dtype} {dims}, expected {dtype} {list(shape)}; "
                "make the node with ir.node"
            )


def _fits(stated: onnx_ir.Shape, expected: onnx_ir.Shape) -> bool:
    """Whether every dimension is the expected one; one that follows from a symbol and has no name may be any."""
    if len(stated) != len(expected):
        return False
    return all(
        a == b or b is None or (not isinstance(b, int) and b.value is None)
        for a, b in zip(stated, expected, strict=True)
    )


def _check_functions(model: onnx_ir.Model) -> None:
    """Every node of ours has its function, and that is the one our op defines."""
    expected: dict[tuple[str, str, str], bool] = {}
    for node in _nodes(model):
        if not is_ours(node):
            continue
        op = find_op(node.op_type)
        if node.overload != op.variant(node):
            raise IRError(
                f"{where(node)}: overload is {node.overload!r}, expected {op.variant(node)!r}; call ir.add_functions"
            )
        identifier = node.op_identifier()
        if identifier in expected:
            continue
        expected[identifier] = True
        held = model.functions.get(identifier)
        if held is None:
            raise IRError(f"{where(node)}: the model has no function {':'.join(identifier[1:])}; call ir.add_functions")
        if _bytes(held) != _bytes(op.function(node, model.opset_imports[""])):
            raise IRError(
                f"{where(node)}: the function {':'.join(identifier[1:])} is not what the op means; "
                "call ir.add_functions, or compress the original again"
            )


def _bytes(function: onnx_ir.Function) -> bytes:
    proto = onnx_ir.serde.serialize_function(function)
    del proto.value_info[:]  # inferred types are no part of the meaning
    return bytes(proto.SerializeToString(deterministic=True))


def _run_checker(model: onnx_ir.Model) -> None:
    proto = onnx_ir.to_proto(_without_weights(model))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        inference = isinstance(error, onnx.shape_inference.InferenceError)
        for node in model.graph.all_nodes() if inference else ():
            if node.domain in _STANDARD and (reason := misfit(node, model)) is not None:
                raise IRError(f"{reason}; {_MEND}") from error
        text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise IRError(f"model: onnx's checker says: {text}; expected a valid model, correct the node") from error


def _without_weights(model: onnx_ir.Model) -> onnx_ir.Model:
    """A clone whose larger initialisers are inputs of the main graph, so that no weight is read or copied."""
    bare = model.clone()
    taken = {v.name for v in bare.graph.inputs}
    for graph in (bare.graph, *bare.graph.subgraphs()):
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _SMALL:
                continue
            # Branches may use one name twice, and the body of a loop its own inputs: those keep their data.
            if value.is_graph_input() or value.is_graph_output() or name in taken:
                continue
            taken.add(name)
            graph.initializers.pop(name)
            value.const_value = None
            bare.graph.inputs.append(value)
    return bare
