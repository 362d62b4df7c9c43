"""Which positions of which axes stand for the same channel: one walk over the graph, one rule an op.

Every position of an axis that may be a channel is an atom. A rule ties the atoms that an op relates one to one, and
fixes those of an axis that it needs whole, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt import ir

Axis = np.ndarray | ir.Skip
"""The atoms of an axis, i64[dim], or why its positions stay as they are."""

ONE = ir.Skip("it has one channel")


@dataclass(frozen=True)
class Place:
    """An axis of an input of a node."""

    node: onnx_ir.Node
    index: int
    axis: int

    @property
    def value(self) -> onnx_ir.Value:
        """The value at that input."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


class Walk:
    """The atoms of every value of a main graph.

    Attributes:
        count: atoms handed out.
        sources: by atom, the number of the axis that it was handed out for.
        ties: pairs of equal length of atoms that stand for the same.
        fixed: by atom that must stay, the first reason.
        axes: the atoms of each axis of each value.
        makers: where weights make channels: a row of weights is one.
        sums: where nodes sum over channels; a channel that is 0 there is as good as none.
    """

    def __init__(self, model: onnx_ir.Model) -> None:
        self.opset = model.opset_imports.get("", 1)
        self.count = 0
        self.sources: list[np.ndarray] = []
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.fixed: dict[int, str] = {}
        self.axes: dict[onnx_ir.Value, list[Axis]] = {}
        self.makers: list[Place] = []
        self.sums: list[Place] = []

    def fresh(self, n: int) -> np.ndarray:
        """The atoms of a new axis."""
        self.sources.append(np.full(n, len(self.sources)))
        self.count += n
        return np.arange(self.count - n, self.count)

    def fix(self, axis: Axis, why: str) -> ir.Skip:
        """Say that an axis stays whole."""
        if isinstance(axis, ir.Skip):
            return axis
        for atom in np.unique(axis):
            self.fixed.setdefault(int(atom), why)
        return ir.Skip(why)

    def tie(self, a: Axis | None, b: Axis) -> Axis:
        """Say that two axes of one length stand for the same channels; None ties nothing."""
        if a is None:
            return b
        if isinstance(a, ir.Skip):
            return self.fix(b, a.reason)
        if isinstance(b, ir.Skip):
            return self.fix(a, b.reason)
        if len(a) != len(b):
            return self.fix(a, "its sizes do not agree") and self.fix(b, "its sizes do not agree")
        if not np.array_equal(a, b):
            self.ties.append((a, b))
        return a

    def vector(self, axis: Axis, n: int) -> np.ndarray:
        """Atoms in any case: fixed ones where the axis stays."""
        if not isinstance(axis, ir.Skip):
            return axis
        made = self.fresh(n)
        self.fix(made, axis.reason)
        return made

    def of(self, value: onnx_ir.Value) -> list[Axis]:
        """The axes of a value; a constant's are atoms of its own."""
        if value not in self.axes:
            self.axes[value] = self._first_look(value)
        return self.axes[value]

    def _first_look(self, value: onnx_ir.Value) -> list[Axis]:
        dims = dims_of(value)
        if array_type(value) is None:
            return [ir.Skip(f"it comes from the input {value.name}") for _ in dims]
        shown = ir.Skip(f"its weight {value.name} is an output")
        if value.is_graph_output():
            return [shown for _ in dims]
        return [self.fresh(d) if isinstance(d, int) and d > 1 else ONE for d in dims]

    def visit(self, node: onnx_ir.Node) -> None:
        """Apply the rule of a node's op; what a Constant holds is looked at where it is used."""
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            return
        rule = find_rule(node)
        made = None if rule is None or _is_unknown(node) else rule(self, node)
        if made is None:
            made = self.opaque(node)
        for value, axes in zip(node.outputs, made, strict=False):
            self.axes[value] = [self._sized(axis, dim) for axis, dim in zip(axes, dims_of(value), strict=True)]

    def _sized(self, axis: Axis, dim: int | onnx_ir.SymbolicDim) -> Axis:
        if isinstance(axis, ir.Skip) or (isinstance(dim, int) and dim == len(axis)):
            return axis
        return self.fix(axis, "its size is open; fix the shapes")

    def opaque(self, node: onnx_ir.Node, why: str = "") -> list[list[Axis]]:
        """Fix all that a node takes and makes."""
        does = "takes its statistics over it" if "Norm" in node.op_type else "takes it whole"
        reason = why or f"{node.op_type} {ir.title_of(node)} {does}"
        for value in node.inputs:
            if value is not None:
                for axis in self.of(value):
                    self.fix(axis, reason)
        return [[ir.Skip(reason) for _ in dims_of(value)] for value in node.outputs]

    def look_inside(self, node: onnx_ir.Node) -> None:
        """Fix what the graphs in a node take from around it."""
        for graph in ir.subgraphs(node):
            taken = [v for inner in graph.all_nodes() for v in inner.inputs] + list(graph.outputs)
            for value in taken:
                for axis in self.axes.get(value, ()) if value is not None else ():
                    self.fix(axis, f"{node.op_type} {ir.title_of(node)} uses it inside")


Rule = Callable[[Walk, onnx_ir.Node], "list[list[Axis]] | None"]


def walk_of(model: onnx_ir.Model) -> Walk:
    """Visit every node of the main graph."""
    walk = Walk(model)
    for node in model.graph:
        walk.visit(node)
    for value in model.graph.outputs:
        for axis in walk.of(value):
            walk.fix(axis, f"the output {value.name} shows it")
    for node in model.graph:
        walk.look_inside(node)
    return walk


def find_rule(node: onnx_ir.Node) -> Rule | None:
    """The rule of a standard op; None for every other one."""
    from mc_opt.passes._channels_rules import RULES  # the rules build on what stands here

    return RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def _is_unknown(node: onnx_ir.Node) -> bool:
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    return any(v.shape is None for v in values) or any(True for _ in ir.subgraphs(node))


def dims_of(value: onnx_ir.Value) -> Sequence[int | onnx_ir.SymbolicDim]:
    """The dimensions; none where the rank is unknown."""
    return tuple(value.shape) if value.shape is not None else ()


def array_type(value: onnx_ir.Value) -> onnx_ir.TensorProtocol | None:
    """The tensor of a constant: an initialiser that no caller may replace, or what a Constant node holds."""
    if value.is_graph_input():
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value
    if producer.op_type != "Constant" or producer.domain not in ("", "ai.onnx"):
        return None
    return onnx_ir.convenience.get_const_tensor(value)


def whole_numbers(node: onnx_ir.Node, index: int, attribute: str = "") -> tuple[int, ...] | None:
    """A constant list at an input, or in the attribute where older ops have it; None when it is computed or absent."""
    if attribute and attribute in node.attributes:
        return tuple(node.attributes[attribute].as_ints())
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = array_type(value) if value is not None else None
    return None if tensor is None else tuple(int(n) for n in tensor.numpy().reshape(-1))


def integer(node: onnx_ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute."""
    return node.attributes[name].as_int() if name in node.attributes else default


def merged(walk: Walk, axes: Sequence[Axis], dims: Sequence[int | onnx_ir.SymbolicDim], why: str) -> Axis:
    """Several axes that become one: each position of the tracked one stands for many; only one may be tracked."""
    tracked = [k for k, axis in enumerate(axes) if not isinstance(axis, ir.Skip)]
    if not tracked:
        return next((a for a in axes if a is not ONE and isinstance(a, ir.Skip)), ONE)
    if len(tracked) > 1 or not all(isinstance(d, int) for d in dims):
        for axis in axes:
            walk.fix(axis, why)
        return ir.Skip(why)
    k = tracked[0]
    atoms = axes[k]
    assert not isinstance(atoms, ir.Skip)
    sizes = [int(d) for d in dims if isinstance(d, int)]
    before, behind = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
    return np.tile(np.repeat(atoms, behind), before)
