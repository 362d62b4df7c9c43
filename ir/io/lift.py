"""Lifting a model to the opset that rules inside, by onnx's C++ converter, which is never fed the weights."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx.inliner
import onnx.version_converter
import onnx_ir

from mc_opt.ir.errors import IRError
from mc_opt.ir.io.weightless import first_output, graphs, restore, walk, weightless

OPSET = 21
IR_VERSION = 10
OLDEST = 7


def lift(model: onnx_ir.Model, where: str) -> onnx_ir.Model:
    """The model at opset 21 or newer: itself when it is there already, else a converted one.

    Names, metadata, doc strings and the weights' tensors stay. Model-local functions of a lifted model are
    inlined first, because the converter loses them.

    Raises:
        IRError: the opset is older than 7 or newer than the installed onnx knows, or the converter fails.
    """
    opset = model.opset_imports.get("")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset < OLDEST:
        raise IRError(f"{where}: opset {opset}, expected {OLDEST} to {newest}; export the model again at a newer opset")
    if opset is not None and opset > newest:
        raise IRError(
            f"{where}: opset {opset}, the installed onnx {onnx.__version__} knows up to {newest}; "
            "upgrade onnx, or export the model at an older opset"
        )
    if opset is None:
        model.opset_imports[""] = OPSET  # only foreign domains: nothing to convert
    elif opset < OPSET:
        model = _convert(model, opset, where)
    model.ir_version = max(model.ir_version, IR_VERSION)
    return model


def _convert(model: onnx_ir.Model, opset: int, where: str) -> onnx_ir.Model:
    proto, tensors = weightless(model)
    try:
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto, convert_version=True)
            model = onnx_ir.from_proto(proto)
        proto.ir_version = max(proto.ir_version, 8)  # below 4 the converter wants initialisers as inputs
        converted = onnx_ir.from_proto(onnx.version_converter.convert_version(proto, OPSET))
    except Exception as error:  # the converter raises bare RuntimeErrors of its own and of pybind
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise IRError(
            f"{where}: opset {opset} cannot be lifted to {OPSET} ({reason}); export the model at opset {OPSET} or newer"
        ) from error
    _carry_over(model, converted)
    lifted = onnx_ir.Model(
        converted.graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        metadata_props=dict(model.metadata_props),
    )
    lifted.opset_imports.update({k: v for k, v in model.opset_imports.items() if k})
    restore(lifted, tensors)
    return lifted


def _carry_over(old: onnx_ir.Model, new: onnx_ir.Model) -> None:
    """Give the converted graphs what the converter drops, found by the names of graphs, nodes and values."""
    new_graphs = dict(walk(new.graph))
    known: set[str] = set()
    for path, graph in walk(old.graph):
        if path not in new_graphs:
            continue
        twin = new_graphs[path]
        twin.name, twin.doc_string = graph.name, graph.doc_string
        twin.metadata_props.update(graph.metadata_props)
        values = {v.name: v for v in _values(graph) if v.name}
        known.update(values)
        for value in _values(twin):
            if value.name in values:
                _carry_value(values[value.name], value)
        nodes = {first_output(node): node for node in graph}
        for node in twin:
            if twin_of := nodes.get(first_output(node)):
                node.name, node.doc_string = twin_of.name, twin_of.doc_string
                node.metadata_props.update(twin_of.metadata_props)
    _name_new_values(new, known)


def _values(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _carry_value(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    if old.type is not None:
        new.type = old.type
    if old.shape is not None:
        new.shape = old.shape
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)  # onnx_ir keeps the quantization annotation there


def _name_new_values(model: onnx_ir.Model, known: set[str]) -> None:
    """Call what the converter added after what it is for: `y.1`, `y.2` for the new values behind `y`."""
    used = set(known)
    for graph in reversed(list(graphs(model))):
        for node in reversed(graph):
            for value in node.outputs:
                if not value.name or value.name in known:
                    continue
                users = [first_output(use.node) for use in value.uses()]
                base = min((u for u in users if u), default=value.name)
                value.name = _free(base.partition(".lifted")[0] + ".lifted", used)
                used.add(value.name)


def _free(base: str, used: set[str]) -> str:
    name, count = base, 0
    while name in used:
        count += 1
        name = f"{base}.{count}"
    return name
