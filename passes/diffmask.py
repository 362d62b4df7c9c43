"""Learn which channels, branches or weights go while the model is trained, and remove them.

    y = x·m,  m = 1[θ > τ],  ∂m/∂θ ≈ β·m̃·(1 − m̃),  m̃ = σ(β·(θ − τ)),   loss + ρ·max(0, |cost(m)/t − 1| − ε)

Thetas start in the order of the weights' sizes, so that at τ = 0 the share is left. τ rises to 0 over the first 60 %
of the training, the cost follows its target t down to the share while gradients reorder the thetas, β grows, and
after 70 % masks stand still while weights settle. What is removed is what was masked.

Paper: Ramakrishnan, Sari, Partovi Nia, "Differentiable Mask for Pruning Convolutional and Recurrent Networks",
arXiv 1909.04567: a mask that is learned with the weights, for weights, filters, sub-networks and recurrent nodes. The
mask function, its schedule, the cost and its target are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir

from mc_opt import ir, targets
from mc_opt.passes import _mask_forms as masked
from mc_opt.passes._base import Context, PassError
from mc_opt.passes._blocks import Block, blocks_of
from mc_opt.passes._channels import Group, channels_of
from mc_opt.passes._channels_cost import Budget
from mc_opt.passes._factor_sites import price_of
from mc_opt.passes._masks import Masks, decide, forget, penalty_of, settings_at, span_of, start, strip
from mc_opt.passes._trainable import TrainablePass, forms
from mc_opt.passes._training import Training

if TYPE_CHECKING:
    from mc_opt.passes._trainable import Penalty

_TARGET = "mc_opt.target"


@dataclass(frozen=True)
class DiffMask(TrainablePass):
    """Learn what to remove: one mask a channel, hidden unit, residual branch or weight, trained with the weights.

    granularity: filter masks channels of convolutions and linear layers, node hidden units of LSTM, GRU and RNN,
    block residual branches, weight single weights, which are stored as a bitmap and values where that is smaller.
    budget: what share is a share of: the count of what is masked, params, macs, or predicted time. share: how much of
    it stays. Trained with the masks are the weights of layers with masked channels, or of all where branches or
    weights are masked: a mask alone can only choose.
    Without training those of the smallest weights go.
    """

    family: ClassVar[str] = "prune"
    idempotent: ClassVar[bool] = False  # the same share of what is left would go again

    granularity: Literal["filter", "node", "block", "weight"] = "filter"
    budget: Budget = "count"
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share:g}: expected a share between 0 and 1")
        if self.granularity == "weight" and self.budget == "time":
            raise ValueError("granularity=weight budget=time: single zeros save no time; take params, macs or count")

    def prepare(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Mask every group of channels, every branch or every weight that may go; how many there are."""
        match self.granularity:
            case "filter" | "node":
                channels = channels_of(model)
                groups = self._groups(channels.groups, ctx)
                if groups:
                    masked.mask_channels(model, channels, groups, masked.shared_settings(model), ctx, self.name)
                count = len(groups)
            case "block":
                blocks = self._blocks(blocks_of(model), ctx)
                if blocks:
                    masked.mask_blocks(model, blocks, masked.shared_settings(model), ctx, self.name)
                count = len(blocks)
            case "weight":
                sites = self._sites(model, ctx)
                if sites:
                    masked.mask_weights(model, sites, masked.shared_settings(model), ctx, self.name)
                count = len(sites)
        if count:
            self._start(model, ctx)
        return count

    def _start(self, model: onnx_ir.Model, ctx: Context) -> None:
        """Give the thetas, which are ranks by now, the scale and the place that the training and the share ask for."""
        if ctx.target is not None:
            for node in forms(model, self.name):
                node.metadata_props[_TARGET] = str(ctx.target)
        lr = ctx.training.lr if ctx.training is not None else Training.lr
        masks = self._masks(model)
        constants = model.graph.initializers
        order = {name: ctx.weight(constants[name]) for name in masks.thetas}
        for name, theta in start(masks, order, self.share, lr=lr).items():
            constants[name].const_value = ctx.keep(theta, name)
        for name, value in zip((masked.THRESHOLD, masked.SHARPNESS), settings_at(span_of(lr), 0.0), strict=True):
            constants[name].const_value = ctx.keep(np.array(value, np.float32), name)

    def _masks(self, model: onnx_ir.Model) -> Masks:
        clone = model.clone()
        found = list(forms(clone, self.name))
        noted = found[0].metadata_props.get(_TARGET)
        price = targets.parse_target(noted).price if noted else price_of(Context())
        return self._removal(clone, found, price).masks

    def _groups(self, groups: Sequence[Group], ctx: Context) -> list[Group]:
        taken = []
        for group in groups:
            reason = next((s for layer in group.layers if (s := self.declines(layer)) is not None), None)
            if reason is None and group.kind != self.granularity:
                reason = ir.Skip(f"granularity={self.granularity}: its channels are of the kind {group.kind}")
            reason = reason or group.reason
            if reason is None:
                taken.append(group)
                continue
            for layer in group.layers:
                ctx.skip(layer, reason)
        return taken

    def _blocks(self, blocks: Sequence[Block], ctx: Context) -> list[Block]:
        for block in blocks:
            if (reason := self.declines(block.name)) is not None:
                ctx.skip(block.name, reason)
        return [block for block in blocks if self.declines(block.name) is None]

    def _sites(self, model: onnx_ir.Model, ctx: Context) -> list[ir.WeightSite]:
        taken = []
        for found in ir.weight_sites(model):
            layer, site = (found.layer, found) if isinstance(found, ir.WeightSite) else found
            reason = self.declines(layer) or (site if isinstance(site, ir.Skip) else None)
            if reason is not None:
                ctx.skip(layer, reason)
            elif isinstance(site, ir.WeightSite):
                taken.append(site)
        return taken

    def parameters(self, model: onnx_ir.Model) -> tuple[str, ...]:
        """The thetas, and weights, biases and scales: of the layers that hold masked channels, or of all layers.

        A mask without its weights following could only choose among what is there.
        """
        clone = model.clone()
        nodes = list(forms(clone, self.name))
        thetas = dict.fromkeys(str(node.inputs[1].name) for node in nodes if node.inputs[1] is not None)
        touched = list(clone.graph)
        if self.granularity in ("filter", "node"):
            strip(clone, nodes)
            units = channels_of(clone).units
            moved = {value for value, axes in units.items() if any(axis is not None for axis in axes)}
            touched = [node for node in clone.graph if any(value in moved for value in node.inputs)]
        return tuple(masked.trained_beside(thetas, touched))

    def settings(self, model: onnx_ir.Model, progress: float) -> Mapping[str, float]:
        """Threshold and sharpness of all masks."""
        return dict(zip((masked.THRESHOLD, masked.SHARPNESS), settings_at(_span(model), progress), strict=True))

    def penalty(self, model: onnx_ir.Model) -> Penalty | None:
        """How far the cost of what stays is from its target."""
        if next(forms(model, self.name), None) is None:
            return None
        masks = self._masks(model)
        return penalty_of(masks, {name: _array(model, name) for name in masks.thetas}, _span(model))

    def convert(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Remove what is masked, and more where the budget asks for it; how many masks there were."""
        found = list(forms(model, self.name))
        if not found:
            return 0
        index = [str(n.inputs[4].name) for n in found if len(n.inputs) > 4 and n.inputs[4] is not None]
        removal = self._removal(model, found, price_of(ctx))
        masks = removal.masks
        values = {name: ctx.weight(model.graph.initializers[name]) for name in masks.thetas}
        gone, forced = decide(masks, values, self.share)
        left = masks.cost.of(1.0 - gone) / masks.whole
        total = sum(len(units) for units in masks.thetas.values())
        ctx.note(
            "", f"{int(gone.sum())} of {total} go, {forced} of them for the budget; {left:.3f} of {self.budget} is left"
        )
        if left > self.share * (1 + 1e-6):
            ctx.warn(f"{self.name}: {left:.3f} of {self.budget} is left with the fewest, {self.share:g} was asked for")
        removal.remove(gone, ctx)
        forget(model, [*masks.thetas, *index, masked.THRESHOLD, masked.SHARPNESS])
        return len(found)

    def _removal(self, model: onnx_ir.Model, found: list[onnx_ir.Node], price: targets.Price) -> masked.Removal:
        """What the masks mean; those of channels and branches are taken out of the model on the way."""
        match self.granularity:
            case "filter" | "node":
                removal = masked.channel_removal(model, strip(model, found), self.budget, price, self.name)
            case "block":
                removal = masked.block_removal(model, strip(model, found), self.budget, price, self.name)
            case "weight":
                removal = masked.weight_removal(model, found, self.budget, price, self.name)
        if isinstance(removal, ir.Skip):
            raise PassError(self.name, ir.title_of(found[0]), removal.reason)
        return removal


def _array(model: onnx_ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def _span(model: onnx_ir.Model) -> float:
    """The range of the thetas to one side of 0, which the threshold before the training says."""
    return -float(_array(model, masked.THRESHOLD))
