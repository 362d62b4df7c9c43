"""The first and the last layer of a model, which quantisers keep: what `skip=first,last` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir

from mc_opt import ir
from mc_opt.passes._factored import factored_layer, is_chain
from mc_opt.passes._size import stored

_ENDS = ("Conv", "MatMul", "Gemm")
_DISTANCES = ("EuclidConv", "EuclidLinear", "FakeEuclidConv", "FakeEuclidLinear")  # what `euclid` makes of them


def ends(model: onnx_ir.Model) -> dict[str, str]:
    """The layers of the first and the last Conv, MatMul or Gemm whose weight is constant or decoded from constants."""
    found = [layer for node in model.graph.all_nodes() if (layer := _layer_at(node)) is not None]
    return {"first": found[0], "last": found[-1]} if found else {}


def skipped_end(
    skip: Sequence[str], layer: str, site: ir.WeightSite | ir.Skip, ends: Mapping[str, str]
) -> ir.Skip | None:
    """Why `first` or `last` among the options `skip` leaves this layer out, or the layer that it is a factor of."""
    whole = factored_layer(site.value) if isinstance(site, ir.WeightSite) else None
    for end, layer_at_end in ends.items():
        if end in skip and layer_at_end in (layer, whole):
            return ir.Skip(f"skip={end}: it is the {end} Conv, MatMul or Gemm with a constant weight")
    return None


def _layer_at(node: onnx_ir.Node) -> str | None:
    if is_chain(node):
        factor = next(value for value in node.inputs[2:] if value is not None)
        return factored_layer(factor) or ir.layer_of(factor)
    distances = node.domain == "mc_opt" and node.op_type in _DISTANCES
    if not distances and (node.domain != "" or node.op_type not in _ENDS):
        return None
    for index in (1, 0) if node.op_type in ("MatMul", "Gemm") else (1,):
        value = node.inputs[index]
        if value is not None and not value.is_graph_input() and stored(value) is not None:
            # A plain product with a factor is the second half of a factored table: an embedding, which no end means.
            return None if factored_layer(value) else ir.layer_of(value)
    return None
