"""Replace multiplications by squared differences: layers of −½‖x − w‖².

    S_λ(x, w) = x·w − λ·½(‖x‖² + ‖w‖²),   λ: 0 → 1 while training;   S₁(x, w) = −½ Σᵢ (xᵢ − wᵢ)²

λ = 0 is the trained layer. λ rises linearly over the share `warm` of the training and is 1 after it. At λ = 1 hardware
needs a subtraction and a squarer, half a multiplier; processors run the inner product with two sums of squares.

A BatchNormalization after a layer does not see a factor a on its weights, but S₁ does: up to a constant of each output
S₁(x, a·w)/a = x·w − ½‖x‖²/a. So where one follows, weights start multiplied by a power of two that makes them as large
as inputs are, about 1; larger ones keep the layer nearer to the product, and in b bits with one scale for x and w leave
x fewer of them.

Paper: Li et al., "EuclidNets: An Alternative Operation for Efficient Inference of Deep Learning Models",
arXiv 2212.11803, SN Computer Science 2023; Oliveira Prazeres et al., ICPRAM 2022. The operation and the way from λ = 0
to 1 are the paper's; the shape of that way, the factor a and the choice of layers are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _euclid_graph as graphs
from mc_opt.passes import _euclid_integer as integers
from mc_opt.passes._base import Context
from mc_opt.passes._ends import ends, skipped_end
from mc_opt.passes._trainable import TrainablePass, forms

_RULE = "squared distance"


@dataclass(frozen=True)
class Euclid(TrainablePass):
    """Replace the product of inputs and weights by −½ of their squared distance, in Conv, Gemm and MatMul.

    warm: the share of the training over which the distance fades in; without training data it is whole at once, which
    loses accuracy. rms: what the weights' root mean square is brought near to, by a power of two that the
    BatchNormalization after the layer takes back; 0 leaves them. bits: 8 stores weights in 8 bits and computes in
    integers, with one scale for inputs and weights that data shows; 0 keeps floats. skip: layer globs; `first` and
    `last` stand for the first and last Conv, MatMul or Gemm with a constant weight.
    """

    family: ClassVar[str] = "replace"

    warm: float = 0.5
    rms: float = 2.0
    bits: int = 0
    skip: tuple[str, ...] = field(default=("first", "last"), kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.warm <= 1:
            raise ValueError(f"warm={self.warm}: give a share from 0 to 1")
        if not 0 <= self.rms < float("inf"):
            raise ValueError(f"rms={self.rms}: give a number above 0, or 0 to leave the weights")
        if self.bits not in (0, 8):
            raise ValueError(f"bits={self.bits}: choose one of 0, 8")

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Put training forms in the place of layers; their weights and biases stay."""
        taken = self._taken(model, ctx)
        bare = []
        for done, site in enumerate(taken):
            ctx.progress(done, len(taken), site.layer)
            norms = graphs.norms_after(site)
            if norms is None:
                bare.append(site.layer)
            elif self.at(site.layer).rms:
                graphs.enlarge(site, norms, self.at(site.layer).rms, ctx, by=(self.name, "factor"))
            strength = ir.initializer(site.graph, f"{site.name}.strength", np.array(1.0, np.float32))
            site.names.add(str(strength.name))
            for node, _ in site.consumers:
                graphs.put_form(node, site, strength, by=(self.name, _RULE))
        if bare:
            ctx.warn(
                f"euclid: no BatchNormalization directly after {', '.join(bare)}: nothing brings the large negative "
                "sums back to 0; leave such layers out with skip="
            )
        if taken and ctx.training is not None and ctx.training.batch_norm == "frozen":
            ctx.warn(
                "euclid: batch_norm=frozen keeps statistics of products, which do not fit distances; train with "
                "batch_norm=batch"
            )
        return len(taken)

    def _taken(self, model: onnx_ir.Model, ctx: Context) -> list[ir.WeightSite]:
        at_ends, taken = ends(model), []
        data = functools.cache(lambda: integers.calibration(model, ctx))  # opened once, and only for bits
        for found in ir.weight_sites(model):
            layer, site = (found.layer, found) if isinstance(found, ir.WeightSite) else found
            reason = self.declines(layer) or skipped_end(self.skip, layer, site, at_ends)
            if reason is None:
                reason = site if isinstance(site, ir.Skip) else graphs.unfit(site)
            if reason is None and isinstance(site, ir.WeightSite) and self.at(layer).bits:
                reason = integers.unfit(site, model, data())
            if reason is not None:
                ctx.skip(layer, reason)
            elif isinstance(site, ir.WeightSite):
                taken.append(site)
        return taken

    def without_training(self, model: onnx_ir.Model, ctx: Context) -> int:
        """The whole distance at once."""
        made = super().without_training(model, ctx)
        if made:
            ctx.warn(
                "euclid: without training the layers compute something else than they were trained for, and each "
                "BatchNormalization after them has statistics of the old sums; train, for example with --train"
            )
        return made

    def parameters(self, model: onnx_ir.Model) -> tuple[str, ...]:
        """Weights and biases of the forms, and scale and shift of each BatchNormalization after them."""
        found = dict.fromkeys(super().parameters(model))
        for node in forms(model, self.name):
            for norm in graphs.norms_of(node.outputs[0]):
                found.update(dict.fromkeys(str(v.name) for v in norm.inputs[1:3] if v is not None))
        return tuple(found)

    def settings(self, model: onnx_ir.Model, progress: float) -> Mapping[str, float]:
        """λ of each layer."""
        found = {}
        for node in forms(model, self.name):
            strength, layer = graphs.operand(node, "strength"), ir.layer_of(graphs.operand(node, "w"))
            warm = self.at(layer).warm
            found[str(strength.name)] = min(1.0, progress / warm) if warm else 1.0
        return found

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Put the stored forms, which are the training forms at λ = 1, and then those of integers."""
        found = list(forms(model, self.name))
        names = ir.names_of(model.graph)
        narrow = []
        for node in found:
            stored = graphs.store(node, by=(self.name, _RULE), names=names)
            if self.at(ir.layer_of(graphs.operand(stored, "w"))).bits:
                narrow.append(stored)
        if narrow:
            data = integers.calibration(model, ctx)
            assert data is not None  # `prepare` declines layers without
            integers.quantise(model, narrow, data, ctx, by=(self.name, "squared distance of integers"))
        return len(found)
