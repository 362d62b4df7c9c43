"""Which nodes to fold: regions of nodes that follow from constants, taken whole or left whole by what they store.

A recurrent weight is often sliced and concatenated anew: each slice alone would store more than it frees, all
together store as much as the weight that goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir

from mc_opt import ir
from mc_opt.passes import _branch

_SHARED = 1 << 10  # constants below this many bytes do not tie the regions that read them together

_MIN_WEIGHT = 16  # elements from which a constant counts as a weight whose name people know

# What carries a quantised model's meaning, what is random, and what other rules handle.
_KEPT = {"Constant", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "QuantizeLinear"}
_RANDOM = {"Bernoulli", "Multinomial"}


@dataclass
class Region:
    """Nodes that follow from constants and hang together.

    Attributes:
        nodes: in order.
        stored: bytes of the results that other nodes read.
        freed: bytes of the constants that nothing else reads.
        casts: whether it widens a constant of some size.
        weights: result to the weight that it is: the one that the region frees, of as many elements.
    """

    nodes: list[onnx_ir.Node] = field(default_factory=list)
    stored: int = 0
    freed: int = 0
    casts: bool = False
    weights: dict[onnx_ir.Value, onnx_ir.Value] = field(default_factory=dict)

    @property
    def reason(self) -> str | None:
        """Why it stays; None if it is to be folded."""
        if self.stored <= self.freed + (ir.CAST_GROWTH if self.casts else ir.GROWTH):
            return None
        return f"folding it would store {self.stored} bytes and free {self.freed}"


def constant(value: onnx_ir.Value | None) -> onnx_ir.TensorProtocol | None:
    """The tensor of a value that nobody can set from outside and nothing computes."""
    if value is None or (value.producer() is None and (not value.is_initializer() or value.is_graph_input())):
        return None
    return onnx_ir.convenience.get_const_tensor(value)


def regions(graph: onnx_ir.Graph) -> Iterator[Region]:
    """The regions of one graph, without its bodies."""
    found = [node for node in graph if _may_fold(node)]
    known: set[onnx_ir.Node] = set()
    for node in found:
        if all(_is_known(value, known) for value in inputs_read(node)):
            known.add(node)
    home: dict[onnx_ir.Node | onnx_ir.Value, list[onnx_ir.Node]] = {}
    for node in (n for n in found if n in known):
        _join(node, home)
    done: set[int] = set()
    for nodes in home.values():
        if id(nodes) not in done:
            done.add(id(nodes))
            yield _measure(nodes)


def inputs_read(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """The inputs whose numbers count: of the second input of CastLike only the type does."""
    inputs = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
    return [v for v in inputs if v is not None]


def result_bytes(node: onnx_ir.Node) -> int | None:
    """Bytes of all results; None where a shape or type is not known."""
    total = 0
    for value in node.outputs:
        if value.dtype is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
            return None
        total += math.ceil(math.prod(int(d) for d in value.shape if isinstance(d, int)) * value.dtype.itemsize)
    return total


def _may_fold(node: onnx_ir.Node) -> bool:
    if node.domain != "" or node.op_type in _KEPT or node.op_type in _RANDOM or "Random" in node.op_type:
        return False
    return bool(inputs_read(node)) and not _branch.bodies(node)


def _is_known(value: onnx_ir.Value, known: set[onnx_ir.Node]) -> bool:
    producer = value.producer()
    return constant(value) is not None or (producer is not None and producer in known)


def _join(node: onnx_ir.Node, home: dict[onnx_ir.Node | onnx_ir.Value, list[onnx_ir.Node]]) -> None:
    """Put a node into one list with the nodes that it shares a large constant or a result with."""
    ties: list[onnx_ir.Node | onnx_ir.Value] = [node]
    for value in inputs_read(node):
        producer, tensor = value.producer(), constant(value)
        if producer is not None and producer in home:
            ties.append(producer)
        elif tensor is not None and tensor.nbytes > _SHARED:
            ties.append(value)
    merged: list[onnx_ir.Node] = []
    for members in {id(home[t]): home[t] for t in ties if t in home}.values():
        merged += members
    merged.append(node)
    for tie in [t for t, members in home.items() if any(m in merged for m in members)] if len(ties) > 1 else []:
        home[tie] = merged
    for tie in ties:
        home[tie] = merged


def _measure(nodes: list[onnx_ir.Node]) -> Region:
    region = Region(nodes)
    own = set(nodes)
    leaves: dict[onnx_ir.Value, onnx_ir.TensorProtocol] = {}
    results: list[onnx_ir.Value] = []
    for node in nodes:
        for value in inputs_read(node):
            tensor = constant(value)
            if tensor is not None and value.is_initializer():
                leaves[value] = tensor
                region.casts |= node.op_type in ("Cast", "CastLike") and tensor.nbytes > _SHARED
        read = [o for o in node.outputs if o.is_graph_output() or any(u.node not in own for u in o.uses())]
        region.stored += (result_bytes(node) or 0) if read else 0
        results += read
    freed = [v for v in leaves if not v.is_graph_output() and all(use.node in own for use in v.uses())]
    region.freed = sum(leaves[v].nbytes for v in freed)
    weights = [v for v in freed if leaves[v].dtype.is_floating_point() and leaves[v].size >= _MIN_WEIGHT]
    for result in results:
        same = [v for v in weights if _size(result) == leaves[v].size and v.graph is nodes[0].graph]
        if len(same) == 1 and len([r for r in results if _size(r) == _size(result)]) == 1:
            region.weights[result] = same[0]
    return region


def _size(value: onnx_ir.Value) -> int | None:
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return math.prod(int(d) for d in value.shape if isinstance(d, int))
