"""Which channels go: those of least score, by a share of every group, or of all, or until a cost is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mc_opt import ir
from mc_opt.passes._channels import Channels, Group
from mc_opt.passes._channels_cost import Cost

Scope = Literal["layer", "global"]

_STEPS = 1024  # of the share of channels that is searched for a cost


def choose(
    channels: Channels,
    groups: Sequence[Group],
    scores: np.ndarray,
    *,
    share: Callable[[Group], float],
    align: int,
    scope: Scope,
) -> np.ndarray:
    """bool [count], whether a unit goes; of equal scores the later unit goes first.

    Args:
        channels: of the model.
        groups: those that may lose units.
        scores: [count], of one scale where the scope is global.
        share: of a group's units that goes; of a global scope that of the first group, for all.
        align: see `kept_of`.
        scope: whether each group loses its share, or the units of least score go, wherever they are.
    """
    removed = np.zeros(channels.count, bool)
    limit = -np.inf
    if scope == "global" and groups:
        every = np.sort(scores[[unit for group in groups for unit in group.units]])
        gone = int(len(every) * share(groups[0]) + 0.5)
        limit = every[gone - 1] if gone else limit
    for group in groups:
        own = scores[list(group.units)]
        lost = share(group) if scope == "layer" else float((own <= limit).mean())
        kept = kept_of(len(own), align=align, removed=lost)
        order = np.argsort(-own, kind="stable")
        removed[np.array(group.units)[order[kept:]]] = True
    return removed


def kept_of(count: int, *, align: int, removed: float) -> int:
    """How many of `count` channels stay when a share of them goes; never none.

    Of 16 or more it is the nearest multiple of `align`, the larger of two: kernels work on vectors of channels.
    """
    kept = count - int(count * removed)
    if count < 16:
        return max(kept, 1)
    return min(max(int(kept / align + 0.5), 1) * align, count)


def meet(cost: Cost, target: float, channels: Channels, chosen: Callable[[float], np.ndarray]) -> np.ndarray | ir.Skip:
    """The fewest units to remove so that the cost is at most that share of the whole.

    Args:
        cost: to be brought down.
        target: share of it that may stay.
        channels: of the model.
        chosen: the units that go at a share of the channels; more for a larger one.
    """
    whole = cost.of(np.ones(channels.count))

    def left(step: int) -> float:
        return float(cost.of(1.0 - chosen(step / _STEPS)) / whole)

    if left(_STEPS) > target:
        return ir.Skip(f"{left(_STEPS):.3f} of it is left with the fewest channels, expected {target:g}")
    low, high = -1, _STEPS  # `high` meets the target, `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= target else (middle, high)
    return chosen(high / _STEPS)
