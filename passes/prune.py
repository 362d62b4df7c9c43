"""Remove the channels of least score, and with each all that belongs to it in every layer that it passes through.

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
from mc_opt.passes._channels import Channels, Group, channels_of
from mc_opt.passes._channels_cost import Budget, Cost, cost_of
from mc_opt.passes._channels_cut import cut
from mc_opt.passes._channels_plan import Scope, choose, meet
from mc_opt.passes._factor_sites import price_of

Score = Literal["l1", "l2", "bn", "activation"]


@dataclass(frozen=True)
class Prune(Pass):
    """Remove whole channels, the least important first; what is left is an ordinary smaller model.

    sparsity: the share that goes. structure: filter removes channels of convolutions and linear layers, node hidden
    units of LSTM, GRU and RNN. score: what a channel matters by: its weights (l1, l2), the scale of its
    BatchNormalization (bn), or its size on --data (activation). scope: layer takes the share from each group of tied
    channels, global from all together. budget: what sparsity is a share of: the count of channels, or params, macs or
    time, for which as many channels go as that needs. align: groups of 16 or more channels keep a multiple of it.
    """

    family: ClassVar[str] = "prune"
    idempotent: ClassVar[bool] = False  # the same share of what is left would go again

    sparsity: float = 0.5
    structure: Literal["filter", "node"] = "filter"
    score: Score = "l1"
    scope: Scope = "layer"
    budget: Budget = "count"
    align: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity:g}: expected a share between 0 and 1")
        if self.align < 1:
            raise ValueError(f"align={self.align}: expected 1 or more")

    def run(self, model: onnx_ir.Model, ctx: Context) -> int:
        """Choose and remove channels; the number of groups that lose some."""
        channels = channels_of(model)
        groups = self._taken(channels, ctx)
        if not groups:
            return 0
        removed = self._chosen(model, channels, groups, ctx)
        told: tuple[Budget, ...] = ("params", "macs")
        costs = {str(budget): cost_of(model, channels, budget, price_of(ctx)) for budget in told}
        shrunk = _tell(channels, groups, removed, costs, ctx)
        if shrunk:
            cut(model, channels, removed, ctx, rule=f"{self.structure} of least {self.score}")
        return shrunk

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
