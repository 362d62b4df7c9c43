"""Put the factors of a weight into a graph: each node that used the weight becomes one, or a few, that use the factors.

Conv     -> SeKronConv
MatMul   -> KronLinear                       with a constant left operand between two Transpose
Gemm     -> KronLinear (-> Mul, Add)         alpha is in the factors, a bias of [m] in the node
Gather   -> Gather -> Reshape -> MatMul -> Reshape; without the Reshapes where factor 2 has all columns
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._base import Context
from mc_opt.passes._factor import Factors
from mc_opt.passes._factor_sites import FactorSite, Use
from mc_opt.passes._factored import FACTOR_OF

_LAYER = "mc_opt.layer"


def replace(place: FactorSite, factors: Factors, ctx: Context, *, by: tuple[str, str]) -> None:
    """Replace every node that uses the weight; the weight goes, its factors take its place in its graph."""
    site = place.site
    ctx.did(by[1], site.value, *(use.node for use in place.uses))
    arrays = _rows(factors) if place.kind == "table" else factors.arrays
    values = [_factor(site, k, array, ctx) for k, array in enumerate(arrays, 1)]
    for use in place.uses:
        match place.kind:
            case "conv":
                nodes = [_conv(use, values)]
            case "linear":
                nodes = _linear(use, values, site)
            case "table":
                nodes = _table(use, values, factors, site)
        ir.replace_node(use.node, nodes, by=by, names=site.names)
    site.graph.initializers.pop(site.name)


def _rows(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a table as Gather and MatMul take them: [v, d_1·R] and [R, d_2]."""
    (rank, rows, columns), second = factors.arrays[0].shape, factors.arrays[1]
    return factors.arrays[0].transpose(1, 2, 0).reshape(rows, columns * rank), second.reshape(rank, -1)


def _factor(site: ir.WeightSite, number: int, array: np.ndarray, ctx: Context) -> onnx_ir.Value:
    array = np.ascontiguousarray(array)
    value = _constant(site, f"{site.name}.factor{number}", ctx.keep(array, f"{site.name}.factor{number}"))
    value.metadata_props.update({_LAYER: f"{site.layer}.factor{number}", FACTOR_OF: site.layer})
    return value


def _constant(site: ir.WeightSite, base: str, data: np.ndarray | onnx_ir.TensorProtocol) -> onnx_ir.Value:
    """A new initialiser in the weight's graph, under the first free name."""
    name, number = base, 0
    while name in site.names:
        number += 1
        name = f"{base}.{number}"
    tensor = onnx_ir.tensor(data, name=name) if isinstance(data, np.ndarray) else data
    shape = onnx_ir.Shape(tuple(tensor.shape.numpy()))
    value = onnx_ir.Value(name=name, const_value=tensor, shape=shape, type=onnx_ir.TensorType(tensor.dtype))
    site.names.add(name)
    site.graph.register_initializer(value)
    return value


def _conv(use: Use, values: Sequence[onnx_ir.Value]) -> onnx_ir.Node:
    window = use.window
    assert window is not None
    bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
    attributes = {
        "strides": window.strides,
        "dilations": window.dilations,
        "pads": window.pads,
        "group": window.group,
    }
    return ir.node("SeKronConv", [use.node.inputs[0], bias, *values], attributes)


def _linear(use: Use, values: Sequence[onnx_ir.Value], site: ir.WeightSite) -> list[onnx_ir.Node]:
    node, left = use.node, use.index == 0
    x = node.inputs[1 - use.index]
    assert x is not None and x.shape is not None  # `factor_site` saw to it
    nodes: list[onnx_ir.Node] = []
    # A right operand is multiplied by rows of x; a left one by columns, so x is turned before and y after.
    if left != _flag(node, "transB" if left else "transA"):
        nodes.append(_turn(x))
        x = nodes[-1].outputs[0]
    bias, rest = _bias(node, values, left=left)
    nodes.append(ir.node("KronLinear", [x, bias, *values]))
    if left:
        nodes.append(_turn(nodes[-1].outputs[0]))
    if rest is not None:
        nodes += _added(nodes[-1].outputs[0], rest, node, site)
    return nodes


def _flag(node: onnx_ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def _turn(x: onnx_ir.Value) -> onnx_ir.Node:
    """The last two axes exchanged."""
    assert x.shape is not None
    axes = list(range(len(x.shape)))
    axes[-2:] = axes[:-3:-1]
    dims = [x.shape[a] for a in axes]
    return _standard("Transpose", [x], onnx_ir.Shape(dims), perm=axes)


def _bias(
    node: onnx_ir.Node, values: Sequence[onnx_ir.Value], *, left: bool
) -> tuple[onnx_ir.Value | None, onnx_ir.Value | None]:
    """C of a Gemm as the bias of a KronLinear, or to be added; at most one is there."""
    c = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if c is None:
        return None, None
    outputs = 1
    for value in values:
        assert value.shape is not None
        outputs *= int(value.shape[-2])  # type: ignore[arg-type]  # a constant's shape is known
    fits = not left and c.shape is not None and list(c.shape) == [outputs] and _beta(node) == 1.0
    return (c, None) if fits else (None, c)


def _beta(node: onnx_ir.Node) -> float:
    attribute = node.attributes.get("beta")
    return float(attribute.as_float()) if attribute is not None else 1.0


def _added(y: onnx_ir.Value, c: onnx_ir.Value, node: onnx_ir.Node, site: ir.WeightSite) -> list[onnx_ir.Node]:
    """y + beta·C."""
    nodes = []
    if _beta(node) != 1.0:
        beta = np.array(_beta(node), site.tensor.dtype.numpy())
        nodes.append(_standard("Mul", [c, _constant(site, f"{node.outputs[0].name}.beta", beta)], c.shape))
        nodes[0].outputs[0].type = y.type
        c = nodes[0].outputs[0]
    return [*nodes, _standard("Add", [y, c], y.shape)]


def _table(use: Use, values: Sequence[onnx_ir.Value], factors: Factors, site: ir.WeightSite) -> list[onnx_ir.Node]:
    indices = use.node.inputs[1]
    assert indices is not None and indices.shape is not None  # `factor_site` saw to it
    rank, _, first = factors.arrays[0].shape
    second = factors.arrays[1].shape[-1]
    dims = list(indices.shape)
    rows = _standard("Gather", [values[0], indices], onnx_ir.Shape([*dims, first * rank]), like=values[0], axis=0)
    if first == 1:
        return [rows, _standard("MatMul", [rows.outputs[0], values[1]], onnx_ir.Shape([*dims, second]))]
    into = _constant(site, f"{site.name}.rows", np.array([0] * len(dims) + [first, rank], np.int64))
    out = _constant(site, f"{site.name}.row", np.array([0] * len(dims) + [first * second], np.int64))
    folded = _standard("Reshape", [rows.outputs[0], into], onnx_ir.Shape([*dims, first, rank]))
    product = _standard("MatMul", [folded.outputs[0], values[1]], onnx_ir.Shape([*dims, first, second]))
    return [
        rows,
        folded,
        product,
        _standard("Reshape", [product.outputs[0], out], onnx_ir.Shape([*dims, first * second])),
    ]


def _standard(
    op_type: str,
    inputs: Sequence[onnx_ir.Value],
    shape: onnx_ir.Shape | None,
    *,
    like: onnx_ir.Value | None = None,
    **attributes: Any,
) -> onnx_ir.Node:
    """A standard node with its output typed as its first input."""
    node = onnx_ir.node(op_type, inputs, attributes)
    node.outputs[0].name = None
    node.outputs[0].type = (like or inputs[0]).type
    node.outputs[0].shape = shape
    return node
