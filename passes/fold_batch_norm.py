"""Fold BatchNormalization into the weights beside it; exact at inference.

    BN(x) = s·x + t,   s = γ/√(σ² + ε),   t = β − s·μ

Into the layer before it, y = W x + b: W' = s·W, b' = s·b + t along the outputs (Conv, ConvTranspose, Gemm,
MatMul). Or into the layers after it, along the inputs: W' = W·s, b' = b + W t. On the way there it passes
what commutes with it: constant scales and shifts of channels, sums, Concat, average pools, layout changes.
A layer that pads with zeros sees no shift there, so before it BN(x) ↦ Conv is exact only with a bias map.

No single paper: the first fold is common practice, the ways past other nodes and the bias map are worked out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir

from mc_opt import ir
from mc_opt.passes import _affine
from mc_opt.passes._absorb import Folder
from mc_opt.passes._affine import Affine
from mc_opt.passes._base import Context, Pass
from mc_opt.passes._refold import Editor, bypass, constant_data, discard, is_constant, value_at

_PARAMETERS = ("scale", "bias", "mean", "variance")


_BEFORE, _AFTER = "into the layer before", "into the layers after"


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before or after it.

    border: before a Conv that pads with zeros, add the shift as a constant map of the output's size. Off by
    default: the map is as large as the activation and its Add costs what the BatchNormalization did.
    """

    family: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True

    border: bool = False

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Fold or decline every BatchNormalization, by name."""
        # A snapshot: folding removes nodes.
        found = [n for n in model.graph.all_nodes() if n.op_type == "BatchNormalization" and n.domain == ""]
        folded = 0
        for done, node in enumerate(found):
            layer = _layer(node)
            ctx.progress(done, len(found), layer)
            declined = self.declines(layer) or self._fold(node, layer, ctx)
            if declined is None:
                folded += 1
            else:
                ctx.skip(layer, declined)
        return folded

    def _fold(self, node: onnx_ir.Node, layer: str, ctx: Context) -> ir.Skip | None:
        affine = _read(node, ctx)
        if isinstance(affine, ir.Skip):
            return affine
        source, result = value_at(node, 0), node.outputs[0]
        back = Folder(Editor(ctx, (self.name, _BEFORE)), self.border).back(source, affine)
        if not isinstance(back, ir.Skip):
            ctx.did(_BEFORE, node)
            for edit in back:
                edit()
            _give_name(node, result)
            ctx.note(layer, "folded into the layer before it")
            return None
        on = Folder(Editor(ctx, (self.name, _AFTER)), self.border).on(result, affine)
        if isinstance(on, ir.Skip):
            return ir.Skip(f"{back}; {on}")
        ctx.did(_AFTER, node)
        for edit in on:
            edit()
        _remove(node, source)
        ctx.note(layer, "folded into the layers after it")
        return None


def _layer(node: onnx_ir.Node) -> str:
    """The name of a BatchNormalization's scale, its weight; of the result where that is shared or computed."""
    scale = node.inputs[1]
    own = scale is not None and is_constant(scale) and len(scale.uses()) == 1
    name = ir.layer_of(scale) if own and scale is not None else None
    return name or node.outputs[0].name or "?"


def _read(node: onnx_ir.Node, ctx: Context) -> Affine | ir.Skip:
    training = node.attributes.get("training_mode")
    if (training is not None and training.as_int()) or any(o.name and o.uses() for o in node.outputs[1:]):
        return ir.Skip("training_mode=1: it normalises by the statistics of each batch")
    for index, part in enumerate(_PARAMETERS, 1):
        if not is_constant(node.inputs[index]):
            return ir.Skip(f"its {part} is computed or given from outside; run fold-constants first")
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    scale, bias, mean, variance = (constant_data(value_at(node, index), ctx) for index in range(1, 5))
    affine = _affine.normalization(scale, bias, mean, variance, epsilon)
    if not affine.is_finite:
        return ir.Skip("its scale or shift is not finite (a variance below -epsilon, or NaN); repair the weight")
    return affine


def _give_name(node: onnx_ir.Node, result: onnx_ir.Value) -> None:
    """Take the node out; what it normalised carries its result's name."""
    source, name = value_at(node, 0), result.name
    source.metadata_props.update(result.metadata_props)
    _remove(node, source)
    result.name, source.name = None, name


def _remove(node: onnx_ir.Node, source: onnx_ir.Value) -> None:
    parameters = [v for v in node.inputs[1:] if v is not None]
    source.shape = source.shape or node.outputs[0].shape
    bypass(node, 0)
    for value in dict.fromkeys(parameters):
        discard(value)
