"""The base class of the mc_opt dialect: an op's body, in standard ONNX ops, is its meaning."""

from __future__ import annotations

import abc
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.options import unknown

DOMAIN = "mc_opt"
VERSION = 1

Type = tuple[onnx_ir.DataType, onnx_ir.Shape]


@dataclass(frozen=True)
class Work:
    """What the kernel of an op does: counts of scalar operations, and the bytes it must read."""

    mul: int = 0
    add: int = 0
    shift: int = 0
    xnor: int = 0
    lookup: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Attribute:
    """An attribute of an op: its type, and the value that `node` writes when none is given."""

    type: onnx_ir.AttributeType
    default: Any = None


@dataclass(frozen=True)
class Example:
    """Arrays that an op takes (None: an optional input left out) and its attributes, for the generic tests."""

    name: str
    inputs: tuple[np.ndarray | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Body:
    """Builds a function body: `op.Add(x, y)` appends a standard node and returns its first output."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.nodes: list[onnx_ir.Node] = []
        self.inputs = {name: onnx_ir.Value(name=name) for name in inputs}

    def input(self, name: str) -> onnx_ir.Value:
        """The formal input `name` of the function."""
        return self.inputs[name]

    def constant(self, value: Any, dtype: Any = np.int64) -> onnx_ir.Value:
        """A constant tensor of the body."""
        return self.emit("Constant", [], {"value": onnx_ir.tensor(np.asarray(value, dtype))})[0]

    def ints(self, attribute: str) -> onnx_ir.Value:
        """The node's list attribute `attribute`, as a 1-D int64 tensor."""
        ref = onnx_ir.RefAttr("value_ints", attribute, onnx_ir.AttributeType.INTS)
        return self.emit("Constant", [], {"value_ints": ref})[0]

    def scalar(self, attribute: str) -> onnx_ir.Value:
        """The node's integer attribute `attribute`, as a scalar int64 tensor."""
        ref = onnx_ir.RefAttr("value_int", attribute, onnx_ir.AttributeType.INT)
        return self.emit("Constant", [], {"value_int": ref})[0]

    def emit(
        self, op_type: str, inputs: Sequence[onnx_ir.Value | None], attributes: Mapping[str, Any], outputs: int = 1
    ) -> Sequence[onnx_ir.Value]:
        """Append a node; its outputs."""
        values = [onnx_ir.Value(name=f"{op_type}_{len(self.nodes)}_{i}") for i in range(outputs)]
        values[0].name = f"{op_type}_{len(self.nodes)}"
        made = onnx_ir.node(op_type, inputs, attributes, outputs=values, name=values[0].name)
        self.nodes.append(made)
        return made.outputs

    def __getattr__(self, op_type: str) -> Callable[..., onnx_ir.Value]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)

        def append(*inputs: onnx_ir.Value | None, **attributes: Any) -> onnx_ir.Value:
            return self.emit(op_type, inputs, attributes)[0]

        return append


class Op(abc.ABC):
    """One op of the dialect; its class name is the op type, its file name the snake case of that."""

    inputs: ClassVar[tuple[str, ...]]
    """Names of the inputs; a trailing `?` marks an optional one, a trailing `*` the last one, of any number."""
    attributes: ClassVar[Mapping[str, Attribute]]
    training_form: ClassVar[bool] = False
    """Whether the op stands in a model only while it is trained; `convert` of a pass stores what it became."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Inputs that a schedule sets while a model is trained (a sharpness, a strength); they are never learned."""

    @property
    def name(self) -> str:
        """The op type."""
        return type(self).__name__

    @abc.abstractmethod
    def variant(self, node: onnx_ir.Node) -> str:
        """The overload of the node's function: everything that decides which nodes the body has."""

    @abc.abstractmethod
    def body(self, op: Body, node: onnx_ir.Node) -> onnx_ir.Value:
        """Build the meaning of `node` in standard ops; attributes are referenced, not copied."""

    @abc.abstractmethod
    def types(self, node: onnx_ir.Node) -> list[Type]:
        """The type and shape of each output."""

    @abc.abstractmethod
    def work(self, node: onnx_ir.Node) -> Work:
        """What the kernel does for this node."""

    @abc.abstractmethod
    def samples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Small inputs of every form that the op has."""

    def torch(self, node: onnx_ir.Node) -> Callable[..., Any] | None:
        """A function of the input tensors (None for one left out) that replaces the interpreted body, or None."""
        return None

    def learns(self, node: onnx_ir.Node, index: int) -> bool:
        """Whether the floating-point input at `index` can be learned: it may be a torch Parameter."""
        return self.torch(node) is not None and self.formal(len(node.inputs))[index] not in self.settings

    def row_axes(self, node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
        """The row axes of a weight at input `index`, as `weight_sites` lists them; None: the input takes no weight."""
        return None

    def check_data(self, node: onnx_ir.Node) -> None:  # noqa: B027  (an op may have nothing to check)
        """Check what only the constants' values show.

        Raises:
            IRError: for a value that the op cannot take.
        """

    def check(self, node: onnx_ir.Node) -> None:
        """Check inputs and attributes; an op adds its own conditions on types and shapes.

        Raises:
            IRError: for the first condition that does not hold.
        """
        formal = self.formal(len(node.inputs))
        optional = {name.rstrip("?") for name in self.inputs if name.endswith("?")}
        required = max((k + 1 for k, name in enumerate(formal) if name not in optional), default=0)
        if not required <= len(node.inputs) <= len(formal):
            raise IRError(
                f"{where(node)} has {len(node.inputs)} inputs, expected {' '.join(self.inputs)}; make it with ir.node"
            )
        for name, value in zip(formal, node.inputs, strict=False):
            if value is None and name not in optional:
                raise IRError(f"{where(node)}: input {name} is missing; make the node with ir.node")
        if len(node.outputs) != 1:
            raise IRError(f"{where(node)} has {len(node.outputs)} outputs, expected 1; make it with ir.node")
        for name in node.attributes:
            if name not in self.attributes:
                raise IRError(f"{where(node)}: {unknown('attribute', name, self.attributes)}; remove it")
        for name, attribute in self.attributes.items():
            if name not in node.attributes:
                raise IRError(f"{where(node)}: attribute {name} is missing; make the node with ir.node")
            if node.attributes[name].type != attribute.type:
                raise IRError(
                    f"{where(node)}: attribute {name} is {node.attributes[name].type.name}, "
                    f"expected {attribute.type.name}; make the node with ir.node"
                )

    def input(self, node: onnx_ir.Node, name: str) -> onnx_ir.Value | None:
        """The value at the input called `name` (without its `?`)."""
        index = self.formal(len(node.inputs)).index(name)
        return node.inputs[index] if index < len(node.inputs) else None

    def formal(self, count: int) -> list[str]:
        """The names of the inputs without their marks, for a node of `count`: `factor*` is factor1, factor2 .."""
        *fixed, last = self.inputs
        if not last.endswith("*"):
            return [name.rstrip("?") for name in self.inputs]
        return [name.rstrip("?") for name in fixed] + [f"{last[:-1]}{k + 1}" for k in range(count - len(fixed))]

    def function(self, node: onnx_ir.Node, opset: int) -> onnx_ir.Function:
        """The model-local function that gives `node` its meaning in a model of `opset`."""
        op = Body(self.formal(len(node.inputs)))
        output = self.body(op, node)
        graph = onnx_ir.Graph(
            tuple(op.inputs.values()),
            (output,),
            nodes=op.nodes,
            opset_imports={"": opset},
            name=self.name,
        )
        declared = [onnx_ir.Attr(name, attribute.type, None) for name, attribute in self.attributes.items()]
        return onnx_ir.Function(DOMAIN, self.name, self.variant(node), graph=graph, attributes=declared)


def where(node: onnx_ir.Node) -> str:
    """How messages name a node: its output and its op."""
    output = next((o.name for o in node.outputs if o.name), None) or node.name or "?"
    return f"{output}: {node.op_type}"


def static_shape(node: onnx_ir.Node, value: onnx_ir.Value | None) -> tuple[int, ...]:
    """The shape of an input of one of our ops, which must be known.

    Raises:
        IRError: when a dimension is symbolic or the shape is missing.
    """
    if value is None or value.shape is None:
        raise IRError(f"{where(node)}: the shape of input {value.name if value else '?'!r} is unknown; set it")
    if not all(isinstance(d, int) for d in value.shape):
        raise IRError(f"{where(node)}: input {value.name!r} has shape {value.shape}, expected whole numbers; fix it")
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]  # every dim is an int here


def dtype_of(node: onnx_ir.Node, value: onnx_ir.Value | None) -> onnx_ir.DataType:
    """The element type of an input of one of our ops, which must be known.

    Raises:
        IRError: when it is not.
    """
    if value is None or value.dtype is None:
        raise IRError(f"{where(node)}: the type of input {value.name if value else '?'!r} is unknown; set it")
    return value.dtype


@functools.cache
def _ops() -> Mapping[str, Op]:
    package = importlib.import_module("mc_opt.ir.ops")
    found: dict[str, Op] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Op) and item.__module__ == module.__name__:
                found[item.__name__] = item()
    return found


def op_names() -> tuple[str, ...]:
    """The op types of the dialect, sorted."""
    return tuple(sorted(_ops()))


def find_op(name: str) -> Op:
    """The op called `name`.

    Raises:
        IRError: when the dialect has no such op; the known ones are listed.
    """
    if name not in _ops():
        raise IRError(f"{DOMAIN}.{name}: {unknown('op', name, _ops())}; the file was made by another version of mc-opt")
    return _ops()[name]


def is_ours(node: onnx_ir.Node) -> bool:
    """Whether the node is of the mc_opt dialect."""
    return node.domain == DOMAIN


def node(
    op_type: str,
    inputs: Sequence[onnx_ir.Value | onnx_ir.TensorProtocol | np.ndarray | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    output: str | None = None,
) -> onnx_ir.Node:
    """Make a node of our dialect, checked, with its output typed.

    Arrays and tensors among the inputs become constants without a name; `replace_weight` names and
    registers them.

    Raises:
        IRError: for inputs or attributes that the op cannot take.
    """
    op = find_op(op_type)
    values = [_as_value(i) for i in inputs]
    while values and values[-1] is None:
        values.pop()
    given = dict(attributes or {})
    attrs = [
        onnx_ir.Attr(key, spec.type, _plain(given.pop(key, spec.default)))
        for key, spec in op.attributes.items()
        if key in given or spec.default is not None
    ]
    attrs += [onnx_ir.convenience.convert_attribute(key, value) for key, value in given.items()]
    made = onnx_ir.Node(DOMAIN, op_type, values, attrs, num_outputs=1, name=name)
    made.outputs[0].name = output
    op.check(made)
    dtype, shape = op.types(made)[0]
    made.outputs[0].type = onnx_ir.TensorType(dtype)
    made.outputs[0].shape = shape
    made.overload = op.variant(made)
    return made


def _as_value(item: onnx_ir.Value | onnx_ir.TensorProtocol | np.ndarray | None) -> onnx_ir.Value | None:
    return item if item is None or isinstance(item, onnx_ir.Value) else constant(item)


def constant(data: onnx_ir.TensorProtocol | np.ndarray, name: str | None = None) -> onnx_ir.Value:
    """A typed value that holds `data`; it is in no graph yet."""
    tensor = onnx_ir.tensor(data) if isinstance(data, np.ndarray) else data
    shape = onnx_ir.Shape(tuple(tensor.shape.numpy()))
    return onnx_ir.Value(name=name, const_value=tensor, shape=shape, type=onnx_ir.TensorType(tensor.dtype))


def _plain(value: Any) -> Any:
    """Numpy numbers do not serialise: whole numbers and tuples of them."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(int(v) for v in value)
    return int(value)


def our_nodes(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    """Every node of our dialect: in the graph, its subgraphs, and other people's functions."""
    owners: list[Iterable[onnx_ir.Node]] = [model.graph.all_nodes()]
    owners += [f.all_nodes() for f in model.functions.values() if f.domain != DOMAIN]
    for nodes in owners:
        yield from (n for n in nodes if is_ours(n))


def add_functions(model: onnx_ir.Model) -> None:
    """Attach exactly the functions that the model's nodes of our dialect need, and drop the others of our domain.

    Raises:
        IRError: for a node that its op cannot take.
    """
    opset = model.opset_imports[""]
    needed: dict[tuple[str, str, str], onnx_ir.Function] = {}
    for made in our_nodes(model):
        op = find_op(made.op_type)
        made.overload = op.variant(made)
        if made.op_identifier() not in needed:
            needed[made.op_identifier()] = op.function(made, opset)
    for identifier in [i for i in model.functions if i[0] == DOMAIN]:
        del model.functions[identifier]
    if not needed:
        model.opset_imports.pop(DOMAIN, None)
        return
    model.opset_imports[DOMAIN] = VERSION
    for identifier in sorted(needed):
        model.functions[identifier] = needed[identifier]
