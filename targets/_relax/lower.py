"""A whole model to one Relax function: folding, handlers, and the refusals that name a node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir
import tvm
from onnx_ir.passes.common import InlinePass
from tvm import relax, te

from mc_opt.targets import _prompt, _relax
from mc_opt.targets._base import TargetError
from mc_opt.targets._machine import Machine
from mc_opt.targets._open import open_shapes
from mc_opt.targets._refusal import refusal, where
from mc_opt.targets._relax import bodies, dims, extents, folding, half, norms, open_ops
from mc_opt.targets._relax.emitter import Emitter, Handler
from mc_opt.targets.kernels._choice import Choices

_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The Relax module of a model and what was noted on the way.

    Attributes:
        module: it holds the function `main`.
        kernels: special kernels, one line each.
        fallbacks: nodes that run in a general form, and why.
        limits: the largest sizes of open dimensions.
        choices: the tiles that were offered and taken.
    """

    module: tvm.IRModule
    kernels: tuple[str, ...]
    fallbacks: tuple[str, ...]
    limits: dict[str, int]
    choices: Choices


def lower(
    model: onnx_ir.Model,
    machine: Machine,
    progress: Callable[[int, int, str], None],
    *,
    states: Mapping[str, str] | None = None,
    tiles: Mapping[str, str] | None = None,
    prompt: onnx_ir.Model | None = None,
) -> Lowered:
    """Emit the Relax function `main` of a model whose inputs have static shapes, or such open ones as may be.

    The function takes the model's inputs in order and returns a tuple of its outputs in order.

    Args:
        model: the model.
        machine: what it will run on.
        progress: told of every node.
        states: outputs that may be written over inputs, by name.
        tiles: the tile that each shape takes, by name; by rule where it says nothing.
        prompt: a second model, which becomes the function `prompt` of the same module.
    """
    emitter = Emitter(model, machine)
    emitter.states = states or {}
    emitter.choices = Choices(tiles)
    emitter.shares = prompt is not None
    _function(emitter, "main", progress)
    kernels, fallbacks = list(emitter.kernels), list(emitter.fallbacks)
    if prompt is not None:
        second = Emitter(prompt, machine, emitter.bb)
        second.states, second.choices, second.shares = emitter.states, emitter.choices, True
        _function(second, _prompt.NAME, progress)
        kernels += [f"{_prompt.NAME}: {text}" for text in second.kernels]
        fallbacks += [f"{_prompt.NAME}: {text}" for text in second.fallbacks]
    limits = dict(sorted(emitter.limits.items()))
    return Lowered(emitter.bb.get(), tuple(kernels), tuple(fallbacks), limits, emitter.choices)


def _function(emitter: Emitter, name: str, progress: Callable[[int, int, str], None]) -> None:
    """Emit the function of a model."""
    model, table = emitter.model, _relax.handlers()
    emitter.fallbacks.extend(_inline_functions(model, table))
    norms.recognise(model)
    half.widen(model)
    emitter.fallbacks.extend(bodies.expand(model, table))
    inputs: list[Any] = []
    for value, shape in zip(model.graph.inputs, open_shapes(model), strict=True):
        assert value.dtype is not None
        dtype = str(np.dtype(value.dtype.numpy()))
        sizes = [d if isinstance(d, int) else emitter.dimension(d) for d in shape]
        inputs.append(relax.Var(f"in_{len(inputs)}", relax.TensorType(sizes, dtype)))
        emitter.set(value, inputs[-1])
    nodes = list(model.graph)
    ran: dict[str, list[str]] = {}
    with emitter.bb.function(name, inputs):
        with emitter.bb.dataflow():
            for k, node in enumerate(nodes):
                progress(k, len(nodes), node.op_type)
                emitter.emitted.clear()
                _emit(emitter, node, table)
                if emitter.emitted and _is_family(table.get((node.domain, node.op_type))):
                    kernels = ", ".join(dict.fromkeys(emitter.emitted))
                    ran.setdefault(f"{node.op_type} by {kernels}", []).append(node.name or node.outputs[0].name or "")
            result = emitter.bb.emit_output(relax.Tuple(_outputs(emitter)))
        emitter.bb.emit_func_output(result)
    for how, names in ran.items():
        emitter.note_kernel(f"{how}: {', '.join(names)}")


def _is_family(handler: Handler | None) -> bool:
    """Whether an op has kernels of its own, and not the general schedules alone."""
    return handler is not None and ".kernels." in getattr(handler, "__module__", "")


def _emit(emitter: Emitter, node: onnx_ir.Node, table: dict[tuple[str, str], Handler]) -> None:
    if node.outputs and node.outputs[0] in emitter.ahead:
        emitter.emitted.extend(emitter.ahead[node.outputs[0]])
        return
    if _fold(emitter, node) or (emitter.names and extents.fold(emitter, node)):
        return
    handler = table.get((node.domain, node.op_type))
    if handler is None:
        raise TargetError(refusal(node, emitter.machine.kind))
    if not open_ops.takes(emitter, node):
        raise TargetError(f"{where(node)}: {open_ops.refusal(emitter, node)}")
    try:
        handler(emitter, node)
    except (TargetError, KeyboardInterrupt):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise TargetError(f"{where(node)}: cannot be lowered: {first}; {_describe(emitter, node)}") from error


def _fold(emitter: Emitter, node: onnx_ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _RANDOM or not node.outputs:
        return False
    arrays = [emitter.constant(v) for v in node.inputs]
    if any(a is None and v is not None for a, v in zip(arrays, node.inputs, strict=True)):
        return False
    if any(attribute.type == onnx_ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return False
    for value, array in zip(node.outputs, folding.evaluate(node, arrays, emitter.model), strict=True):
        emitter.set_constant(value, array)
    return True


def _outputs(emitter: Emitter) -> list[relax.Expr]:
    """The outputs, plain; each is a kernel's own result, so that both printers own its buffer."""
    made: list[relax.Expr] = []
    used: set[onnx_ir.Value] = set()
    inputs = set(emitter.model.graph.inputs)
    for value in emitter.model.graph.outputs:
        expr = emitter.plain(value)
        if value in inputs or value in used or emitter.constant(value) is not None or expr in made:
            expr = emitter.te(_copy, expr, name="copy")
        used.add(value)
        made.append(expr)
    return made


def _copy(x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: x(*i), name="copy")


def _inline_functions(model: onnx_ir.Model, table: dict[tuple[str, str], Handler]) -> list[str]:
    """Replace calls of functions that have no kernel by their bodies; says which."""
    called = {node.op_identifier(): node for node in model.graph if node.op_identifier() in model.functions}
    without = {key for key in called if (key[0], key[1]) not in table}
    if not without:
        return []
    notes = [
        f"{node.domain}.{node.op_type} {node.name}: runs as its body of standard ops; no kernel takes it"
        for node in model.graph
        if node.op_identifier() in without
    ]
    InlinePass(lambda function: function.identifier() in without)(model)
    return notes


def _describe(emitter: Emitter, node: onnx_ir.Node) -> str:
    words = []
    for value in node.inputs:
        held = None if value is None else emitter._find(value)
        words.append("none" if held is None else f"{'x'.join(map(dims.text, held.shape)) or 'scalar'}")
    return f"its inputs are {', '.join(words)}; build --target onnx, or change the node"
