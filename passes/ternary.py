"""Store weights as −1, 0 or 1 and a scale a row, trained through a proximal map or SwishSign.

    ŵ = s·t(u),  t(u) = 0 where −½ ≤ u < ½, else sign(u)

u starts as w/α and the trained scale s as α, with the α of each row that minimises ‖w − α·t‖²; without
training that is what is stored. `method` chooses the maps of the forward and the backward pass, as for binary.

Papers: Dockhorn et al., "Demystifying and Generalizing BinaryConnect", NeurIPS 2021 (bc, pc); Lu et al., "Understanding
Neural Network Binarization with Forward and Backward Proximal Quantizers", NeurIPS 2023 (bnnpp). The exact search for α
and the sum of two SwishSigns are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir

from mc_opt import ir
from mc_opt.passes import _binary, _binary_forms, _binary_signs, _binary_sites
from mc_opt.passes._base import Context
from mc_opt.passes._trainable import TrainablePass, forms

_LEVELS = 3


@dataclass(frozen=True)
class Ternary(TrainablePass):
    """Store weights as −1, 0 or 1 with a scale a row, in 2 bits.

    method: the pair of forward and backward maps while training: bc (BinaryConnect), pc (ProxConnect) or bnnpp
    (BNN++). activations: whether the inputs of Conv, MatMul and Gemm get three levels too, of the value before a Relu,
    Clip or HardSwish, which their other users keep. skip: layer globs; `first` and `last` stand for the first and last
    Conv, MatMul or Gemm with a constant weight.
    """

    family: ClassVar[str] = "quantise"

    method: Literal["bc", "pc", "bnnpp"] = "bc"
    activations: bool = False
    skip: tuple[str, ...] = field(default=("first", "last"), kw_only=True)

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Put the training form of the layer's method in the place of every weight that is taken."""
        sites = _binary_sites.taken(self, model, ctx, bits=2)
        _binary_signs.warn_without_batch_norm(sites, ctx)
        for done, site in enumerate(sites):
            ctx.progress(done, len(sites), site.layer)
            method = self.at(site.layer).method
            by = (self.name, f"three levels, {method}")
            _binary_forms.weight_form(model, site, ctx, method=method, levels=_LEVELS, by=by)
        chosen = [(site, self.at(site.layer)) for site in sites]
        layers = [(site, own.method) for site, own in chosen if own.activations]
        _binary_signs.binarise(model, layers, ctx, pass_name=self.name, levels=_LEVELS)
        return len(sites)

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Store the nearest level of each latent with the scales, and those of activations in standard nodes."""
        found = list(forms(model, self.name))
        for node in found:
            value, by = node.inputs[0], (self.name, "three levels")
            assert value is not None
            if _binary_forms.is_weight(node):
                codes = _binary.level_codes(ctx.weight(value) * _binary.GAIN, _LEVELS)
                _binary_forms.store_weight(model, node, ctx, codes=codes, levels=_LEVELS, by=by)
            else:
                _binary_forms.store_activation(model, node, levels=_LEVELS, by=by)
        ir.add_functions(model)
        return len(found)

    def settings(self, model: onnx_ir.Model, progress: float) -> Mapping[str, float]:
        """How far the maps are from hard: κ or β of each method in use."""
        return _binary_forms.settings(model, self.name, progress)
