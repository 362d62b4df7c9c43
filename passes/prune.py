"""Remove the channels of least score, and with each all that is tied to it; or branches, or single weights.

    y = Σ_c W₂[:, c] · a(W₁[c, :] · x)   →   the same sum without the channels c that go

Channels that residual additions, products or concatenations tie go together; the result is the model in which they
are 0 where they are summed over.

Papers: Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710 (l1); Liu et al., "Learning Efficient
Convolutional Networks through Network Slimming", arXiv 1708.06519 (bn). Ties found as connected components, the
scores' scales and the budgets are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes import _channels_score as score_by
from mc_opt.passes._base import Context, Pass, PassError
from mc_opt.passes._blocks import block_cost, blocks_of, remove
from mc_opt.passes._channels import Channels, Group, channels_of
from mc_opt.passes._channels_cost import Budget, Cost, cost_of
from mc_opt.passes._channels_cut import cut
from mc_opt.passes._channels_plan import Scope, choose, meet
from mc_opt.passes._factor_sites import price_of
from mc_opt.passes._mask_forms import block_score, weight_cost
from mc_opt.passes._masks import Masks, decide, ranks
from mc_opt.passes._sparse_store import store_site

Score = Literal["l1", "l2", "bn", "activation"]


@dataclass(frozen=True)
class Prune(Pass):
    """Remove what matters least: channels, hidden units, residual branches, or single weights.

    sparsity: the share that goes. structure: filter removes channels of convolutions and linear layers, node hidden
    units of LSTM, GRU and RNN, block residual branches; weight makes single weights 0, stored as a bitmap and values
    where that is smaller. score: what it matters by: its weights (l1, l2), and for channels also the scale of their
    BatchNormalization (bn) or their size on --data (activation). scope: layer takes the share from each group of tied
    channels or each weight, global from all together. budget: what sparsity is a share of: the count, or params, macs
    or time, for which as much goes as that needs. align: groups of 16 or more channels keep a multiple of it.
    """

    family: ClassVar[str] = "prune"
    idempotent: ClassVar[bool] = False  # the same share of what is left would go again

    sparsity: float = 0.5
    structure: Literal["filter", "node", "block", "weight"] = "filter"
    score: Score = "l1"
    scope: Scope = "layer"
    budget: Budget = "count"
    align: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity:g}: expected a share between 0 and 1")
        if self.align < 1:
            raise ValueError(f"align={self.align}: expected 1 or more")
        if self.structure in ("block", "weight") and self.score not in ("l1", "l2"):
            raise ValueError(f"structure={self.structure} score={self.score}: this score is of channels; take l1 or l2")
        if (self.structure, self.budget) == ("weight", "time"):
            raise ValueError("structure=weight budget=time: single zeros save no time; take params, macs or count")

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Choose and remove; the number of groups of channels, branches or weights that lose some."""
        match self.structure:
            case "block":
                return self._branches(model, ctx)
            case "weight":
                return self._weights(model, ctx)
            case "filter" | "node":
                return self._channels(model, ctx)

    def _channels(self, model: onnx_ir.Model, ctx: Context) -> int:
        channels, groups, removed = self.plan(model, ctx)
        if not groups:
            return 0
        told: tuple[Budget, ...] = ("params", "macs")
        costs = {str(budget): cost_of(model, channels, budget, price_of(ctx)) for budget in told}
        shrunk = _tell(channels, groups, removed, costs, ctx)
        if shrunk:
            cut(model, channels, removed, ctx, rule=f"{self.structure} of least {self.score}")
        return shrunk

    def _branches(self, model: onnx_ir.Model, ctx: Context) -> int:
        blocks = []
        for block in blocks_of(model):
            if (reason := self.declines(block.name)) is None:
                blocks.append(block)
            else:
                ctx.skip(block.name, reason)
        if not blocks:
            return 0
        scores = np.array([block_score(block, ctx, int(self.score[1])) for block in blocks])
        cost = block_cost(model, blocks, self.budget, price_of(ctx))
        masks = Masks({"": np.arange(len(blocks))}, cost, len(blocks), least=False)
        gone, _ = decide(masks, {"": ranks(scores)}, 1 - self.sparsity)
        self._hold(float(cost.of(1.0 - gone)) / masks.whole)
        lost = [block for block, goes in zip(blocks, gone.tolist(), strict=True) if goes]
        for block in lost:
            ctx.note(block.name, f"branch of {len(block.nodes)} nodes removed")
        remove(model, lost, by=self.name)
        return len(lost)

    def _weights(self, model: onnx_ir.Model, ctx: Context) -> int:
        sites: list[ir.WeightSite] = []
        for found in ir.weight_sites(model):
            layer, site = (found.layer, found) if isinstance(found, ir.WeightSite) else found
            reason = self.declines(layer) or (site if isinstance(site, ir.Skip) else None)
            if reason is not None:
                ctx.skip(layer, reason)
            elif isinstance(site, ir.WeightSite):
                sites.append(site)
        if not sites:
            return 0
        order: dict[str, np.ndarray] = {}
        thetas: dict[str, np.ndarray] = {}
        count = 0
        for site in sites:
            size = np.abs(ctx.weight(site.value).astype(np.float32)).reshape(-1)
            order[site.name] = ranks(size) if self.scope == "layer" else size / (size.mean() or 1.0) + 1e-9
            thetas[site.name] = np.arange(count, count + size.size)
            count += size.size
        cost = weight_cost([(site.value, thetas[site.name]) for site in sites], self.budget, price_of(ctx))
        gone, _ = decide(Masks(thetas, cost, count, least=False), order, 1 - self.sparsity)
        for site in sites:
            w = ctx.weight(site.value)
            kept = ~gone[thetas[site.name]].reshape(w.shape)
            store_site(site, np.where(kept, w, w.dtype.type(0)), ctx, by=self.name)
        return len(sites)

    def _hold(self, left: float) -> None:
        if left > (1 - self.sparsity) * (1 + 1e-6):
            asked = f"sparsity={self.sparsity:g} of {self.budget}"
            raise PassError(self.name, "", f"{asked}: {left:.3f} of it is left without any branch; ask for less")

    def plan(self, model: onnx_ir.Model, ctx: Context) -> tuple[Channels, list[Group], np.ndarray]:
        """The units of the model, the groups that may lose some, and for each unit whether it goes."""
        channels = channels_of(model)
        groups = self._taken(channels, ctx)
        if not groups:
            return channels, [], np.zeros(channels.count, bool)
        return channels, groups, self._chosen(model, channels, groups, ctx)

    def _taken(self, channels: Channels, ctx: Context) -> list[Group]:
        taken = []
        for group in channels.groups:
            declined = next((s for layer in group.layers if (s := self.declines(layer)) is not None), None)
            if declined is None and group.kind != self.structure:
                declined = ir.Skip(f"structure={self.structure}: its channels are of the kind {group.kind}")
            reason = declined or group.reason
            if reason is None:
                taken.append(group)
                continue
            for layer in group.layers:
                ctx.skip(layer, reason)
        return taken

    def _chosen(self, model: onnx_ir.Model, channels: Channels, groups: list[Group], ctx: Context) -> np.ndarray:
        scores = self._scores(model, channels, groups, ctx)

        def at(share: float | None) -> np.ndarray:
            def of(group: Group) -> float:
                return self.at(group.name).sparsity if share is None else share

            return choose(channels, groups, scores, share=of, align=self.align, scope=self.scope)

        if self.budget == "count":
            return at(None)
        cost = cost_of(model, channels, self.budget, price_of(ctx))
        removed = meet(cost, 1 - self.sparsity, channels, at)
        if isinstance(removed, ir.Skip):
            raise PassError(self.name, "", f"sparsity={self.sparsity:g} of {self.budget}: {removed}; ask for less")
        return removed

    def _scores(self, model: onnx_ir.Model, channels: Channels, groups: list[Group], ctx: Context) -> np.ndarray:
        match self.score:
            case "l1" | "l2":
                scores = score_by.by_weights(channels, ctx, power=int(self.score[1]))
            case "bn":
                scores = score_by.by_batch_norm(channels, model, ctx)
                bare = next((g for g in groups if not scores[list(g.units)].any()), None)
                if bare is not None:
                    raise PassError(self.name, bare.name, "score=bn: no BatchNormalization follows; take another score")
            case "activation":
                if ctx.data is None:
                    raise PassError(self.name, "", "score=activation: the run has no data; give --data or score=l1")
                scores = score_by.by_activation(channels, model, ctx, ctx.data)
        return score_by.normalised(scores, channels)


def _tell(channels: Channels, groups: list[Group], removed: np.ndarray, costs: dict[str, Cost], ctx: Context) -> int:
    """Put into the report what goes; the number of groups that lose channels."""
    shrunk = before = after = 0
    for group in groups:
        kept = int((~removed[list(group.units)]).sum())
        before, after = before + len(group.units), after + kept
        if kept < len(group.units):
            shrunk += 1
            ctx.note(group.name, f"{len(group.units)} channels, now {kept}")
    sizes = (
        f"{name} {c.of(np.ones(channels.count)):,.0f}, now {c.of(1.0 - removed):,.0f}" for name, c in costs.items()
    )
    ctx.note("", f"{before} channels in {len(groups)} groups, now {after}; {'; '.join(sizes)}")
    return shrunk
