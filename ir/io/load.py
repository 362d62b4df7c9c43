"""Reading ONNX files: every model comes out at opset 21 or newer, checked, with its weights mapped or read-only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from mc_opt.ir.errors import IRError
from mc_opt.ir.io.lift import lift
from mc_opt.ir.io.read import SOURCE, read_model
from mc_opt.ir.io.shapes import fix_shapes, infer_shapes
from mc_opt.ir.io.weightless import graphs
from mc_opt.ir.op import DOMAIN, VERSION, add_functions
from mc_opt.ir.rewrite import free_name

Check = Literal["full", "structure"]
# Below this many elements a Constant node stays a node: axes and paddings read better in place.
_LIFTED_SIZE = 16
_CHUNK = 1 << 20
_FLOATS = {
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.DOUBLE,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.BFLOAT16,
}
# An infinity is a legal constant (a mask, a bound) but not a weight of these.
_WEIGHTED = {
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "GRU",
    "Gemm",
    "InstanceNormalization",
    "LSTM",
    "LayerNormalization",
    "MatMul",
    "RNN",
}


def load_model(
    path: str | os.PathLike[str],
    *,
    shapes: Mapping[str, tuple[int | str, ...]] | None = None,
    check: Check = "full",
) -> onnx_ir.Model:
    """Read an ONNX file and bring it to the form that passes work on.

    Initialisers are no longer inputs, Constants of 16 elements and more, and all of floats but scalars, are
    initialisers, the opset is 21 or newer, every node and every output has a name of its own, types and shapes are
    inferred. External data is memory-mapped. Functions of our own ops are made anew. `model.meta["mc_opt.source"]`
    holds the `Source`.

    Args:
        path: the file.
        shapes: fixes symbolic inputs, as `fix_shapes` does.
        check: `"structure"` does not look for NaN and infinity in the weights.

    Raises:
        IRError: the file cannot be read, is no ONNX model, or is not a model that works.
    """
    model = read_model(Path(path))
    source = model.meta[SOURCE]
    model = prepare(model, str(path), shapes=shapes, check=check)
    model.meta[SOURCE] = source
    return model


def prepare(
    model: onnx_ir.Model,
    where: str,
    *,
    shapes: Mapping[str, tuple[int | str, ...]] | None = None,
    check: Check = "full",
) -> onnx_ir.Model:
    """Bring a model that was read or captured to the form that passes work on; see `load_model`."""
    LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=_LIFTED_SIZE)(model)
    model = lift(model, where)
    if model.opset_imports.get(DOMAIN) == VERSION:
        # An op of ours is what its name and the domain's version say. The bodies in the file are how the mc-opt that
        # wrote it spelled that for ONNX Runtime; another release may spell it better.
        try:
            add_functions(model)
        except IRError as error:
            raise IRError(f"{where}: {error}") from error
    part_outputs(model.graph)
    _lift_weights(model)
    _name_nodes(model)
    if shapes:
        fix_shapes(model, shapes)
    else:
        infer_shapes(model)
    match check:
        case "full":
            check_finite(model, where)
        case "structure":
            pass
        case _:
            assert_never(check)
    return model


def part_outputs(graph: onnx_ir.Graph) -> None:
    """Give an output that is another one over again a value of its own: results are told apart by their names."""
    seen: set[onnx_ir.Value] = set()
    for index, value in enumerate(graph.outputs):
        if value in seen:
            copy_output(graph, index, free_name(graph, value.name or "output"))
        seen.add(value)


def copy_output(graph: onnx_ir.Graph, index: int, name: str) -> None:
    """Make an output of the graph a copy, called `name`, of the value that it was."""
    value = graph.outputs[index]
    node = onnx_ir.node("Identity", [value])
    copy = node.outputs[0]
    copy.name, copy.type, copy.shape = name, value.type, value.shape
    graph.append(node)
    graph.outputs[index] = copy


def _lift_weights(model: onnx_ir.Model) -> None:
    """Make an initialiser of each Constant of floats that is no scalar: a bias is a weight, however short."""
    for node in list(model.graph.all_nodes()):
        given = node.attributes.get("value") if node.op_type == "Constant" else None
        tensor = given.as_tensor() if given is not None else None
        if tensor is None or tensor.dtype not in _FLOATS or not len(tensor.shape) or node.outputs[0].is_graph_output():
            continue
        old, graph = node.outputs[0], node.graph
        assert isinstance(graph, onnx_ir.Graph)
        shape = onnx_ir.Shape(tensor.shape.numpy())
        new = onnx_ir.Value(name=old.name, type=onnx_ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        new.metadata_props.update(old.metadata_props)
        graph.register_initializer(new)
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)


def check_finite(model: onnx_ir.Model, where: str) -> None:
    """Refuse weights that hold NaN, or infinity where an op multiplies by it; reads a block at a time.

    Raises:
        IRError: names the first such weight, and how many of its elements are bad.
    """
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is None or value.const_value.dtype not in _FLOATS:
                continue
            weighted = any(use.node.op_type in _WEIGHTED for use in value.uses())
            if value.const_value.size == 1 and not weighted:
                continue  # a fill value may be anything
            count, kind = _count_bad(value.const_value.numpy(), weighted=weighted)
            if count:
                raise IRError(
                    f"{where}: weight {value.name!r} holds {count} {kind} of {value.const_value.size} elements, "
                    "expected finite numbers; repair or retrain the model"
                )


def _count_bad(array: npt.NDArray[np.generic], *, weighted: bool) -> tuple[int, str]:
    """How many elements are NaN (or infinite, in a weight), and what to call them; `array`: any shape."""
    flat, count, infinite = array.reshape(-1), 0, 0
    for start in range(0, flat.size, _CHUNK):
        block = flat[start : start + _CHUNK]
        if np.isfinite(block).all():
            continue
        nans = int(np.isnan(block).sum())
        infinite += int(np.isinf(block).sum()) if weighted else 0
        count += nans
    names = [name for name, n in (("NaN", count), ("infinite", infinite)) if n]
    return count + infinite, " or ".join(names)


def _name_nodes(model: onnx_ir.Model) -> None:
    """Give every node a name of its own: after its first output when it has none or shares it."""
    used: set[str] = set()
    for graph in graphs(model):
        for node in graph:
            name = node.name or next((o.name for o in node.outputs if o.name), None) or node.op_type
            base, count = name, 0
            while name in used:
                count += 1
                name = f"{base}.{count}"
            node.name = name
            used.add(name)
