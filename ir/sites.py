"""Where a model's weights are, and for everything that looks like one but must stay: why."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.op import DOMAIN, find_op, is_ours

LAYER = "mc_opt.layer"

GROWTH = 1 << 16
"""Folding may store so many bytes more than the constants that it frees."""
CAST_GROWTH = 1 << 10
"""The same where it casts: a cast to a wider type is how weights are kept small, so fold scalars, not weights."""

FLOATS = (
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.BFLOAT16,
    onnx_ir.DataType.DOUBLE,
)

# Ops that take integer weights, and the inputs where these stand.
_INTEGER_WEIGHTS = {
    "ConvInteger": (1,),
    "MatMulInteger": (1,),
    "QLinearConv": (3,),
    "QLinearMatMul": (3,),
    "DynamicQuantizeLSTM": (1, 2),
    "DynamicQuantizeMatMul": (1,),
    "MatMulIntegerToFloat": (1,),
    "MatMulNBits": (1,),
}


@dataclass(frozen=True)
class Skip:
    """Why something was left alone."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class WeightSite:
    """A constant float weight that matrix products and table reads alone use.

    `axes` are its row axes: the positions along them are the rows that a scale may belong to.
    `consumers` are the nodes that use it, each with the index of the input.
    """

    value: onnx_ir.Value
    layer: str
    consumers: tuple[tuple[onnx_ir.Node, int], ...]
    axes: tuple[int, ...]
    kind: str
    # Every value name of the model, shared by the sites of one walk, so that a new name is found without another.
    names: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.value.name or ""

    @property
    def graph(self) -> onnx_ir.Graph:
        """The graph that holds the weight: the main graph, or the body of an If or a loop."""
        graph = self.value.graph
        if graph is None:
            raise IRError(f"{self.layer}: the weight is in no graph any more; take sites from a fresh ir.weight_sites")
        return graph

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.tensor.shape.numpy())

    @property
    def tensor(self) -> onnx_ir.TensorProtocol:
        """The weight's data."""
        if self.value.const_value is None:
            raise IRError(f"{self.layer}: the weight was replaced; take sites from a fresh ir.weight_sites")
        return self.value.const_value


def matches(name: str, globs: tuple[str, ...]) -> bool:
    """Whether a layer's name matches one of the globs (`*`, `?`, `[...]`; case counts)."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def layer_of(value: onnx_ir.Value) -> str:
    """The layer that a value belongs to: what passes wrote, else its name."""
    return value.metadata_props.get(LAYER) or value.name or "?"


def names_of(graph: onnx_ir.Graph) -> set[str]:
    """Every value name of a graph and its subgraphs."""
    names: set[str] = set()
    for scope in (graph, *graph.subgraphs()):
        names.update(v.name for v in scope.inputs if v.name)
        names.update(scope.initializers)
        names.update(o.name for node in scope for o in node.outputs if o.name)
    return names


def weight_sites(model: onnx_ir.Model) -> Iterator[WeightSite | tuple[str, Skip]]:
    """Every weight in the order of its first use, as a site, or as its layer and the reason why it must stay.

    A float initialiser is a site when nothing but matrix products, convolutions, recurrent cells and table
    reads use it, all with the same row axes. Every other one with two dimensions above 1, and every computed
    operand that is constant, comes with its reason. The list is complete before the first item, so that a
    caller may rewrite while it loops.
    """
    return iter(_Walk(model).found)


class _Walk:
    """One walk over a model's nodes: what was found, and which values are known to be constant."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self.names = names_of(model.graph)
        self.found: list[WeightSite | tuple[str, Skip]] = []
        self._constant: dict[onnx_ir.Value, bool] = {}
        seen: set[onnx_ir.Value] = set()
        for node in model.graph.all_nodes():
            for index, value in enumerate(node.inputs):
                if value is None or value in seen:
                    continue
                result = self._judge(node, index, value)
                if result is not None:
                    seen.add(value)
                    self.found.append(result if isinstance(result, WeightSite) else (layer_of(value), result))

    def _judge(self, node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> WeightSite | Skip | None:
        if index in _INTEGER_WEIGHTS.get(node.op_type, ()):
            return Skip(f"quantised already: {_title(node)} takes integers")
        if value.is_initializer():
            return self._judge_initializer(value)
        if value.producer() is not None and row_axes(node, index, value) is not None and _is_matrix(value):
            return self._judge_computed(value)
        return None

    def _judge_initializer(self, value: onnx_ir.Value) -> WeightSite | Skip | None:
        uses = [(use.node, use.idx) for use in value.uses()]
        axes = {(node, index): row_axes(node, index, value) for node, index in uses}
        heavy = [use for use in uses if axes[use] is not None]
        if not heavy:
            return self._judge_other(value, uses)
        if value.dtype not in FLOATS:
            return None if all(n.op_type == "Gather" for n, _ in heavy) else Skip(f"its type is {_type(value)}")
        if value.is_graph_input():
            return Skip("also a graph input: a caller may give another value; remove it from the inputs")
        if value.is_graph_output():
            return Skip("also a graph output")
        for use in uses:
            found = axes[use]
            if found is None:
                return Skip(f"also used by {_title(use[0])}{self._foldable(use[0])}")
            if isinstance(found, Skip):
                return found
        return self._site(value, heavy, {use: a for use, a in axes.items() if isinstance(a, tuple)})

    def _site(
        self,
        value: onnx_ir.Value,
        heavy: list[tuple[onnx_ir.Node, int]],
        axes: dict[tuple[onnx_ir.Node, int], tuple[int, ...]],
    ) -> WeightSite | Skip:
        if len(set(axes.values())) > 1:
            each = ", ".join(f"{_title(node)} {list(axes[node, index])}" for node, index in heavy)
            return Skip(f"shared by sites with different row axes: {each}")
        first, index = heavy[0]
        kind = first.op_type
        return WeightSite(value, layer_of(value), tuple(heavy), axes[first, index], kind, self.names)

    def _judge_other(self, value: onnx_ir.Value, uses: list[tuple[onnx_ir.Node, int]]) -> Skip | None:
        if value.dtype not in FLOATS or not _is_matrix(value) or all(is_ours(node) for node, _ in uses):
            return None
        user = uses[0][0]
        return Skip(f"used by {_title(user)}{self._foldable(user) or ', which is no matrix product'}")

    def _foldable(self, node: onnx_ir.Node) -> str:
        """What to add when a node's result is constant: it stands between the weight and its real use."""
        if _is_pure(node) and node.outputs and self._is_constant(node.outputs[0]):
            return ", whose result is constant; run fold-constants first"
        return ""

    def _judge_computed(self, value: onnx_ir.Value) -> Skip | None:
        producer = value.producer()
        if producer is None or value.dtype not in FLOATS or not self._is_constant(value):
            return None
        if is_ours(producer):
            return Skip(f"compressed already: made by {_title(producer)}")
        if producer.op_type == "Constant":
            return Skip(f"held by {_title(producer)} itself: too small to be worth compressing")
        if producer.op_type == "DequantizeLinear":
            return Skip(f"quantised already: made by {_title(producer)}")
        stored = value.dtype.itemsize * math.prod(d for d in value.shape or () if isinstance(d, int))
        freed = self._freed(value)
        if stored > freed + (CAST_GROWTH if producer.op_type == "Cast" else GROWTH):
            return Skip(
                f"computed by {_title(producer)}, and fold-constants leaves it: it would store {int(stored)} bytes "
                f"and free {freed}; make it an initialiser"
            )
        return Skip(f"computed by {_title(producer)}, not constant; run fold-constants first")

    def _freed(self, value: onnx_ir.Value) -> int:
        """Bytes of the initialisers that a constant follows from and nothing else reads."""
        stack, seen, total = [value], {value}, 0
        while stack:
            item = stack.pop()
            producer = item.producer()
            if producer is not None:
                fresh = [v for v in producer.inputs if v is not None and v not in seen]
                seen.update(fresh)
                stack += fresh
            elif item.const_value is not None and all(self._is_constant(u.node.outputs[0]) for u in item.uses()):
                total += item.const_value.nbytes
        return total

    def _is_constant(self, value: onnx_ir.Value) -> bool:
        """Whether a value follows from initialisers alone."""
        stack = [(value, False)]  # a value, and whether its inputs are known; a chain may be too long to recurse
        while stack:
            item, ready = stack.pop()
            producer = item.producer()
            inputs = [i for i in producer.inputs if i is not None] if producer is not None else []
            if ready:
                self._constant[item] = all(self._constant[i] for i in inputs)
            elif item not in self._constant:
                # On a cycle, which `verify` reports, a value meets itself: then it is not constant.
                self._constant[item] = producer is None and item.is_initializer() and not item.is_graph_input()
                if producer is not None and _is_pure(producer):
                    stack.append((item, True))
                    stack += [(i, False) for i in inputs]
        return self._constant[value]


def row_axes(node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> tuple[int, ...] | Skip | None:
    """The row axes of a weight at an input of a node; None when the input takes no weight."""
    if is_ours(node):
        return find_op(node.op_type).row_axes(node, index)
    if node.domain not in ("", "ai.onnx"):
        return None
    rank = len(value.shape) if value.shape is not None else 0
    match node.op_type, index:
        case ("Conv", 1):
            return (0,)
        case ("ConvTranspose", 1):
            return (1,)
        case ("LSTM" | "GRU" | "RNN", 1 | 2):
            return (0, 1)
        case ("Gemm", 0):
            return (1,) if _integer(node, "transA") else (0,)
        case ("Gemm", 1):
            return (0,) if _integer(node, "transB") else (1,)
        case ("MatMul", 0 | 1) if rank < 2:
            return Skip(f"{_title(node)} takes it as a vector") if rank else None
        case ("MatMul", 0):
            return tuple(range(rank - 1))
        case ("MatMul", 1):
            return (*range(rank - 2), rank - 1)
        case ("Gather", 0) if rank >= 2:
            axis = _integer(node, "axis")
            return (0,) if axis % rank == 0 else Skip(f"{_title(node)} reads along axis {axis}, not whole rows")
    return None


def _integer(node: onnx_ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0


def _is_pure(node: onnx_ir.Node) -> bool:
    """Whether the inputs alone decide the outputs: no randomness, no subgraph that sees other values."""
    graphs = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
    return not node.op_type.startswith("Random") and all(a.type not in graphs for a in node.attributes.values())


def _title(node: onnx_ir.Node) -> str:
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx", DOMAIN) else ""
    return f"{domain}{node.op_type} {(node.name or next((o.name for o in node.outputs if o.name), '?'))!r}"


def _type(value: onnx_ir.Value) -> str:
    return value.dtype.name if value.dtype is not None else "unknown"


def _is_matrix(value: onnx_ir.Value) -> bool:
    """At least two dimensions above 1 (or not known): what looks like a weight."""
    return value.shape is None or sum(not isinstance(d, int) or d > 1 for d in value.shape) >= 2
