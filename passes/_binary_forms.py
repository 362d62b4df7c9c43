"""Training forms of binary and ternary weights in a graph, the numbers that change in a training, and what is stored.

    method     forward F                         backward B       source
    bc         nearest level                     1                BinaryConnect; Dockhorn et al., NeurIPS 2021
    pc         P_κ, κ from 0 to 1                1                ProxConnect, the same paper; the map is ours
    pcpp       P_κ∘T, κ from 0 to 1              T′               ProxConnect++, Lu et al., NeurIPS 2023; T of Bi-Real
    bnnpp      SS_β, β grows, then nearest       SS_β′            BNN++, the same paper
    bnnplus    nearest level                     SS_β′, β = 5     BNN+, Darabi et al., arXiv 1812.11800
    foothill   as bnnpp                          as bnnpp         Belbahri et al., arXiv 1901.06414

1 − κ falls and β grows by equal factors; the last third of a training is hard. These schedules are ours: a PC or PC++
that hardens late, or κ that grows by equal steps, leaves the weights too few steps in which they are what is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _binary
from mc_opt.passes._base import Context

_SOFT = 0.7  # the share of a training after which forms are hard
_FREEDOM = 0.01  # 1 − κ before that
_SOFTEST, _SHARPEST = 1.5, 15.0  # β
_FIXED = 5.0  # β of BNN+


@dataclass(frozen=True)
class Method:
    """One row of the table: the op, T for weights and for activations, and whether F is hard from the start."""

    op_type: str
    weight: int = 0
    activation: int = 1
    hard: bool = False


METHODS: Mapping[str, Method] = {
    "bc": Method("FakeProx", hard=True),
    "pc": Method("FakeProx"),
    "pcpp": Method("FakeProx", weight=2, activation=2),
    "bnnpp": Method("FakeSwishSign"),
    "bnnplus": Method("FakeSwishSign", hard=True),
    "foothill": Method("FakeSwishSign"),
}


def settings(model: onnx_ir.Model, pass_name: str, progress: float) -> dict[str, float]:
    """Name to value of the numbers that change, of those methods that the model has forms of."""
    found: dict[str, float] = {}
    way = min(progress / _SOFT, 1.0)
    kappa = 1 - _FREEDOM**way if way < 1 else 1.0
    for name, method in METHODS.items():
        if method.op_type == "FakeProx":
            found[f"{pass_name}.{name}.sharpness"] = 1.0 if method.hard else kappa
        else:
            found[f"{pass_name}.{name}.sharpness"] = _FIXED if method.hard else _SOFTEST * (_SHARPEST / _SOFTEST) ** way
            found[f"{pass_name}.{name}.hard"] = 1.0 if method.hard or way == 1.0 else 0.0
    return {name: value for name, value in found.items() if name in model.graph.initializers}


def weight_form(
    model: onnx_ir.Model, site: ir.WeightSite, ctx: Context, *, method: str, levels: int, by: tuple[str, str]
) -> None:
    """Put the training form of a weight into the graph: latents, a scale and a unit a row."""
    matrix = np.asarray(ir.canonical(ctx.weight(site.value), site.axes))
    alpha = _binary.mean_scale(matrix) if levels == 2 else _binary.ternary_scale(matrix)
    latent, scale, unit = _binary.latents(matrix, alpha)
    x = latent_value(site, latent, ctx)
    attributes: dict[str, object] = {"levels": levels, "axes": site.axes, "gain": _binary.GAIN}
    chosen = METHODS[method]
    if chosen.op_type == "FakeProx":
        attributes["transform"] = chosen.weight
    numbers = _settings(model, method, by[0])
    ir.replace_weight(site, ir.node(chosen.op_type, [x, *numbers, scale, unit], attributes), by=by)


def latent_value(site: ir.WeightSite, latent: np.ndarray, ctx: Context) -> onnx_ir.Value:
    """latent: [R, K] -> a value of the weight's shape, which `ir.replace_weight` registers."""
    name = f"{site.name}.latent"
    tensor = ctx.keep(np.ascontiguousarray(ir.restore(latent, site.shape, site.axes)), name)
    shape = onnx_ir.Shape(site.shape)
    return onnx_ir.Value(name=name, const_value=tensor, shape=shape, type=onnx_ir.TensorType(tensor.dtype))


def activation_form(
    model: onnx_ir.Model, x: onnx_ir.Value, name: str, *, method: str, levels: int, by: tuple[str, str]
) -> onnx_ir.Node:
    """The training form of an activation, in no graph yet."""
    chosen = METHODS[method]
    attributes: dict[str, object] = {"levels": levels}
    if chosen.op_type == "FakeProx":
        attributes["transform"] = chosen.activation
    made = ir.node(chosen.op_type, [x, *_settings(model, method, by[0])], attributes, output=name)
    ir.provenance(made, by)
    return made


def _settings(model: onnx_ir.Model, method: str, pass_name: str) -> list[onnx_ir.Value]:
    """The scalars of a method, one for all its forms."""
    found = []
    for part in ir.find_op(METHODS[method].op_type).settings:
        name = f"{pass_name}.{method}.{part}"
        value = model.graph.initializers.get(name)
        found.append(value if value is not None else ir.initializer(model.graph, name, np.array(1, np.float32)))
    return found


def shared(model: onnx_ir.Model, name: str, data: np.ndarray) -> onnx_ir.Value:
    """The initialiser of this name and these numbers, made at its first use; a later run finds it again."""
    known = model.graph.initializers.get(name)
    if known is not None and known.const_value is not None:
        held = known.const_value.numpy()
        if held.dtype == data.dtype and np.array_equal(held, data):
            return known
    return ir.initializer(model.graph, name, data)


def codebook(model: onnx_ir.Model, pass_name: str, levels: int, dtype: np.dtype) -> onnx_ir.Value:
    """The model's codebook of −1 to 1 in a type: one for all layers."""
    suffix = "" if dtype == np.float32 else f".{dtype.name}"
    return shared(model, f"{pass_name}.{levels - 1}bit{suffix}", np.linspace(-1, 1, levels).astype(dtype))


def is_weight(node: onnx_ir.Node) -> bool:
    """Whether a form is that of a weight, which alone has a scale."""
    return ir.find_op(node.op_type).input(node, "scale") is not None


def learned(node: onnx_ir.Node) -> tuple[str, str, tuple[int, ...]]:
    """The names of a weight's latents and scale, and its row axes."""
    op = ir.find_op(node.op_type)
    latent, scale = op.input(node, "x"), op.input(node, "scale")
    assert latent is not None and scale is not None
    return str(latent.name), str(scale.name), tuple(node.attributes["axes"].as_ints())


def store_weight(
    model: onnx_ir.Model, node: onnx_ir.Node, ctx: Context, *, codes: np.ndarray, levels: int, by: tuple[str, str]
) -> None:
    """Replace the form of a weight by a Lookup of `codes` (uint8, the latents' shape) with its trained scales."""
    op, graph = ir.find_op(node.op_type), node.graph
    assert isinstance(graph, onnx_ir.Graph)
    scale, unit = (_held(op.input(node, part), ctx) for part in ("scale", "unit"))
    name, axes, bits = str(node.outputs[0].name), node.attributes["axes"].as_ints(), levels - 1
    book = codebook(model, by[0], levels, scale.dtype)
    old = [value for value in node.inputs if value is not None]
    packed = ir.pack_codes(ir.canonical(codes, axes), bits)
    inputs = [
        ir.initializer(graph, f"{name}.codes", ctx.keep(packed, f"{name}.codes")),
        book,
        # Of the form's scale nothing is left: its name is free once the form is gone.
        _take_over(op.input(node, "scale"), scale * unit),
    ]
    made = ir.node("Lookup", inputs, {"bits": bits, "shape": codes.shape, "axes": axes, "group_size": 0})
    ir.replace_node(node, [made], by=by, names=set())
    drop(old)


def store_activation(model: onnx_ir.Model, node: onnx_ir.Node, *, levels: int, by: tuple[str, str]) -> None:
    """Replace the form of an activation by standard nodes: −1 where it is below all midpoints, and so on up to 1."""
    x, old = node.inputs[0], [value for value in node.inputs[1:] if value is not None]
    assert x is not None and x.dtype is not None
    dtype = x.dtype.numpy()
    values = np.linspace(-1, 1, levels)
    y = _number(model, by[0], values[0], dtype)
    nodes: list[onnx_ir.Node] = []
    for low, high in itertools.pairwise(values):
        bound = _number(model, by[0], (low + high) / 2, dtype)
        above = onnx_ir.Node("", "GreaterOrEqual", [x, bound], num_outputs=1)
        above.outputs[0].type, above.outputs[0].shape = onnx_ir.TensorType(onnx_ir.DataType.BOOL), x.shape
        chosen = onnx_ir.Node("", "Where", [above.outputs[0], _number(model, by[0], high, dtype), y], num_outputs=1)
        chosen.outputs[0].type, chosen.outputs[0].shape = x.type, x.shape
        nodes += [above, chosen]
        y = chosen.outputs[0]
    ir.replace_node(node, nodes, by=by, names=_all_names(model))
    drop(old)


def drop(values: list[onnx_ir.Value]) -> None:
    """Remove initialisers that nothing uses any more."""
    for value in values:
        if value.is_initializer() and not value.uses() and not value.is_graph_output() and value.graph is not None:
            value.graph.initializers.pop(str(value.name))


def _held(value: onnx_ir.Value | None, ctx: Context) -> np.ndarray:
    assert value is not None
    return ctx.weight(value)


def _take_over(value: onnx_ir.Value | None, data: np.ndarray) -> onnx_ir.Value:
    assert value is not None
    value.const_value = onnx_ir.tensor(data, name=value.name)
    return value


def _number(model: onnx_ir.Model, pass_name: str, value: float, dtype: np.dtype) -> onnx_ir.Value:
    suffix = "" if dtype == np.float32 else f".{dtype.name}"
    return shared(model, f"{pass_name}.{value:g}{suffix}", np.array(value, dtype))


def _all_names(model: onnx_ir.Model) -> set[str]:
    names: set[str] = set()
    for graph in model.graphs():
        names.update(str(value.name) for value in (*graph.inputs, *graph.initializers.values()))
        names.update(str(value.name) for node in graph for value in node.outputs)
    return names
