"""What each layer of a model stores: parameters, and every byte they are computed from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir

from mc_opt.ir.op import is_ours
from mc_opt.ir.sites import layer_of

SHARED = "(shared)"
"""The layer of what several layers use, as a codebook; it counts once."""
IN_NODES = "(in nodes)"
"""The layer of tensors that stand in attributes."""


@dataclass(frozen=True)
class Stored:
    """What one layer stores: elements of its float weights, packed ones as those that they decode to, and bytes."""

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: Stored) -> Stored:
        return Stored(self.parameters + other.parameters, self.bytes + other.bytes)


@dataclass(frozen=True)
class Storage:
    """What a model stores, by layer.

    Attributes:
        layers: layer to what it stores, in the order of the model; without shared parts and tensors in nodes.
        shared: the names of constants that several layers use, to their bytes.
        in_nodes: what attributes of nodes hold.
        owners: each stored or decoded value's layer.
    """

    layers: Mapping[str, Stored] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)
    in_nodes: int = 0
    owners: Mapping[onnx_ir.Value, str] = field(default_factory=dict)

    @property
    def total(self) -> Stored:
        """The whole model's."""
        rest = Stored(0, sum(self.shared.values()) + self.in_nodes)
        return sum(self.layers.values(), rest)


def storage_of(model: onnx_ir.Model) -> Storage:
    """Count a model's constants, layer by layer; no weight is read."""
    layers: dict[str, Stored] = {}
    shared: dict[str, int] = {}
    owners: dict[onnx_ir.Value, str] = {}
    in_nodes = 0
    decoders = frozenset(_decoders(model))
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is None:
                continue
            layer = _owner(value, decoders)
            owners[value] = layer or SHARED
            count = int(value.const_value.nbytes)
            if layer is None:
                shared[value.name or "?"] = shared.get(value.name or "?", 0) + count
                continue
            own = 0 if _is_part(value, decoders) else _elements(value)
            layers[layer] = layers.get(layer, Stored()) + Stored(own, count)
        for node in graph:
            in_nodes += sum(_tensor_bytes(attribute) for attribute in node.attributes.values())
            if node in decoders:
                result = node.outputs[0]
                layer = owners[result] = _owner(result, decoders) or layer_of(result)
                own = 0 if _is_part(result, decoders) else _elements(result)
                layers[layer] = layers.get(layer, Stored()) + Stored(own, 0)
    return Storage(layers, shared, in_nodes, owners)


def _decoders(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    """The nodes that make a weight of stored parts: our ops, and sums of what they make, that take nothing else."""
    constant: set[onnx_ir.Value] = set()
    for graph in model.graphs():
        constant.update(v for v in graph.initializers.values() if not v.is_graph_input())
    made: set[onnx_ir.Value] = set()
    for node in model.graph.all_nodes():
        inputs = [v for v in node.inputs if v is not None]
        if not inputs or not all(v in constant for v in inputs):
            continue
        if is_ours(node) or (node.op_type == "Add" and node.domain == "" and all(v in made for v in inputs)):
            constant.update(node.outputs)
            made.update(node.outputs)
            yield node


def _is_part(value: onnx_ir.Value, decoders: frozenset[onnx_ir.Node]) -> bool:
    """Whether nothing but the decoding of a weight uses the value: codes, a codebook, a scale, a term of a sum."""
    return bool(value.uses()) and all(node in decoders for node in value.consumers())


def _owner(value: onnx_ir.Value, decoders: frozenset[onnx_ir.Node]) -> str | None:
    """The layer that a constant belongs to: that of the one weight that is decoded from it; None if there are more."""
    ends: dict[str, None] = {}
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        if not _is_part(current, decoders):
            ends[layer_of(current)] = None
            continue
        fresh = [o for node in current.consumers() for o in node.outputs if o not in seen]
        seen.update(fresh)
        stack += fresh
    return next(iter(ends)) if len(ends) == 1 else None


def _elements(value: onnx_ir.Value) -> int:
    if value.dtype is None or not value.dtype.is_floating_point() or value.shape is None:
        return 0
    return math.prod(d if isinstance(d, int) else 0 for d in value.shape)


def _tensor_bytes(attribute: onnx_ir.Attr) -> int:
    if attribute.is_ref():
        return 0
    match attribute.type:
        case onnx_ir.AttributeType.TENSOR:
            return int(attribute.as_tensor().nbytes)
        case onnx_ir.AttributeType.TENSORS:
            return sum(int(tensor.nbytes) for tensor in attribute.as_tensors())
        case _:
            return 0


@dataclass(frozen=True)
class LayerChange:
    """What one layer stores before and after.

    Attributes:
        layer: its name; `(shared)` for what several layers use, `(in nodes)` for tensors in attributes.
        before: in the first model; None where it does not have the layer.
        after: in the second.
    """

    layer: str
    before: Stored | None
    after: Stored | None

    @property
    def changed(self) -> bool:
        """Whether the layer stores something else, by count."""
        return self.before != self.after


def layer_changes(before: Storage, after: Storage) -> tuple[LayerChange, ...]:
    """Both models' layers beside each other, in the first's order; the parts of a layer that was split are summed."""
    split: dict[str, Stored] = {}
    for layer, stored in after.layers.items():
        whole = layer if layer in before.layers else _whole(layer, before.layers, after.layers)
        split[whole] = split.get(whole, Stored()) + stored
    rows = [LayerChange(layer, before.layers.get(layer), split.get(layer)) for layer in {**before.layers, **split}]
    for title, a, b in (
        (SHARED, sum(before.shared.values()), sum(after.shared.values())),
        (IN_NODES, before.in_nodes, after.in_nodes),
    ):
        if a or b:
            rows.append(LayerChange(title, Stored(0, a), Stored(0, b)))
    return tuple(rows)


def _whole(layer: str, before: Mapping[str, Stored], after: Mapping[str, Stored]) -> str:
    """The layer that another one is a part of by its name, as conv.weight is of conv.weight.factor1."""
    stem = layer
    while "." in stem:
        stem = stem.rpartition(".")[0]
        if stem in before and stem not in after:
            return stem
    return layer
