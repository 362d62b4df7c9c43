"""Euclid layers of 8 bits: codes of one scale for input and weight, and the integer form in the layer's place.

s = max(|x|, |w|)/127,   x ≈ s·x̂,   w ≈ s·ŵ,   −½‖x − w‖² ≈ (s²/2)·(−Σ (x̂ − ŵ)²)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context
from mc_opt.passes._euclid_graph import operand, whole

_SAMPLES = 256
_LIMIT = 127
_INTEGER = {"EuclidConv": "EuclidConvInteger", "EuclidLinear": "EuclidLinearInteger"}


def calibration(model: onnx_ir.Model, ctx: Context) -> ir.Data | None:
    """Samples that show the range of inputs: the run's data, or what it trains on."""
    if ctx.data is not None or ctx.training is None:
        return ctx.data
    from mc_opt.passes import _train_data  # torch is an extra

    source = _train_data.open_source(ctx.training.data, model, states=ctx.states or None, batchable=False)

    def walk() -> Iterator[ir.Sample]:
        for parts in source.batches(batch_size=1, seed=ctx.seed, epoch=0, shuffle=False):
            for part in parts:
                yield ir.Sample({name: tensor.numpy() for name, tensor in part.inputs.items()})

    return ir.Data(walk, source.size)


def unfit(site: ir.WeightSite, model: onnx_ir.Model, data: ir.Data | None) -> ir.Skip | None:
    """Why a layer has no form in 8 bits; None if it has."""
    if data is None:
        return ir.Skip("bits=8: the range of its input is not known; give inputs with --data")
    if site.tensor.dtype != onnx_ir.DataType.FLOAT:
        return ir.Skip(f"bits=8: its type is {site.tensor.dtype.name}, FLOAT was expected")
    for node, _ in site.consumers:
        x = node.inputs[0]
        if node.graph is not model.graph or x is None or x.graph is not model.graph:
            return ir.Skip("bits=8: it stands in the body of another node, where inputs are not measured")
        outputs = site.shape[0] if node.op_type == "Conv" or whole_of(node, "transB") else site.shape[1]
        terms = int(np.prod(site.shape)) // outputs
        if terms > ir.MOST_TERMS:
            return ir.Skip(f"bits=8: a sum of {terms} squares takes {ir.accumulator_bits(terms)} bits, int32 has 31")
        if node.op_type != "Conv" and x.shape is not None and len(x.shape) < 2:
            return ir.Skip("bits=8: its input is a vector; MatMulInteger takes matrices")
    return None


def whole_of(node: onnx_ir.Node, name: str) -> int:
    """A whole attribute of a node, 0 where it is not given."""
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def quantise(
    model: onnx_ir.Model, layers: Sequence[onnx_ir.Node], data: ir.Data, ctx: Context, *, by: tuple[str, str]
) -> None:
    """Replace Euclid layers by their integer forms; layers that share a weight share its scale."""
    ir.add_functions(model)
    samples = _First(data)
    largest = ir.largest_values(model, samples, [str(operand(node, "x").name) for node in layers])
    shared: dict[onnx_ir.Value, list[onnx_ir.Node]] = {}
    for node in layers:
        shared.setdefault(operand(node, "w"), []).append(node)
    names = ir.names_of(model.graph)
    for weight, users in shared.items():
        array = ctx.weight(weight)
        inputs = max(largest[str(operand(node, "x").name)] for node in users)
        most = max(inputs, float(np.abs(array).max()))
        scale = np.float32(most / _LIMIT if most > 0 else 1.0)
        codes = np.clip(np.rint(array / scale), -_LIMIT, _LIMIT).astype(np.int8)
        constants: dict[str, np.ndarray | onnx_ir.TensorProtocol] = {
            "codes": ctx.keep(codes, f"{weight.name}.codes"),
            "scale": np.array(scale, np.float32),
            "zero": np.array(0, np.int8),
            "half": np.array(np.float64(scale) ** 2 / 2, np.float32),
        }
        values = {k: ir.initializer(model.graph, f"{weight.name}.{k}", v) for k, v in constants.items()}
        values["codes"].metadata_props["mc_opt.layer"] = ir.layer_of(weight)
        names.update(str(v.name) for v in values.values())
        ctx.did(by[1], weight)
        for node in users:
            ir.replace_node(node, _integer(node, values, model), by=by, names=names)
        model.graph.initializers.pop(str(weight.name))
        ctx.note(
            ir.layer_of(weight), f"8 bits, one scale {scale:.3g}: inputs to {inputs:.3g}, weights to {_most(array)}"
        )


def _most(array: np.ndarray) -> str:
    return f"{float(np.abs(array).max()):.3g}"


class _First:
    """The first samples of a stream, with its states."""

    def __init__(self, data: ir.Data) -> None:
        self.data = data
        self.states = data.states

    def __iter__(self) -> Iterator[ir.Sample]:
        return itertools.islice(iter(self.data), _SAMPLES)


def _integer(node: onnx_ir.Node, values: dict[str, onnx_ir.Value], model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """QuantizeLinear -> integer distance -> DequantizeLinear, and the bias."""
    x, y = operand(node, "x"), node.outputs[0]
    bias = ir.find_op(node.op_type).input(node, "bias")
    attributes = {k: whole(a) for k, a in node.attributes.items()}
    given = _node("QuantizeLinear", [x, values["scale"], values["zero"]], onnx_ir.DataType.INT8, x.shape)
    distance = ir.node(_INTEGER[node.op_type], [given.outputs[0], values["codes"]], attributes)
    made = [given, distance]
    made.append(_node("DequantizeLinear", [distance.outputs[0], values["half"]], onnx_ir.DataType.FLOAT, y.shape))
    if bias is None:
        return made
    added = bias
    if node.op_type == "EuclidConv":
        axes = np.arange(1, len(attributes["strides"]) + 1)
        known = ir.initializer(model.graph, f"{bias.name}.axes", axes)
        shape = onnx_ir.Shape([*(bias.shape or ()), *[1] * len(axes)])
        made.append(_node("Unsqueeze", [bias, known], onnx_ir.DataType.FLOAT, shape))
        added = made[-1].outputs[0]
    made.append(_node("Add", [made[2].outputs[0], added], onnx_ir.DataType.FLOAT, y.shape))
    return made


def _node(
    op_type: str, inputs: Sequence[onnx_ir.Value], dtype: onnx_ir.DataType, shape: onnx_ir.Shape | None
) -> onnx_ir.Node:
    node = onnx_ir.Node("", op_type, inputs, num_outputs=1)
    node.outputs[0].type, node.outputs[0].shape = onnx_ir.TensorType(dtype), shape
    return node
