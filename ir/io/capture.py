"""Capturing torch modules: exported by torch.onnx, folded but for BatchNorm, with torch's names for the weights."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mc_opt.ir.errors import IRError
from mc_opt.ir.io.factory import INSTALL, find_factory, first_line
from mc_opt.ir.io.load import copy_output, prepare
from mc_opt.ir.io.read import SOURCE, Source
from mc_opt.ir.io.weightless import graphs

TORCH = "mc_opt.torch"
"""Metadata of a captured weight: the torch parameters that it was made from, when it is not one as it was."""
GATES = "mc_opt.torch.gates"
"""Metadata of an LSTM or GRU weight: the order of the gates' rows, in torch and here."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_KEPT_METADATA = {_SCOPES, "pkg.torch.onnx.class_hierarchy"}
_GATES = {"LSTM": "torch i,f,g,o; onnx i,o,f,c", "GRU": "torch r,z,n; onnx z,r,h"}
_RECURRENT = {"LSTM", "GRU", "RNN"}
_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_UNLIMITED = 1 << 62


def capture(
    module: Any,
    example: Any = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> onnx_ir.Model:
    """The model that a torch module computes, in the form that `load_model` gives.

    BatchNorm stays a node of its own, and weights are copies: the module may change or go afterwards. A weight
    has its parameter's name; what the exporter computes from parameters is named after them, an LSTM's weights
    `<module>.W`, `.R`, `.B` (`<module>.l0.W` when the module has several layers).

    Args:
        module: an `nn.Module` or `fx.GraphModule` in eval mode, or an `ExportedProgram`.
        example: inputs to trace with: a tensor, a tuple of inputs, or a dict by name; nothing for an
            `ExportedProgram`.
        dynamic_shapes: open dimensions, as `torch.export.export` takes them.
        input_names: names for the inputs; the parameters of `forward` otherwise.
        output_names: names for the outputs.

    Raises:
        IRError: torch is missing, the module is in train mode, or it cannot be traced.
    """
    try:
        import torch
    except ImportError as error:
        raise IRError(INSTALL) from error
    where = type(module).__name__
    exported = isinstance(module, torch.export.ExportedProgram)
    if not exported and not isinstance(module, torch.nn.Module):
        raise IRError(f"{where}: expected a torch.nn.Module, an fx.GraphModule or an ExportedProgram")
    if not exported:
        _check_eval(module, where)
    args, kwargs = ((), None) if exported else _arguments(example, where)
    model = _export(
        module,
        args,
        where,
        kwargs=kwargs,
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
    )
    _name_outputs(model.graph, output_names or (), where)
    _check_inference(model, where)
    for graph in graphs(model):
        for name, value in graph.initializers.items():
            value.const_value = _copy(value.const_value, name)
    sources = _sources(model)
    _fold(model)
    _trim_metadata(model)
    _drop_zeros(model)
    _name_weights(model, sources)
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    source = Source(f"torch:{where}", weights, "", model.opset_imports[""], model.ir_version)
    model = prepare(model, where)
    model.meta[SOURCE] = source
    return model


def from_torch(text: str, *, dynamic_shapes: Any = None) -> onnx_ir.Model:
    """Capture what the factory `package.module:factory` makes: `(module, example)` or an `ExportedProgram`.

    A third item of the tuple are the dynamic shapes, as `torch.export.export` takes them. The current folder is on
    the import path while the factory runs.

    Raises:
        OptionError: there is no such factory.
        IRError: the factory fails, or what it returns cannot be captured.
    """
    made = find_factory(text, "--from-torch")()
    if isinstance(made, tuple) and len(made) in (2, 3):
        module, example, *sizes = made
        return capture(module, example, dynamic_shapes=sizes[0] if sizes else dynamic_shapes)
    if type(made).__name__ != "ExportedProgram":
        raise IRError(
            f"--from-torch {text!r}: the factory returned {type(made).__name__}, expected (module, example), "
            "(module, example, dynamic shapes) or an ExportedProgram"
        )
    return capture(made, dynamic_shapes=dynamic_shapes)


def _check_eval(module: Any, where: str) -> None:
    training = next((name or where for name, part in module.named_modules() if part.training), None)
    if training is not None:
        raise IRError(
            f"{where}: {training!r} is in train mode, where BatchNorm and Dropout compute something else; "
            "call .eval() on the module first"
        )


def _check_inference(model: onnx_ir.Model, where: str) -> None:
    """Refuse what an ExportedProgram, which has no mode to look at, recorded in train mode."""
    for node in model.graph.all_nodes():
        mode = node.attributes.get("training_mode")
        dropout = node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None
        if dropout or (mode is not None and mode.as_int()):
            raise IRError(f"{where}: was exported in train mode ({node.op_type}); call .eval() before torch.export")


def _arguments(example: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    match example:
        case None:
            raise IRError(f"{where}: no example inputs; give a tensor, a tuple of inputs or a dict by name")
        case dict():
            return (), example
        case tuple() | list():
            return tuple(example), None
        case _:
            return (example,), None


def _export(module: Any, args: tuple[Any, ...], where: str, **options: Any) -> onnx_ir.Model:
    import torch

    try:
        with _quiet():
            # optimize=True would fold BatchNorm.
            program = torch.onnx.export(module, args, dynamo=True, optimize=False, verbose=False, **options)
    except Exception as error:  # torch wraps whatever tracing met
        raise IRError(
            f"{where}: cannot be captured: {first_line(_root(error))}; rewrite that part so that torch.export takes it"
        ) from error
    assert program is not None
    model: onnx_ir.Model = program.model
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter prints, logs and warns on its way."""
    before, sink = logging.root.manager.disable, io.StringIO()
    try:
        logging.disable(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _name_outputs(graph: onnx_ir.Graph, names: Sequence[str], where: str) -> None:
    """Name the outputs; the exporter would rename an input that is returned, and one value returned twice twice."""
    if len(names) > len(graph.outputs):
        raise IRError(f"{where}: {len(names)} output_names for {len(graph.outputs)} outputs; give one for each")
    done: set[onnx_ir.Value] = set()
    for index, name in enumerate(names):
        value = graph.outputs[index]
        if value in done or value.producer() is None:
            copy_output(graph, index, name)
        else:
            value.name = name
        done.add(value)


def _copy(tensor: onnx_ir.TensorProtocol | None, name: str) -> onnx_ir.TensorProtocol | None:
    if tensor is None:
        return None
    array = np.array(tensor.numpy())  # the exporter's tensor is the live parameter
    array.flags.writeable = False
    return onnx_ir.Tensor(array, tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=name)


def _trim_metadata(model: onnx_ir.Model) -> None:
    """Keep the modules' scopes; stack traces name files of the machine that exported."""
    for node in model.graph.all_nodes():
        for key in [k for k in node.metadata_props if k not in _KEPT_METADATA]:
            del node.metadata_props[key]
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _sources(model: onnx_ir.Model) -> dict[str, tuple[str, ...]]:
    """For every value that is computed from weights alone, the names of those weights in order of use."""
    sources: dict[str, tuple[str, ...]] = {name: (name,) for name in model.graph.initializers}
    for node in model.graph:
        known = [sources.get(v.name or "", ()) for v in node.inputs if v is not None and not _is_constant(v)]
        if known and all(known):
            merged = tuple(dict.fromkeys(name for names in known for name in names))
            sources.update({o.name: merged for o in node.outputs if o.name})
    return sources


def _is_constant(value: onnx_ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and all(v is None or _is_constant(v) for v in producer.inputs)


def _fold(model: onnx_ir.Model) -> None:
    """Fold constants and drop what is unused; a weight that others use too is not copied to be transposed."""
    from onnxscript import optimizer

    def should_fold(node: onnx_ir.Node) -> bool | None:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        return False if weight is not None and len(weight.uses()) > 1 else None

    with _quiet():
        optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=_UNLIMITED,
            output_size_limit=_UNLIMITED,
            should_fold=should_fold,
        )
        RemoveUnusedNodesPass()(model)


def _drop_zeros(model: onnx_ir.Model) -> None:
    """Take away the zeros that the exporter puts where a module has no bias or no initial state."""
    for node in list(model.graph.all_nodes()):
        slots = {"Conv": (2,), "ConvTranspose": (2,)}.get(node.op_type, ())
        for slot in (5, 6) if node.op_type in _RECURRENT else slots:
            value = node.inputs[slot] if slot < len(node.inputs) else None
            if value is None or not _is_generated(value) or value.const_value is None:
                continue
            if not np.any(value.const_value.numpy()):
                node.replace_input_with(slot, None)
    RemoveUnusedNodesPass()(model)


def _is_generated(value: onnx_ir.Value) -> bool:
    """Whether the exporter made up the name, as in `val_12`: no parameter of a module is called so."""
    return (value.name or "").startswith("val_")


def _name_weights(model: onnx_ir.Model, sources: dict[str, tuple[str, ...]]) -> None:
    """Give weights that were computed from parameters the parameters' name."""
    layers = _layers(model)
    for node in model.graph.all_nodes():
        if node.op_type in _RECURRENT:
            for slot, letter in ((1, "W"), (2, "R"), (3, "B")):
                value = node.inputs[slot] if slot < len(node.inputs) else None
                _rename(model, value, f"{layers[node]}.{letter}", sources, gates=_GATES.get(node.op_type))
    for value in list(model.graph.initializers.values()):
        names = sources.get(value.name or "", ())
        if not _is_generated(value) or not names:
            continue
        consumers = [use.node for use in value.uses() if use.node.op_type in _HEAVY]
        if len(names) == 1 and names[0] not in model.graph.initializers:
            _rename(model, value, names[0], sources)
        elif consumers and (scope := _scope(consumers[0])):
            _rename(model, value, f"{scope}.weight", sources)


def _rename(
    model: onnx_ir.Model,
    value: onnx_ir.Value | None,
    name: str,
    sources: dict[str, tuple[str, ...]],
    *,
    gates: str | None = None,
) -> None:
    if value is None or not value.is_initializer() or not _is_generated(value):
        return
    names, graph = sources.get(value.name or "", ()), model.graph
    base, count = name, 0
    while name in graph.initializers:
        count += 1
        name = f"{base}.{count}"
    graph.initializers.pop(value.name or "")
    value.name = name
    graph.register_initializer(value)
    value.metadata_props[TORCH] = ",".join(names)
    if gates is not None:
        value.metadata_props[GATES] = gates


def _layers(model: onnx_ir.Model) -> dict[onnx_ir.Node, str]:
    """What to call each recurrent node: its module, and its layer when the module has several."""
    nodes = [n for n in model.graph.all_nodes() if n.op_type in _RECURRENT]
    scopes = {node: _scope(node) or node.op_type.lower() for node in nodes}
    result = {}
    for node, scope in scopes.items():
        twins = [n for n in nodes if scopes[n] == scope]
        result[node] = scope if len(twins) == 1 else f"{scope}.l{twins.index(node)}"
    return result


def _scope(node: onnx_ir.Node) -> str:
    """The path of the module that a node belongs to, as in `layer1.0.conv1`."""
    text = node.metadata_props.get(_SCOPES, "[]")
    scopes = ast.literal_eval(text)
    return scopes[-2] if len(scopes) >= 2 else ""
