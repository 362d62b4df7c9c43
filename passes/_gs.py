"""Our model as an onnx_graphsurgeon graph and back, without what that package has no place for being lost.

It has no place for overloads, doc strings and metadata of nodes and values, several attribute types and the
functions of a model. Nodes are followed as objects; the rest is found again by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from mc_opt import ir

_KEY = "mc_opt.new:"
_SMALL = 1024


class _Weight(LazyValues):  # type: ignore[misc]  # the package has no types
    """A weight that is read when a script asks for its values."""

    def __init__(self, stub: onnx.TensorProto, tensor: onnx_ir.TensorProtocol) -> None:
        super().__init__(stub)
        self.source = tensor

    def load(self) -> np.ndarray:
        """A copy, which the script may change in place."""
        return np.array(self.source.numpy())


@dataclass
class Surgery:
    """A model on the table: what graphsurgeon sees, and what is kept aside.

    Attributes:
        graph: for the script.
        tensors: the weights, by the keys of their stubs.
        constants: the constants as they went in, by name.
        nodes: the node that each imported one came from, with the attributes it had then.
        weights: the constants that were handed out, with their stubs.
    """

    model: onnx_ir.Model
    graph: gs.Graph = field(init=False)
    tensors: dict[str, onnx_ir.TensorProtocol] = field(init=False)
    constants: dict[str, onnx.TensorProto] = field(init=False)
    nodes: dict[int, tuple[gs.Node, onnx.NodeProto, dict[str, Any]]] = field(default_factory=dict)
    weights: dict[int, tuple[gs.Constant, _Weight]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        proto, self.tensors = ir.weightless(self.model)
        del proto.functions[:]  # they stay with the model
        self.constants = {t.name: t for g in (proto.graph, *_bodies(proto.graph)) for t in g.initializer}
        with G_LOGGER.suppress(G_LOGGER.ERROR):
            self.graph = gs.import_onnx(proto)
        self._follow(self.graph, proto.graph)

    def _follow(self, graph: gs.Graph, proto: onnx.GraphProto) -> None:
        """Remember where each node came from, and hand out weights that can be read."""
        for constant in _constants(graph):
            stub = constant._values.tensor if isinstance(constant._values, LazyValues) else None
            if not isinstance(stub, onnx.TensorProto) or not stub.external_data:
                continue
            key = stub.external_data[0].value
            if key in self.tensors and id(constant) not in self.weights:
                constant._values = _Weight(stub, self.tensors[key])
                self.weights[id(constant)] = (constant, constant._values)
        for node, source in zip(graph.nodes, proto.node, strict=True):
            attributes = {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()}
            self.nodes[id(node)] = (node, source, attributes)
            for attribute in source.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    self._follow(node.attrs[attribute.name], attribute.g)

    def close(self, graph: gs.Graph) -> onnx_ir.Model:
        """The model of the graph that the script returned.

        Raises:
            IRError: when the graph cannot be written, or the script changed the opset.
        """
        for constant in _constants(graph):
            self._stow(constant)
        if graph.opset != self.model.opset_imports[""]:
            raise ir.IRError(f"the script set opset {graph.opset}; keep {self.model.opset_imports['']}, the model's")
        taken = self._set_aside(graph)
        try:
            with G_LOGGER.suppress(G_LOGGER.ERROR):
                proto = gs.export_onnx(graph, opset_imports=_imports(self.model, graph))
        except Exception as error:  # the package checks little: whatever a wrong graph makes it raise
            raise ir.IRError(f"the graph cannot be written: {error}") from error
        self._restore_nodes(graph, proto.graph, taken)
        _settle(proto.graph, self.model.graph, self.constants)
        _strip(proto.graph, set())
        proto.ir_version = self.model.ir_version
        return self._dress(onnx_ir.from_proto(proto))

    def _stow(self, constant: gs.Constant) -> None:
        """Put stubs in the place of large arrays: a weight that was only read, and every new one."""
        values = constant._values
        if not isinstance(values, np.ndarray) or constant.export_dtype != values.dtype:
            return
        known = self.weights.get(id(constant))
        if known is not None and _equal(values, known[1]):
            constant._values = known[1]
            return
        if values.nbytes <= _SMALL or values.dtype == object:
            return
        key = f"{_KEY}{len(self.tensors)}"
        self.tensors[key] = onnx_ir.tensor(values, name=constant.name)
        stub = onnx.TensorProto(
            name=constant.name, data_type=self.tensors[key].dtype, data_location=onnx.TensorProto.EXTERNAL
        )
        stub.dims.extend(values.shape)
        stub.external_data.add(key="location", value=key)
        constant._values = _Weight(stub, self.tensors[key])

    def _set_aside(self, graph: gs.Graph) -> dict[int, set[str]]:
        """Take attributes that the script left alone out of the graph: they go back as they were, by node."""
        taken: dict[int, set[str]] = {}
        for node in _nodes(graph):
            source = self.nodes.get(id(node))
            if source is None:
                continue
            known = {a.name for a in source[1].attribute}
            same = {k for k in known if k in source[2] and k in node.attrs and _same(node.attrs[k], source[2][k])}
            for key in same:
                del node.attrs[key]
            taken[id(node)] = same | (known - source[2].keys())  # and those that the package cannot hold
        return taken

    def _restore_nodes(self, graph: gs.Graph, proto: onnx.GraphProto, taken: dict[int, set[str]]) -> None:
        for node, made in zip(graph.nodes, proto.node, strict=True):
            source = self.nodes.get(id(node))
            if source is None:
                continue
            _, old, _ = source
            made.overload, made.doc_string = old.overload if made.op_type == old.op_type else "", old.doc_string
            made.metadata_props.extend(old.metadata_props)
            made.attribute.extend(a for a in old.attribute if a.name in taken[id(node)])
            for attribute in made.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH and isinstance(node.attrs.get(attribute.name), gs.Graph):
                    self._restore_nodes(node.attrs[attribute.name], attribute.g, taken)

    def _dress(self, made: onnx_ir.Model) -> onnx_ir.Model:
        """Give the new model what the old one says of graphs, values and weights of the same names."""
        old = {v.name: v for graph in self.model.graphs() for v in _values(graph)}
        for graph in made.graphs():
            for value in _values(graph):
                if isinstance(value.const_value, onnx_ir.ExternalTensor) and value.const_value.location in self.tensors:
                    value.const_value = self.tensors[value.const_value.location]
                twin = old.get(value.name)
                if twin is None:
                    continue
                value.doc_string = twin.doc_string
                value.metadata_props.update(twin.metadata_props)
                value.meta.update(twin.meta)
                if value.dtype == twin.dtype and value.shape is not None and value.shape == twin.shape:
                    value.type, value.shape = twin.type, twin.shape
        for graph, source in zip(made.graphs(), self.model.graphs(), strict=False):
            if graph.name == source.name:
                graph.doc_string = source.doc_string
                graph.metadata_props.update(source.metadata_props)
        return made


def _settle(proto: onnx.GraphProto, old: onnx_ir.Graph, constants: Mapping[str, onnx.TensorProto]) -> None:
    """Put weights back into the graph that they stood in: the package writes them into every body that reads them.

    Those that nothing reads it does not know at all.
    """
    unused = [constants[name] for name, v in old.initializers.items() if not v.uses() and not v.is_graph_output()]
    present = {t.name for t in proto.initializer}
    proto.initializer.extend(t for t in unused if t.name not in present)
    present.update(t.name for t in unused)
    read = [t for inner in _bodies(proto) for t in inner.initializer]
    for tensor in read:
        if tensor.name in old.initializers and tensor.name not in present:
            proto.initializer.append(tensor)
            present.add(tensor.name)
    order = {name: place for place, name in enumerate(old.initializers)}
    ordered = sorted(proto.initializer, key=lambda t: order.get(t.name, len(order)))
    del proto.initializer[:]
    proto.initializer.extend(ordered)
    inner = {(node.outputs[0].name, a.name): a for node in old if node.outputs for a in node.attributes.values()}
    for node in proto.node:
        for attribute in node.attribute:
            known = inner.get((next(iter(node.output), ""), attribute.name))
            if known is not None and known.type == onnx_ir.AttributeType.GRAPH and attribute.HasField("g"):
                _settle(attribute.g, known.as_graph(), constants)


def _strip(graph: onnx.GraphProto, outer: set[str]) -> None:
    """Remove from bodies what an outer graph defines."""
    for entries in (graph.initializer, graph.value_info):
        kept = [entry for entry in entries if entry.name not in outer]
        del entries[:]
        entries.extend(kept)
    defined = {t.name for t in graph.initializer} | {i.name for i in graph.input}
    defined |= {name for node in graph.node for name in node.output}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _strip(attribute.g, outer | defined)


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from _bodies(attribute.g)


def _imports(model: onnx_ir.Model, graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    versions = {entry.domain: entry.version for entry in graph.import_domains or []}
    versions |= dict(model.opset_imports)
    return [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _equal(values: np.ndarray, weight: _Weight) -> bool:
    old = weight.source.numpy()
    return old.dtype == values.dtype and old.shape == values.shape and old.tobytes() == values.tobytes()


def _same(new: Any, old: Any) -> bool:
    if isinstance(new, gs.Graph):
        return False
    if isinstance(new, gs.Constant):
        return new is old and isinstance(new._values, LazyValues)
    return type(new) is type(old) and bool(new == old)


def _nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    for node in graph.nodes:
        yield node
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from _nodes(value)


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    found: dict[int, gs.Constant] = {}
    for node in _nodes(graph):
        for tensor in (*node.inputs, *node.outputs):
            if isinstance(tensor, gs.Constant):
                found[id(tensor)] = tensor
    return list(found.values())


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from (o for o in node.outputs if o.name)
