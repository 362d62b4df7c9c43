"""The interpreter: a model as a differentiable `torch.fx.GraphModule`, for training and as an oracle of meaning.

The module takes the model's inputs in order (or by the names in `names(module).inputs`) and returns a tuple in the
order of the model's outputs; `mc_opt.ir.run.module` runs it by ONNX names and writes its weights back.
"""

from __future__ import annotations

import inspect
import keyword
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir
import torch

from mc_opt.ir.errors import IRError, UnsupportedError
from mc_opt.ir.op import DOMAIN, find_op
from mc_opt.ir.run.module import Names
from mc_opt.ir.run.standard import home, tables
from mc_opt.ir.run.standard.control import Branches, Call
from mc_opt.ir.run.standard.dtypes import to_torch
from mc_opt.ir.run.standard.normal import BatchNorm

_STANDARD = ("", "ai.onnx")

# Inputs that say how an op works: they are never trained.
_SETTINGS = {
    "Clip": (1, 2),
    "Dropout": (1, 2),
    "OneHot": (1, 2),
    "Pad": (2,),
    "Pow": (1,),  # the gradient to an exponent is NaN for a negative base
    "Range": (0, 1, 2),
    "Resize": (1, 2),
}


def interpret(model: onnx_ir.Model, *, training: bool = False, taps: Sequence[str] = ()) -> torch.fx.GraphModule:
    """The model as a torch.fx graph of the same meaning.

    Args:
        model: the model.
        training: make each BatchNormalization a module that takes the statistics of the batch in training mode, and
            keeps its own, which are buffers then, as running means; keep Parameters in fp32 and round them at every
            use, as half precision has no room for small steps.
        taps: names of values of the main graph that forward returns after the outputs.

    Each initialiser is stored once: as a Parameter when it is floating point and feeds an ordinary op or a training
    form, as a buffer when it is whole numbers, a number of a formula (an epsilon, an exponent, a bound of Clip), a mask
    of infinities, or feeds only stored forms such as Lookup. Every fx node that stands for a value has that value's
    name as `node.meta["onnx"]`.

    Raises:
        IRError: for an op without a torch meaning; the text names the node and the file where it would live. For a
            tap that the model has not.
    """
    builder = _Builder(model, training=training)
    graph = torch.fx.Graph()
    scope = _Scope(builder, graph, builder.root)
    inputs: dict[str, str] = {}
    taken = {"self"}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.name is not None
        inputs[value.name] = _identifier(value.name, taken)
        scope.define(value, graph.placeholder(inputs[value.name]))
    scope.emit(model.graph)
    graph.output((*(scope.get(value) for value in model.graph.outputs), *scope.taps(taps)))
    module = torch.fx.GraphModule(builder.root, graph)
    outputs = tuple(value.name or "" for value in model.graph.outputs)
    module.meta["onnx"] = Names(inputs, builder.tensors, outputs, tuple(taps))
    return module


def learned(model: onnx_ir.Model) -> tuple[str, ...]:
    """The initialisers that `interpret(model, training=True)` makes parameters, in the order of the model."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    floats = (v for v in values if v.dtype is not None and v.dtype.is_floating_point())
    return tuple(
        str(v.name)
        for v in floats
        if v.const_value is not None and _is_trained(v, to_torch(v.const_value), training=True)
    )


class _Builder:
    """The root module that all tensors live in, and what the scopes share."""

    def __init__(self, model: onnx_ir.Model, *, training: bool) -> None:
        self.model = model
        self.training = training
        self.root = torch.nn.Module()
        self.tensors: dict[str, str] = {}
        self.rounded: dict[str, torch.dtype] = {}  # by torch name, what a tensor is used in
        self._targets: dict[onnx_ir.Value, str] = {}
        # By identity, as attributes have no hash; each is held here, so that its identity stays its own.
        self._constants: dict[int, tuple[onnx_ir.Attr, str]] = {}
        self._taken: set[str] = set()

    def initialiser(self, value: onnx_ir.Value) -> str:
        """The torch name of an initialiser, which is stored at its first use."""
        if value not in self._targets:
            if value.const_value is None:
                raise IRError(f"{value.name}: no node, input or initialiser makes this value; check the model")
            tensor = to_torch(value.const_value)
            trained = _is_trained(value, tensor, training=self.training)
            half = self.training and trained and tensor.dtype in (torch.float16, torch.bfloat16)
            name = self._store(value.name or "constant", tensor.float() if half else tensor, trained=trained)
            if half:
                self.rounded[name] = tensor.dtype
            self._targets[value] = name
            self.tensors[name] = value.name or ""
        return self._targets[value]

    def constant(self, attribute: onnx_ir.Attr, name: str) -> str:
        """The torch name of a tensor that an attribute gives; one attribute object is stored once."""
        if id(attribute) not in self._constants:
            self._constants[id(attribute)] = attribute, self._store(name, _attribute_tensor(attribute), trained=False)
        return self._constants[id(attribute)][1]

    def free_name(self, name: str) -> str:
        """A new torch name that resembles `name`."""
        return _identifier(name, self._taken)

    def _store(self, name: str, tensor: torch.Tensor, *, trained: bool) -> str:
        name = self.free_name(name)
        if trained:
            self.root.register_parameter(name, torch.nn.Parameter(tensor))
        else:
            self.root.register_buffer(name, tensor)
        return name


class _Scope:
    """One fx graph under construction, or the body of a function that is inlined into one.

    A branch of an If is a graph of its own (`outer` is set): what it uses from outside becomes a placeholder, listed
    in `captured`. A function body shares the graph of its `caller` but sees none of its values. Submodules belong to
    `root`, one for each graph; tensors all belong to the outermost one.
    """

    def __init__(
        self,
        builder: _Builder,
        graph: torch.fx.Graph,
        root: torch.nn.Module,
        *,
        outer: _Scope | None = None,
        caller: _Scope | None = None,
        attributes: Mapping[str, onnx_ir.Attr] | None = None,
    ) -> None:
        self.builder = builder
        self.graph = graph
        self.root = root
        self.outer = outer
        self.caller = caller
        self.attributes = attributes or {}
        self.captured: list[onnx_ir.Value | str] = []
        self._known: dict[onnx_ir.Value | str, torch.fx.Node | None] = {}

    def define(self, value: onnx_ir.Value, node: torch.fx.Node) -> None:
        """Say which fx node stands for a value."""
        if "onnx" not in node.meta:
            node.meta["onnx"] = value.name
        self._known[value] = node

    def get(self, key: onnx_ir.Value | str | None) -> torch.fx.Node | None:
        """The fx node of a value, or of a tensor of the root module by its torch name."""
        if key is None:
            return None
        if key not in self._known:
            self._known[key] = self._fetch(key)
        return self._known[key]

    def _fetch(self, key: onnx_ir.Value | str) -> torch.fx.Node:
        if self.outer is not None:
            first = next(iter(self.graph.nodes), None)
            self.captured.append(key)
            with self.graph.inserting_before(first):
                return self.graph.placeholder(f"outer_{len(self.captured)}")
        if self.caller is not None:
            if not isinstance(key, str):
                raise IRError(f"{key.name}: a function body uses this value and nothing in it makes it")
            node = self.caller.get(key)
            assert node is not None
            return node
        name = key if isinstance(key, str) else self.builder.initialiser(key)
        node = self.graph.get_attr(name)
        node.meta["onnx"] = self.builder.tensors.get(name, name)
        if name in self.builder.rounded:
            return self.graph.call_method("to", (node, self.builder.rounded[name]))
        return node

    def taps(self, names: Sequence[str]) -> list[torch.fx.Node]:
        """The fx nodes of the values with these names."""
        known = {str(v.name): node for v, node in self._known.items() if isinstance(v, onnx_ir.Value) and node}
        for name in names:
            if name not in known:
                raise IRError(f"{name}: no value of the main graph has this name, a tap was expected to be one")
        return [known[name] for name in names]

    def emit(self, nodes: Iterable[onnx_ir.Node]) -> None:
        """Append the meaning of each node."""
        for node in nodes:
            self._emit(node)

    def _emit(self, node: onnx_ir.Node) -> None:
        attributes = self._resolved(node)
        if node.domain in _STANDARD and node.op_type == "Constant":
            self._constant(node, attributes)
        elif node.domain in _STANDARD and node.op_type == "If":
            self._branch(node, attributes)
        elif node.domain == DOMAIN:
            self._ours(node, attributes)
        elif self.builder.training and node.domain in _STANDARD and node.op_type == "BatchNormalization":
            self._batch_norm(node, attributes)
        elif node.op_identifier() in self.builder.model.functions:
            self._inline(self.builder.model.functions[node.op_identifier()], node, attributes)
        else:
            self._standard(node, attributes)

    def _resolved(self, node: onnx_ir.Node) -> dict[str, onnx_ir.Attr]:
        """The node's attributes; references are looked up in the function call, and left out when not given."""
        resolved = {}
        for name, attribute in node.attributes.items():
            given = self.attributes.get(attribute.ref_attr_name or "") if attribute.is_ref() else attribute
            if given is not None:
                resolved[name] = given
        return resolved

    def _constant(self, node: onnx_ir.Node, attributes: Mapping[str, onnx_ir.Attr]) -> None:
        if len(attributes) != 1:
            raise IRError(
                f"{_where(node)} has attributes {', '.join(attributes) or 'none'}, expected exactly one value"
            )
        (attribute,) = attributes.values()
        found = self.get(self.builder.constant(attribute, node.outputs[0].name or "constant"))
        assert found is not None
        self.define(node.outputs[0], found)

    def _standard(self, node: onnx_ir.Node, attributes: Mapping[str, onnx_ir.Attr]) -> None:
        single, multiple = tables()
        handler = multiple.get(node.op_type) or single.get(node.op_type)
        if handler is None or node.domain not in _STANDARD:
            op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            file = home(node.domain, node.op_type)
            raise UnsupportedError(f"{_where(node)}: {op} has no torch meaning; it would live in {file}")
        arguments = _trimmed([self.get(value) for value in node.inputs])
        settings = {name: self._setting(node, attribute) for name, attribute in attributes.items()}
        _check_signature(node, handler, arguments, settings)
        called = self.graph.call_function(handler, arguments, settings)
        self._define_outputs(node, called, is_tuple=node.op_type in multiple)

    def _setting(self, node: onnx_ir.Node, attribute: onnx_ir.Attr) -> Any:
        match attribute.type:
            case onnx_ir.AttributeType.TENSOR:
                return self.get(self.builder.constant(attribute, f"{node.outputs[0].name}.{attribute.name}"))
            case onnx_ir.AttributeType.INTS | onnx_ir.AttributeType.FLOATS | onnx_ir.AttributeType.STRINGS:
                return list(attribute.value)
            case _:
                return attribute.value

    def _define_outputs(self, node: onnx_ir.Node, called: torch.fx.Node, *, is_tuple: bool) -> None:
        if not is_tuple and any(value.name and value.uses() for value in node.outputs[1:]):
            raise UnsupportedError(
                f"{_where(node)}: only the first output has a torch meaning; remove the use of the others"
            )
        if not is_tuple:
            self.define(node.outputs[0], called)
            return
        for index, value in enumerate(node.outputs):
            if value.name:
                self.define(value, self.graph.call_function(operator.getitem, (called, index)))

    def _ours(self, node: onnx_ir.Node, attributes: Mapping[str, onnx_ir.Attr]) -> None:
        op = find_op(node.op_type)
        override = op.torch(node)
        if override is None:
            function = self.builder.model.functions.get(node.op_identifier())
            opset = self.builder.model.opset_imports.get("", 21)
            self._inline(function or op.function(node, opset), node, attributes)
            return
        arguments = _trimmed([self.get(value) for value in node.inputs])
        self.define(node.outputs[0], self._call_module(node, Call(override), arguments))

    def _batch_norm(self, node: onnx_ir.Node, attributes: Mapping[str, onnx_ir.Attr]) -> None:
        settings = {name: self._setting(node, attribute) for name, attribute in attributes.items()}
        arguments = tuple(self.get(value) for value in node.inputs)
        self._define_outputs(node, self._call_module(node, BatchNorm(**settings), arguments), is_tuple=False)

    def _call_module(self, node: onnx_ir.Node, module: torch.nn.Module, arguments: tuple[Any, ...]) -> torch.fx.Node:
        name = self.builder.free_name(f"{node.op_type}_{node.outputs[0].name}")
        self.root.add_module(name, module)
        return self.graph.call_module(name, arguments)

    def _inline(self, function: onnx_ir.Function, node: onnx_ir.Node, attributes: Mapping[str, onnx_ir.Attr]) -> None:
        defaults = {name: a for name, a in function.attributes.items() if a.value is not None}
        body = _Scope(self.builder, self.graph, self.root, caller=self, attributes=defaults | dict(attributes))
        for index, formal in enumerate(function.inputs):
            given = node.inputs[index] if index < len(node.inputs) else None
            body._known[formal] = self.get(given)  # None: an optional input left out
        body.emit(function)
        for formal, value in zip(function.outputs, node.outputs, strict=False):
            made = body.get(formal)
            assert made is not None
            self.define(value, made)

    def _branch(self, node: onnx_ir.Node, attributes: Mapping[str, onnx_ir.Attr]) -> None:
        condition = node.inputs[0]
        assert condition is not None
        bodies = [attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        constant = onnx_ir.convenience.get_const_tensor(condition)
        if constant is not None and not condition.is_graph_input():
            body = bodies[0] if bool(constant.numpy()) else bodies[1]
            self.emit(body)
            for inner, value in zip(body.outputs, node.outputs, strict=True):
                made = self.get(inner)
                assert made is not None
                self.define(value, made)
            return
        modules, captures = [], []
        for body in bodies:
            scope = _Scope(self.builder, torch.fx.Graph(), torch.nn.Module(), outer=self, attributes=self.attributes)
            scope.emit(body)
            scope.graph.output(tuple(scope.get(value) for value in body.outputs))
            modules.append(torch.fx.GraphModule(scope.root, scope.graph))
            # Placeholders stand in the order of insertion, the last one first.
            captures.append(tuple(self.get(key) for key in reversed(scope.captured)))
        called = self._call_module(node, Branches(*modules), (self.get(condition), *captures))
        self._define_outputs(node, called, is_tuple=True)


def _is_trained(value: onnx_ir.Value, tensor: torch.Tensor, *, training: bool) -> bool:
    used = value.is_graph_output() or any(_trains(node, index, training) for node, index in value.uses())
    return used and tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def _trains(node: onnx_ir.Node, index: int, training: bool) -> bool:
    if node.domain == DOMAIN:
        return find_op(node.op_type).learns(node, index)
    value = node.inputs[index]
    if value is not None and value.shape is not None and not value.shape:
        return False  # a number of a formula: a step below 0 of an epsilon makes NaN of what was near it
    if training and node.op_type == "BatchNormalization" and index in (3, 4):
        return False  # running statistics follow the batches, no gradient
    return index not in _SETTINGS.get(node.op_type, ())


def _attribute_tensor(attribute: onnx_ir.Attr) -> torch.Tensor:
    match attribute.type:
        case onnx_ir.AttributeType.TENSOR:
            return to_torch(attribute.as_tensor())
        case onnx_ir.AttributeType.INT | onnx_ir.AttributeType.INTS:
            return torch.tensor(attribute.value, dtype=torch.int64)
        case onnx_ir.AttributeType.FLOAT | onnx_ir.AttributeType.FLOATS:
            return torch.tensor(attribute.value, dtype=torch.float32)
        case _:
            raise IRError(f"Constant {attribute.name}: torch has no tensors of {attribute.type.name.lower()}")


def _check_signature(
    node: onnx_ir.Node, handler: Callable[..., Any], arguments: tuple[Any, ...], settings: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(handler)
    except ValueError:  # torch's own functions have none
        if settings:
            raise IRError(f"{_where(node)}: attribute {', '.join(settings)} is unknown for {node.op_type}") from None
        return
    try:
        signature.bind(*arguments, **settings)
    except TypeError as error:
        raise IRError(f"{_where(node)}: {node.op_type} does not fit its torch meaning: {error}") from error


def _trimmed(arguments: list[torch.fx.Node | None]) -> tuple[torch.fx.Node | None, ...]:
    """Arguments without the missing ones at the end."""
    while arguments and arguments[-1] is None:
        arguments.pop()
    return tuple(arguments)


def _identifier(name: str, taken: set[str]) -> str:
    """A free Python identifier that resembles `name`."""
    base = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
    base = f"v_{base}" if not base[:1].isalpha() or keyword.iskeyword(base) else base
    candidate, count = base, 1
    while candidate in taken or hasattr(torch.nn.Module, candidate):
        candidate, count = f"{base}_{count}", count + 1
    taken.add(candidate)
    return candidate


def _where(node: onnx_ir.Node) -> str:
    return node.name or next((value.name for value in node.outputs if value.name), None) or node.op_type
