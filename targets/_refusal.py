"""What no kernel can take, said before a build starts and without TVM: symbolic shapes, types, control flow."""

from __future__ import annotations

import numpy as np
import onnx_ir

from mc_opt.ir import shape_advice, type_text
from mc_opt.targets._base import TargetError
from mc_opt.targets._open import open_shapes

_FLOATS = ("bool", "float16", "float32", "float64")
_TYPES = (*_FLOATS, "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def check(model: onnx_ir.Model, target: str, *, form: str = "vm") -> None:
    """Refuse inputs of an unknown type, or of a size that may not stay open: what no pass will mend.

    Args:
        model: what goes in.
        target: whose name the message begins with.
        form: `vm` takes any batch and any length of a sequence; `static` has one plan of its memory.

    Raises:
        TargetError: naming the input, and what to do.
    """
    open_shapes(model, target)
    for value in model.graph.inputs:
        _check_input(model, value, target, form)


def check_nodes(model: onnx_ir.Model, target: str) -> None:
    """Refuse control flow that the passes left, and outputs of types that no kernel writes.

    Raises:
        TargetError: naming the node or the output, and what to do.
    """
    for value in model.graph.outputs:
        _check_type(value, "output", target)
    for node in model.graph:
        if any(a.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS) for a in _attributes(node)):
            raise TargetError(refusal(node, target))


def _attributes(node: onnx_ir.Node) -> list[onnx_ir.Attr]:
    return list(node.attributes.values())


def _check_input(model: onnx_ir.Model, value: onnx_ir.Value, target: str, form: str) -> None:
    assert value.shape is not None  # open_shapes() saw to it
    if form == "static" and not all(isinstance(d, int) for d in value.shape):
        raise TargetError(
            f"{target}: input {value.name!r} has the symbolic shape {type_text(value)}, and form=static plans memory"
            f" for one shape; build form=vm, or add for example {shape_advice(model)}"
        )
    if 0 in value.shape:
        raise TargetError(
            f"{target}: input {value.name!r} is {type_text(value)} and holds no element, there is nothing to compute;"
            " give --shape without zeros"
        )
    _check_type(value, "input", target)


def _check_type(value: onnx_ir.Value, what: str, target: str) -> None:
    # Types of inference may be missing on outputs; kernels know theirs.
    if what == "output" and value.dtype is None:
        return
    is_tensor = isinstance(value.type, onnx_ir.TensorType)
    kind = str(np.dtype(value.dtype.numpy())) if is_tensor and value.dtype is not None else "unknown"
    if value.dtype == onnx_ir.DataType.STRING:
        kind = "string"
    if kind not in _TYPES:
        raise TargetError(
            f"{target}: {what} {value.name!r} is {type_text(value)}; expected a tensor of {', '.join(_TYPES)};"
            " build --target onnx, which keeps every type"
        )


def refusal(node: onnx_ir.Node, target: str) -> str:
    """Why a target does not take a node, and what to do."""
    match node.op_type:
        case "If":
            advice = _advice_on_if(node)
        case "Loop" | "Scan":
            advice = "unroll it before the export from its framework, or build --target onnx"
        case _:
            advice = "build --target onnx, which keeps every op"
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{where(node)}: {target} has no kernel for {name}; {advice}"


def _advice_on_if(node: onnx_ir.Node) -> str:
    """How the branch may be settled: by the inputs that decide it, or by folding where shapes alone do."""
    names = _deciding(node.inputs[0])
    if not names:
        return "its condition follows from constants and shapes: --passes fold-constants"
    values = " ".join(f"{name}=VALUE" for name in names)
    decide = "the input that decides" if len(names) == 1 else "the inputs that decide"
    return f"fix {decide} it: --passes 'specialize{{{values}}},fold-constants'"


def _deciding(value: onnx_ir.Value | None) -> list[str]:
    """The inputs of the model whose values, not shapes alone, a value is computed from."""
    found: dict[str, None] = {}
    seen: set[onnx_ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        maker = current.producer()
        if maker is None and current.is_graph_input():
            found[str(current.name)] = None
        elif maker is not None and maker.op_type not in ("Shape", "Size"):
            waiting += maker.inputs
    return sorted(found)


def where(node: onnx_ir.Node) -> str:
    """A node as messages name it."""
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')!r}"
