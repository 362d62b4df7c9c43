"""Store weights as signs and a scale a row, trained through a proximal map or SwishSign.

    ŵ = s·sign(u)        forward y = s·F(u), backward ∂y/∂u = s·B(u), F → sign

u starts as w / mean |w| of the row, the trained scale s as mean |w|, which is best for signs; without
training that is what is stored. `method` chooses the pair (F, B).

Papers: Dockhorn et al., "Demystifying and Generalizing BinaryConnect", NeurIPS 2021 (bc, pc); Lu et al., "Understanding
Neural Network Binarization with Forward and Backward Proximal Quantizers", NeurIPS 2023 (pcpp, bnnpp); Darabi et al.,
"Regularized Binary Network Training", arXiv 1812.11800 (bnnplus); Belbahri et al., "Foothill", arXiv 1901.06414. The
schedules, the size of latents, and where an activation is binarised are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir

from mc_opt import ir
from mc_opt.passes import _binary, _binary_forms, _binary_signs, _binary_sites, _train_wells
from mc_opt.passes._base import Context
from mc_opt.passes._trainable import TrainablePass, forms

if TYPE_CHECKING:
    from mc_opt.passes._train_wells import Kind
    from mc_opt.passes._trainable import Penalty

_LEVELS = 2
_REGULARISED = ("bnnplus", "foothill")


@dataclass(frozen=True)
class Binary(TrainablePass):
    """Store weights as signs with a scale a row, w ≈ s·sign(u), in 1 bit.

    method: the pair of forward and backward maps while training: bc (BinaryConnect), pc (ProxConnect), pcpp
    (ProxConnect++ with Bi-Real's derivative), bnnpp (BNN++), bnnplus (BNN+) or foothill. activations: whether the
    inputs of Conv, MatMul and Gemm become signs too, of the value before a Relu, Clip or HardSwish, which their other
    users keep; the zeros of a padded Conv stay zeros; train such signs with freeze_statistics. regulariser: what draws
    weights to ±s for bnnplus, |x| (r1) or x² (r2); foothill has its own. strength: how much, at the end of a training;
    it grows from 0. skip: layer globs; `first` and `last` stand for the first and last Conv, MatMul or Gemm with a
    constant weight.
    """

    family: ClassVar[str] = "quantise"

    method: Literal["bc", "pc", "pcpp", "bnnpp", "bnnplus", "foothill"] = "bc"
    activations: bool = False
    regulariser: Literal["r1", "r2"] = "r2"
    strength: float = 0.1
    skip: tuple[str, ...] = field(default=("first", "last"), kw_only=True)

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Put the training form of the layer's method in the place of every weight that is taken."""
        sites = _binary_sites.taken(self, model, ctx, bits=1)
        _binary_signs.warn_without_batch_norm(sites, ctx)
        for done, site in enumerate(sites):
            ctx.progress(done, len(sites), site.layer)
            method = self.at(site.layer).method
            by = (self.name, f"signs, {method}")
            _binary_forms.weight_form(model, site, ctx, method=method, levels=_LEVELS, by=by)
        chosen = [(site, self.at(site.layer)) for site in sites]
        layers = [(site, own.method) for site, own in chosen if own.activations]
        _binary_signs.binarise(model, layers, ctx, pass_name=self.name, levels=_LEVELS)
        return len(sites)

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Store the signs of the latents with their scales, and those of activations in standard nodes."""
        found = list(forms(model, self.name))
        for node in found:
            value, by = node.inputs[0], (self.name, "signs")
            assert value is not None
            if _binary_forms.is_weight(node):
                codes = _binary.level_codes(ctx.weight(value) * _binary.GAIN, _LEVELS)
                _binary_forms.store_weight(model, node, ctx, codes=codes, levels=_LEVELS, by=by)
            else:
                _binary_forms.store_activation(model, node, levels=_LEVELS, by=by)
        ir.add_functions(model)
        return len(found)

    def penalty(self, model: onnx_ir.Model) -> Penalty | None:
        """What draws the weights of bnnplus and foothill to ±s."""
        wells = []
        for node in forms(model, self.name):
            chosen = self.at(ir.layer_of(node.outputs[0]))
            if chosen.method in _REGULARISED and chosen.strength and _binary_forms.is_weight(node):
                kind: Kind = "foothill" if chosen.method == "foothill" else chosen.regulariser
                wells.append((*_binary_forms.learned(node), kind, chosen.strength))
        if not wells:
            return None
        return lambda parameters, progress: sum(
            strength * progress * _train_wells.wells(parameters[latent] * _binary.GAIN, parameters[scale], axes, kind)
            for latent, scale, axes, kind, strength in wells
        )

    def settings(self, model: onnx_ir.Model, progress: float) -> Mapping[str, float]:
        """How far the maps are from hard: κ or β of each method in use."""
        return _binary_forms.settings(model, self.name, progress)
