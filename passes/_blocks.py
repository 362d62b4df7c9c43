"""Residual branches: what an addition adds to the value that the branch started from, and how a branch goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._channels_axes import array_type
from mc_opt.passes._channels_cost import Budget, Cost, linear, work_of
from mc_opt.targets import Price


@dataclass(frozen=True)
class Block:
    """y = skip + branch(skip).

    Attributes:
        add: the addition.
        branch: the index of the addition's input that the branch makes.
        nodes: the branch, in graph order; nothing else uses what they make.
    """

    add: onnx_ir.Node
    branch: int
    nodes: tuple[onnx_ir.Node, ...]

    @property
    def name(self) -> str:
        """The layer of the branch's last weight, or the addition."""
        weights = list(self.weights)
        return ir.layer_of(weights[-1]) if weights else ir.title_of(self.add)

    @property
    def value(self) -> onnx_ir.Value:
        """What the branch makes."""
        value = self.add.inputs[self.branch]
        assert value is not None
        return value

    @property
    def skip(self) -> onnx_ir.Value:
        """What it is added to."""
        value = self.add.inputs[1 - self.branch]
        assert value is not None
        return value

    @property
    def weights(self) -> Iterator[onnx_ir.Value]:
        """The floating-point constants that only the branch uses, in graph order."""
        mine = set(self.nodes)
        values = dict.fromkeys(v for node in self.nodes for v in node.inputs if v is not None)
        for value in values:
            tensor = array_type(value)
            if tensor is not None and tensor.dtype.is_floating_point() and mine.issuperset(value.consumers()):
                yield value


def blocks_of(model: onnx_ir.Model) -> tuple[Block, ...]:
    """The residual branches of the main graph in graph order; of nested ones the inner."""
    order = {node: number for number, node in enumerate(model.graph)}
    found: list[Block] = []
    taken: set[onnx_ir.Node] = set()
    for node in model.graph:
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
            continue
        block = next((b for k in (1, 0) if (b := _block(node, k, order)) is not None), None)
        if block is not None and taken.isdisjoint(block.nodes):
            taken.update(block.nodes)
            found.append(block)
    return tuple(found)


def _block(add: onnx_ir.Node, branch: int, order: dict[onnx_ir.Node, int]) -> Block | None:
    value, skip = add.inputs[branch], add.inputs[1 - branch]
    end = value.producer() if value is not None else None
    if value is None or skip is None or end is None or value.shape is None or value.shape != skip.shape:
        return None
    if [(use.node, use.idx) for use in value.uses()] != [(add, branch)] or end not in order:
        return None
    inside: dict[onnx_ir.Node, None] = {}
    for node in list(order)[order[end] :: -1]:  # behind a node, all that uses it is known
        users = {user for output in node.outputs for user in output.consumers()}
        alone = users == {add} if node is end else bool(users) and users <= inside.keys()
        if alone and not any(output.is_graph_output() for output in node.outputs):
            inside[node] = None
    read = {v for node in inside for v in node.inputs if v is not None}
    if skip not in read or not any(array_type(v) is not None for v in read):
        return None
    return Block(add, branch, tuple(inside)[::-1])


def remove(model: onnx_ir.Model, blocks: Sequence[Block], *, by: str) -> None:
    """Take branches out: each addition becomes the identity of what was added to."""
    names = {str(v.name) for graph in model.graphs() for node in graph for v in node.outputs}
    for block in blocks:
        identity = onnx_ir.node("Identity", [block.skip])
        ir.replace_node(block.add, [identity], by=(by, "branch removed"), names=names)
        constants = [v for node in block.nodes for v in node.inputs if v is not None]
        model.graph.remove(list(block.nodes)[::-1], safe=True)
        for value in constants:
            if str(value.name) in model.graph.initializers and not value.uses() and not value.is_graph_output():
                model.graph.initializers.pop(str(value.name))


def block_cost(model: onnx_ir.Model, blocks: Sequence[Block], budget: Budget, price: Price) -> Cost:
    """The cost of the model as a function of the blocks that stay."""
    each = [np.array([k]) for k in range(len(blocks))]
    match budget:
        case "count":
            return linear([(1.0, units) for units in each])
        case "params":
            held = [sum((_elements(v) for v in block.weights), 0.0) for block in blocks]
            whole = sum((_elements(v) for graph in model.graphs() for v in graph.initializers.values()), 0.0)
        case "macs" | "time":
            held = [sum((work_of(node, budget, price) for node in block.nodes), 0.0) for block in blocks]
            whole = sum((work_of(node, budget, price) for node in model.graph), 0.0)
    return linear(list(zip(held, each, strict=True)), whole - sum(held))


def _elements(value: onnx_ir.Value) -> float:
    tensor = value.const_value
    return float(tensor.size) if tensor is not None and tensor.dtype.is_floating_point() else 0
