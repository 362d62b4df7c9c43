"""Store each layer in signs or in −1, 0 and 1: training chooses which.

    ŵ = s·t(u),  t(u) = 0 where |u| < Δ, else sign(u),  Δ = 1/(1 + √tan β)

A regulariser with the trained shape β, R(u; β) = min((|u| − 1)², tan β·u²) + γ·cot β, draws the latents u of a layer to
−1, 0 and 1 (β = π/4) or to ±1 (β → π/2, when Δ → 0). γ rewards the second, weights near 0 the first, and the loss
pulls at β through Δ.

Paper: Razani, Morin, Sari, Partovi Nia, "Adaptive Binary-Ternary Quantization", arXiv 1909.12205. That u is w over the
root mean square of its row, that β starts in the middle, the gradient of β through Δ, and that a layer is binary when
β > π/2 − 0.05 or fewer than one weight in 20 would be 0, are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _binary, _binary_forms, _binary_signs, _binary_sites, _train_wells
from mc_opt.passes._base import Context
from mc_opt.passes._trainable import TrainablePass, forms

if TYPE_CHECKING:
    from mc_opt.passes._trainable import Penalty

_BETA = 3 * math.pi / 8


@dataclass(frozen=True)
class SmartQuant(TrainablePass):
    """Store each layer in 1 bit, w ≈ s·sign(u), or in 2, w ≈ s·(−1, 0 or 1), as its training finds; else in 2.

    strength: of the regulariser. gamma: how much it favours 1 bit. skip: layer globs; `first` and
    `last` stand for the first and last Conv, MatMul or Gemm with a constant weight.
    """

    family: ClassVar[str] = "quantise"

    strength: float = 0.1
    gamma: float = 0.001
    skip: tuple[str, ...] = field(default=("first", "last"), kw_only=True)

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Put a training form with a β of its own in the place of every weight that is taken."""
        sites = _binary_sites.taken(self, model, ctx, bits=2)
        _binary_signs.warn_without_batch_norm(sites, ctx)
        for done, site in enumerate(sites):
            ctx.progress(done, len(sites), site.layer)
            matrix = np.asarray(ir.canonical(ctx.weight(site.value), site.axes))
            latent, scale, unit = _binary.latents(matrix, _binary.root_mean_square(matrix))
            start = latent * _binary.GAIN
            scale *= _binary.kept_mean(start, ir.threshold(start, _BETA))
            x = _binary_forms.latent_value(site, latent, ctx)
            beta = ir.initializer(site.graph, f"{site.name}.beta", np.array(_BETA, np.float32))
            node = ir.node("FakeThreshold", [x, beta, scale, unit], {"axes": site.axes, "gain": _binary.GAIN})
            ir.replace_weight(site, node, by=(self.name, "signs or three levels"))
        return len(sites)

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Store every layer in the levels that its β and its latents ask for."""
        found = list(forms(model, self.name))
        stored = weights = 0
        for node in found:
            latent, beta = node.inputs[:2]
            assert latent is not None and beta is not None
            x = ctx.weight(latent) * _binary.GAIN
            bound = ir.threshold(x, float(ctx.weight(beta)))
            levels = 3 if bound else 2
            codes = _binary.codes_beyond(x, bound) if bound else _binary.level_codes(x, 2)
            zeros = float((codes == 1).mean()) if bound else 0.0
            rule = "signs" if levels == 2 else "three levels"
            text = "1 bit" if levels == 2 else f"2 bits, {zeros:.0%} of the weights are 0"
            ctx.note(ir.layer_of(node.outputs[0]), f"{text}; β = {float(ctx.weight(beta)):.3f}")
            _binary_forms.store_weight(model, node, ctx, codes=codes, levels=levels, by=(self.name, rule))
            stored += x.size * (levels - 1)
            weights += x.size
        if weights:
            ctx.note("", f"{stored / weights:.2f} bits a weight on average")
        ir.add_functions(model)
        return len(found)

    def penalty(self, model: onnx_ir.Model) -> Penalty | None:
        """R of every layer, and the wall that holds β."""
        names = []
        for node in forms(model, self.name):
            latent, beta = node.inputs[:2]
            assert latent is not None and beta is not None
            own = self.at(ir.layer_of(node.outputs[0]))
            names.append((str(latent.name), str(beta.name), own.strength, own.gamma))
        if not names:
            return None
        return lambda parameters, _: sum(
            strength * _train_wells.three_wells(parameters[latent] * _binary.GAIN, parameters[beta], gamma)
            + _train_wells.wall(parameters[beta])
            for latent, beta, strength, gamma in names
        )
