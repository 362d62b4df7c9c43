"""What trained masks of every granularity share: their place in a graph, their start, their penalty, their end.

A mask belongs to units: channels, blocks or weights, of which the cost of the model is a function. Values of theta at
the start, the falling target and the frozen end are ours, as is the rule by which a budget that training has not
quite met is met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._channels_cost import Cost

if TYPE_CHECKING:
    from mc_opt.passes._trainable import Penalty

# θ starts within so many steps of the learning rate around 0. A step of an Adam is about one of these: the noise of
# some hundred steps reorders neighbours, and what matters steadily can move all the way.
_SPAN = 100
# β times that span: m̃ is smooth across it at first, and nearly a step in the end.
_SOFT, _SHARP = 4.0, 40.0
_FROZEN = 1e4  # then the gradient of θ is 0 in single precision
_MET, _FREEZE = 0.6, 0.7  # the shares of training at which the target stops falling, and the loss stops to move masks
_LAST = 0.699  # just before: the penalty still moves masks if they are above their target by then
_STRENGTH = 5.0
_BAND = 0.005  # the cost is near enough to its target
_POINTS = 64  # of the target's fall


@dataclass(frozen=True)
class Masks:
    """The masks of a prepared model.

    Attributes:
        thetas: by the name of a theta, the unit of each of its elements.
        cost: of the model, as a function of its units.
        count: of the units.
        least: whether one unit of every theta stays.
    """

    thetas: Mapping[str, np.ndarray]
    cost: Cost
    count: int
    least: bool

    @property
    def whole(self) -> float:
        """The cost with all units."""
        return float(self.cost.of(np.ones(self.count)))


def ranks(scores: np.ndarray) -> np.ndarray:
    """f32 of the scores' shape, above 0 and below 1: the larger the score, the larger, in equal steps."""
    places = np.empty(scores.size)
    places[np.argsort(scores.reshape(-1), kind="stable")] = np.arange(scores.size) + 0.5
    return (places / scores.size).astype(np.float32).reshape(scores.shape)


def start(masks: Masks, order: Mapping[str, np.ndarray], share: float, *, lr: float) -> dict[str, np.ndarray]:
    """Thetas to train from: what would go now lies below 0, in the order of its ranks, what stays above.

    Args:
        masks: whose thetas they are.
        order: for each theta its ranks.
        share: of the cost that may stay.
        lr: the learning rate, which sets the scale.
    """
    gone, _ = decide(masks, order, share)
    values = np.zeros(masks.count)
    for name, units in masks.thetas.items():
        values[units] = order[name].reshape(-1)
    masked = np.unique(np.concatenate(list(masks.thetas.values())))
    low, high = masked[gone[masked]], masked[~gone[masked]]
    span = span_of(lr)
    thetas = np.zeros(masks.count, np.float32)
    thetas[low] = span * (ranks(values[low]) - 1)
    thetas[high] = span * ranks(values[high])
    return {name: thetas[units].reshape(order[name].shape) for name, units in masks.thetas.items()}


def settings_at(span: float, progress: float) -> tuple[float, float]:
    """τ and β at this share of the training; span: the range of θ to one side of 0."""
    threshold = -span * max(0.0, 1.0 - progress / _MET)
    if progress >= _FREEZE:
        return threshold, _FROZEN / span
    return threshold, _SOFT * (_SHARP / _SOFT) ** (progress / _FREEZE) / span


def span_of(lr: float) -> float:
    """The range of θ to one side of 0; of any size where nothing moves."""
    return _SPAN * (lr or 1.0)


def penalty_of(masks: Masks, thetas: Mapping[str, np.ndarray], span: float) -> Penalty:
    """ρ·max(0, |cost/t − 1| − ε), then ρ·max(0, cost/t − 1): hard masks with the gradient of the soft ones.

    The target t is what the thetas at the start cost while the threshold rises through them: it falls from the whole
    cost to the share. Where training moves thetas, this keeps the cost near it.
    """
    targets = [_cost(masks, thetas, settings_at(span, k / _POINTS)[0]) for k in range(_POINTS + 1)]

    def penalty(parameters: Mapping[str, Any], progress: float) -> Any:
        threshold, sharpness = settings_at(span, min(progress, _LAST))
        kept: Any = None
        for name, units in masks.thetas.items():
            theta = parameters[name].reshape(-1)
            if kept is None:
                kept = theta.new_ones(masks.count)
            soft = ((theta - threshold) * sharpness).sigmoid()
            hard = _live(theta, threshold, masks.least).to(theta.dtype)
            kept = kept.index_copy(0, theta.new_tensor(units).long(), hard - soft.detach() + soft)
        target = float(np.interp(progress * _POINTS, range(_POINTS + 1), targets))
        excess = masks.cost.of(kept) / target - 1.0
        # In the end the target is a limit: what is above still goes, what is below stays.
        return _STRENGTH * (excess if progress >= _FREEZE else excess.abs() - _BAND).clamp(min=0.0)

    return penalty


def _live(theta: Any, threshold: float, least: bool) -> Any:
    return (theta > threshold) | (theta == theta.max()) if least else theta > threshold


def _cost(masks: Masks, thetas: Mapping[str, np.ndarray], threshold: float) -> float:
    kept = np.ones(masks.count)
    for name, units in masks.thetas.items():
        kept[units] = _live(thetas[name].reshape(-1), threshold, masks.least)
    return float(masks.cost.of(kept))


def decide(masks: Masks, thetas: Mapping[str, np.ndarray], share: float) -> tuple[np.ndarray, int]:
    """What goes: all that is masked, and where that leaves more than the share, the units of the lowest theta too.

    Returns:
        bool [count], and how many units go that were not masked.
    """
    alive = np.ones(masks.count, bool)
    order: list[tuple[np.ndarray, np.ndarray]] = []
    for name, units in masks.thetas.items():
        theta = thetas[name].reshape(-1)
        last = theta == theta.max() if masks.least else np.zeros(theta.size, bool)
        alive[units] = (theta > 0) | last
        free = alive[units] & ~last
        order.append((theta[free], units[free]))
    values = np.concatenate([theta for theta, _ in order])
    units = np.concatenate([own for _, own in order])[np.argsort(values, kind="stable")]
    limit = share * masks.whole * (1 + 1e-9)

    def cost(gone: int) -> float:
        kept = alive.astype(np.float64)
        kept[units[:gone]] = 0.0
        return float(masks.cost.of(kept))

    low, high = -1, len(units)
    if cost(0) <= limit:
        high = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= limit else (middle, high)
    alive[units[:high]] = False
    return ~alive, high


@dataclass(frozen=True)
class Placed:
    """A FakeMask that stood in a graph: what it masked, along which axis, by which theta."""

    value: onnx_ir.Value
    axis: int
    theta: onnx_ir.Value
    index: np.ndarray | None

    @property
    def theta_size(self) -> int:
        """Elements of theta."""
        return math.prod(int(d) for d in self.theta.shape or () if isinstance(d, int))


def insert(
    value: onnx_ir.Value,
    users: Sequence[tuple[onnx_ir.Node, int]],
    inputs: Sequence[onnx_ir.Value],
    attributes: Mapping[str, int],
    *,
    by: tuple[str, str],
    names: set[str],
) -> onnx_ir.Value:
    """Put a FakeMask between a value and some of its users; the masked value.

    Args:
        value: what is masked.
        users: nodes that take the masked value, each with the index of its input.
        inputs: theta, threshold, sharpness and, where there is one, the index.
        attributes: of the FakeMask.
        by: the pass and the rule.
        names: every value name of the model; grows by the new one.
    """
    base, number = f"{value.name}.masked", 0
    name = base
    while name in names:
        number += 1
        name = f"{base}.{number}"
    names.add(name)
    node = ir.node("FakeMask", [value, *inputs], attributes, output=name)
    producer, graph = value.producer(), users[0][0].graph
    assert isinstance(graph, onnx_ir.Graph)
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        takers = {user for user, _ in users}
        graph.insert_before(next(n for n in graph if n in takers), node)
    ir.provenance(node, by)
    for user, index in users:
        user.replace_input_with(index, node.outputs[0])
    return node.outputs[0]


def strip(model: onnx_ir.Model, nodes: Sequence[onnx_ir.Node]) -> list[Placed]:
    """Take FakeMasks out, in place; what they were. Thetas and indices stay in the model for `forget`."""
    # Of masks in a row, the later ones mask what the earlier ones make.
    made = {node.outputs[0]: node.inputs[0] for node in nodes}
    placed = []
    for node in nodes:
        value, theta = node.inputs[0], node.inputs[1]
        index = node.inputs[4] if len(node.inputs) > 4 else None
        assert value is not None and theta is not None
        places = index.const_value.numpy() if index is not None and index.const_value is not None else None
        placed.append(Placed(_origin(value, made), node.attributes["axis"].as_int(), theta, places))
        node.outputs[0].replace_all_uses_with(value)
        graph = node.graph
        assert isinstance(graph, onnx_ir.Graph)
        graph.remove(node, safe=True)
    return placed


def _origin(value: onnx_ir.Value, made: Mapping[onnx_ir.Value, onnx_ir.Value | None]) -> onnx_ir.Value:
    while (before := made.get(value)) is not None:
        value = before
    return value


def forget(model: onnx_ir.Model, names: Sequence[str]) -> None:
    """Remove constants of masks that nothing uses any more."""
    for name in names:
        value = model.graph.initializers.get(name)
        if value is not None and not value.uses():
            model.graph.initializers.pop(name)
