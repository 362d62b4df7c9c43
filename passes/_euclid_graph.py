"""Where a Euclid layer may stand, and the graph around it: its training form, and the BatchNormalization after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context
from mc_opt.passes._factor_sites import Window, conv_window
from mc_opt.passes._factored import FACTOR_OF, is_chain

_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
_STORED = {"FakeEuclidConv": "EuclidConv", "FakeEuclidLinear": "EuclidLinear"}


def operand(node: onnx_ir.Node, name: str) -> onnx_ir.Value:
    """An input of a node of ours that must be there, by its name."""
    value = ir.find_op(node.op_type).input(node, name)
    assert value is not None  # the op requires it
    return value


def whole(attribute: onnx_ir.Attr) -> Any:
    """The value of an attribute of one number or a list of numbers."""
    return attribute.as_int() if attribute.type == onnx_ir.AttributeType.INT else tuple(attribute.as_ints())


def unfit(site: ir.WeightSite) -> ir.Skip | None:
    """Why the layers that use a weight cannot become Euclid layers; None if they can."""
    if FACTOR_OF in site.value.metadata_props or any(is_chain(node) for node, _ in site.consumers):
        return ir.Skip("factored: a product of factors is no sum over inputs that a distance could replace")
    if any(node.domain == "mc_opt" and node.op_type in (*_STORED, *_STORED.values()) for node, _ in site.consumers):
        return ir.Skip("a Euclid layer already")
    if site.tensor.dtype not in _FLOATS:
        return ir.Skip(f"its type is {site.tensor.dtype.name}")
    for node, index in site.consumers:
        reason = _unfit_use(node, index, site)
        if reason is not None:
            return reason
    return None


def _unfit_use(node: onnx_ir.Node, index: int, site: ir.WeightSite) -> ir.Skip | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return ir.Skip(f"{node.op_type}: only Conv, Gemm and MatMul have a Euclid form")
    x = node.inputs[0]
    if index != 1:
        other = node.inputs[1 - index]
        return ir.Skip(f"it multiplies {other.name if other else '?'!r} from the left")
    if x is None or x.shape is None:
        return ir.Skip(f"the rank of {x.name if x else '?'!r} is unknown; infer or state it")
    if node.op_type == "Conv":
        window = conv_window(node, site.shape)
        if not 3 <= len(site.shape) <= 5:
            return ir.Skip(f"its shape is {list(site.shape)}; a Conv of 1 to 3 spatial axes was expected")
        return window if isinstance(window, ir.Skip) else None
    if len(site.shape) != 2:
        return ir.Skip(f"its shape is {list(site.shape)}; a matrix was expected")
    if _number(node, "transA", 0):
        return ir.Skip("transA=1: its input is stored by columns")
    if _number(node, "alpha", 1.0) != 1.0:
        return ir.Skip(f"alpha={_number(node, 'alpha', 1.0):g} scales the product, which no distance of x and w is")
    return None


def _number(node: onnx_ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def put_form(node: onnx_ir.Node, site: ir.WeightSite, strength: onnx_ir.Value, *, by: tuple[str, str]) -> None:
    """Replace a Conv, Gemm or MatMul by its training form; its bias goes in, or is added where it is no [outputs]."""
    x, w = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "Conv":
        window = conv_window(node, site.shape)
        assert isinstance(window, Window)  # `unfit` said so
        attributes = {
            "strides": window.strides,
            "dilations": window.dilations,
            "pads": window.pads,
            "group": window.group,
        }
        ir.replace_node(node, [ir.node("FakeEuclidConv", [x, w, strength, bias], attributes)], by=by, names=site.names)
        return
    transposed = int(_number(node, "transB", 0))
    outputs = site.shape[0 if transposed else 1]
    beta = _number(node, "beta", 1.0)
    inside = bias is not None and beta == 1.0 and bias.shape is not None and list(bias.shape) == [outputs]
    made = [ir.node("FakeEuclidLinear", [x, w, strength, bias if inside else None], {"transB": transposed})]
    if bias is not None and not inside:
        if beta != 1.0:
            factor = ir.initializer(site.graph, f"{site.name}.beta", np.array(beta, site.tensor.dtype.numpy()))
            site.names.add(str(factor.name))
            made.append(_standard("Mul", [bias, factor], bias))
            bias = made[-1].outputs[0]
        made.append(_standard("Add", [made[0].outputs[0], bias], node.outputs[0]))
    ir.replace_node(node, made, by=by, names=site.names)


def _standard(op_type: str, inputs: Sequence[onnx_ir.Value], like: onnx_ir.Value) -> onnx_ir.Node:
    node = onnx_ir.Node("", op_type, inputs, num_outputs=1)
    node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
    return node


def store(form: onnx_ir.Node, *, by: tuple[str, str], names: set[str]) -> onnx_ir.Node:
    """Put the stored form in the place of a training form, and take its strength out of the graph."""
    op, strength = ir.find_op(form.op_type), operand(form, "strength")
    values = [operand(form, "x"), operand(form, "w"), op.input(form, "bias")]
    stored = ir.node(_STORED[form.op_type], values, {k: whole(a) for k, a in form.attributes.items()})
    ir.replace_node(form, [stored], by=by, names=names)
    if not strength.uses() and strength.graph is not None:
        strength.graph.initializers.pop(str(strength.name))
    return stored


def norms_of(value: onnx_ir.Value) -> list[onnx_ir.Node]:
    """The BatchNormalizations that take a value, if nothing else does."""
    users = [use.node for use in value.uses()]
    if value.is_graph_output() or any(n.op_type != "BatchNormalization" or n.domain for n in users):
        return []
    return users


def norms_after(site: ir.WeightSite) -> list[onnx_ir.Node] | None:
    """The BatchNormalizations after every layer that uses a weight; None where one has something else after it."""
    each = [norms_of(node.outputs[0]) for node, _ in site.consumers]
    return [norm for norms in each for norm in norms] if all(each) else None


def enlarge(
    site: ir.WeightSite, norms: Sequence[onnx_ir.Node], rms: float, ctx: Context, *, by: tuple[str, str]
) -> None:
    """Multiply a weight by the power of two that brings it nearest to a root mean square, if it is below that.

    The biases of its layers, and the statistics after them, go with it, so that nothing changes: with mean' = a·mean
    and variance' = a²·(variance + ε) − ε the normalised values are the old ones.
    """
    size = math.sqrt(float(np.mean(np.square(ctx.weight(site.value), dtype=np.float64))))
    factor = 2.0 ** round(math.log2(rms / size)) if 0 < size < math.inf else 1.0
    if factor <= 1:
        return
    biases = [node.inputs[2] for node, _ in site.consumers if len(node.inputs) > 2 and node.inputs[2] is not None]
    statistics = [(norm.inputs[3], norm.inputs[4], _number(norm, "epsilon", 1e-5)) for norm in norms]
    touched = [site.value, *biases, *(value for mean, variance, _ in statistics for value in (mean, variance))]
    shared = [v for v in touched if v is None or not v.is_initializer() or v.is_graph_input()]
    alone = [v for v in touched[1:] if v is not None and len(v.uses()) > 1]
    if shared or alone:
        ctx.note(site.layer, "weights keep their size: a bias or a statistic is computed, or others use it too")
        return
    ctx.did(by[1], *(v for v in touched if v is not None))
    ctx.note(site.layer, f"weights times {factor:g}, which the BatchNormalization after it takes back")
    _multiply(site.value, factor, 0.0, ctx)
    for bias in biases:
        _multiply(bias, factor, 0.0, ctx)
    for mean, variance, epsilon in statistics:
        assert mean is not None and variance is not None  # ONNX requires them
        _multiply(mean, factor, 0.0, ctx)
        _multiply(variance, factor * factor, (factor * factor - 1) * epsilon, ctx)


def _multiply(value: onnx_ir.Value, factor: float, added: float, ctx: Context) -> None:
    array = ctx.weight(value)
    result = (array.astype(np.float64) * factor + added).astype(array.dtype)
    value.const_value = onnx_ir.tensor(ctx.keep(result, str(value.name)), name=value.name)
