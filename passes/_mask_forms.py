"""Masks of each granularity: where they stand in a graph, what they cost, and what is left when they are removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from mc_opt import ir, targets
from mc_opt.passes import _blocks
from mc_opt.passes._base import Context
from mc_opt.passes._channels import STAYS, Channels, Group, channels_of
from mc_opt.passes._channels_axes import Place, dims_of
from mc_opt.passes._channels_cost import Budget, Cost, cost_of, linear, work_of
from mc_opt.passes._channels_cut import cut
from mc_opt.passes._channels_score import by_weights
from mc_opt.passes._masks import Masks, Placed, insert, ranks, settings_at, span_of
from mc_opt.passes._sparse_store import store_form

THRESHOLD, SHARPNESS = "diffmask.threshold", "diffmask.sharpness"

# The inputs of layers that are trained beside masks, by op.
_LEARNED = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Add": (0, 1),
    "Mul": (0, 1),
    "PRelu": (1,),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "Gather": (0,),
    "LSTM": (1, 2, 3),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "FakeMask": (0,),
}


@dataclass(frozen=True)
class Removal:
    """What the masks of a model, stripped of them, mean.

    Attributes:
        masks: by theta.
        remove: takes the units away, in place, and says in a word what they were.
    """

    masks: Masks
    remove: Callable[[np.ndarray, Context], None]


def shared_settings(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """τ and β of all masks, as they are before a training."""
    values = zip((THRESHOLD, SHARPNESS), settings_at(span_of(1.0), 0.0), strict=True)
    return [ir.initializer(model.graph, name, np.array(value, np.float32)) for name, value in values]


# ---- channels: filters, and hidden units of recurrent cells


def mask_channels(
    model: onnx_ir.Model,
    channels: Channels,
    groups: Sequence[Group],
    settings: Sequence[onnx_ir.Value],
    ctx: Context,
    by: str,
) -> None:
    """One theta a group, wherever its channels are summed over."""
    scores = by_weights(channels, ctx, power=1)
    names = ir.names_of(model.graph)
    users: dict[tuple[onnx_ir.Value, int], list[Place]] = {}
    for place in channels.sums:
        if channels.at(place) is not None:
            users.setdefault((place.value, place.axis), []).append(place)
    thetas = {}
    for group in groups:
        theta = ir.initializer(model.graph, f"{group.name}.theta", ranks(scores[list(group.units)]))
        names.add(str(theta.name))
        thetas[group.units] = theta
    for (value, axis), places in users.items():
        along = channels.units[value][axis]
        assert along is not None
        takers = [(place.node, place.index) for place in places]
        masked = value
        for units, theta in thetas.items():
            index = _positions(along, units)
            if (index < 0).all():
                continue
            inputs = [theta, *settings]
            if not np.array_equal(index, np.arange(len(units))):
                inputs.append(ir.initializer(model.graph, f"{theta.name}.index", index))
            masked = insert(masked, takers, inputs, {"axis": axis, "least": 1}, by=(by, "channel mask"), names=names)


def _positions(along: np.ndarray, units: Sequence[int]) -> np.ndarray:
    """The number within the group of the unit at each position; -1 for a position of another group."""
    numbers = np.full(int(max(along.max(), max(units))) + 2, STAYS)
    numbers[list(units)] = np.arange(len(units))
    found: np.ndarray = numbers[along]
    return np.where(along == STAYS, STAYS, found)


def channel_removal(
    model: onnx_ir.Model, placed: Sequence[Placed], budget: Budget, price: targets.Price, by: str
) -> Removal | ir.Skip:
    """The masks of channels, in a model that has no FakeMask left."""
    channels = channels_of(model)
    thetas: dict[str, np.ndarray] = {}
    for mask in placed:
        along = channels.units[mask.value][mask.axis]
        if along is None:
            return ir.Skip(
                f"the channels of {mask.value.name} cannot be removed any more, for another pass holds their weights; "
                "train it before other passes and not together with them (joint)"
            )
        places = np.arange(len(along)) if mask.index is None else mask.index
        units = thetas.setdefault(str(mask.theta.name), np.full(mask.theta_size, STAYS))
        units[places[places >= 0]] = along[places >= 0]
    if budget == "count":
        cost = linear([(1.0, units) for units in thetas.values()])
    else:
        cost = cost_of(model, channels, budget, price)
    masks = Masks(thetas, cost, channels.count, least=True)
    return Removal(masks, lambda gone, ctx: cut(model, channels, gone, ctx, rule=by))


# ---- blocks: residual branches


def mask_blocks(
    model: onnx_ir.Model, blocks: Sequence[_blocks.Block], settings: Sequence[onnx_ir.Value], ctx: Context, by: str
) -> None:
    """One theta for what a branch adds."""
    scores = np.array([block_score(block, ctx) for block in blocks])
    names = ir.names_of(model.graph)
    for block, theta in zip(blocks, ranks(scores), strict=True):
        value = ir.initializer(model.graph, f"{block.name}.theta", theta.reshape(1))
        names.add(str(value.name))
        attributes = {"axis": 0, "least": 0}
        users = [(block.add, block.branch)]
        insert(block.value, users, [value, *settings], attributes, by=(by, "branch mask"), names=names)


def block_score(block: _blocks.Block, ctx: Context, power: int = 1) -> float:
    """The mean |w|^power of the branch's weights."""
    arrays = [ctx.weight(v) for v in block.weights if v.const_value is not None and v.const_value.size]
    return float(np.mean([(np.abs(w.astype(np.float32)) ** power).mean() for w in arrays])) if arrays else 0.0


def block_removal(
    model: onnx_ir.Model, placed: Sequence[Placed], budget: Budget, price: targets.Price, by: str
) -> Removal | ir.Skip:
    """The masks of branches, in a model that has no FakeMask left."""
    known = {block.value: block for block in _blocks.blocks_of(model)}
    if lost := [mask.value.name for mask in placed if mask.value not in known]:
        return ir.Skip(f"{lost[0]} is no residual branch any more; train it before other passes")
    blocks = [known[mask.value] for mask in placed]
    thetas = {str(mask.theta.name): np.array([k]) for k, mask in enumerate(placed)}
    masks = Masks(thetas, _blocks.block_cost(model, blocks, budget, price), len(blocks), least=False)

    def remove(gone: np.ndarray, ctx: Context) -> None:
        for block, goes in zip(blocks, gone.tolist(), strict=True):
            if goes:
                ctx.note(block.name, f"branch of {len(block.nodes)} nodes removed")
        _blocks.remove(model, [b for b, goes in zip(blocks, gone.tolist(), strict=True) if goes], by=by)

    return Removal(masks, remove)


# ---- weights: single elements


def mask_weights(
    model: onnx_ir.Model, sites: Sequence[ir.WeightSite], settings: Sequence[onnx_ir.Value], ctx: Context, by: str
) -> None:
    """A theta for each weight."""
    for site in sites:
        w = ctx.weight(site.value)
        theta = ctx.keep(ranks(np.abs(w)), f"{site.name}.theta")
        axis = {"axis": 0, "least": 0}
        node = ir.node("FakeMask", [site.tensor, theta, *settings], axis)
        ir.replace_weight(site, node, by=(by, "weight mask"))


def weight_removal(
    model: onnx_ir.Model, nodes: Sequence[onnx_ir.Node], budget: Budget, price: targets.Price, by: str
) -> Removal | ir.Skip:
    """The masks of weights, which still stand in the model: the elements of each are units."""
    if budget == "time":
        return ir.Skip("budget=time: single zeros take as long as other weights; ask for params, macs or count")
    thetas: dict[str, np.ndarray] = {}
    held: list[tuple[onnx_ir.Value, np.ndarray]] = []
    count = 0
    for node in nodes:
        theta, masked = node.inputs[1], node.outputs[0]
        assert theta is not None and theta.shape is not None
        units = np.arange(count, count + int(np.prod([int(d) for d in theta.shape if isinstance(d, int)])))
        count += len(units)
        thetas[str(theta.name)] = units
        held.append((masked, units))
    masks = Masks(thetas, weight_cost(held, budget, price), count, least=False)
    own = list(zip(nodes, thetas.values(), strict=True))

    def remove(gone: np.ndarray, ctx: Context) -> None:
        for node, units in own:
            store_form(model, node, ~gone[units], ctx, by=by)

    return Removal(masks, remove)


def weight_cost(held: Iterable[tuple[onnx_ir.Value, np.ndarray]], budget: Budget, price: targets.Price) -> Cost:
    """The cost of single weights: their count, or the multiply-adds of all that a weight takes part in.

    Args:
        held: weights, each with the units of its elements.
        budget: count, params or macs.
        price: of the target.
    """
    prices = []
    for weight, units in held:
        users = dict.fromkeys(weight.consumers())
        work = sum((work_of(user, "macs", price) for user in users), 0.0) if budget == "macs" else float(len(units))
        prices.append((work / max(len(units), 1), units))
    return linear(prices)


def trained_beside(thetas: Iterable[str], touched: Iterable[onnx_ir.Node]) -> list[str]:
    """Thetas, and the floating-point constants of nodes: weights, biases, scales of BatchNormalizations."""
    found = dict.fromkeys(thetas)
    for node in touched:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or all(d == 1 for d in dims_of(value)):
                continue
            if index in _LEARNED.get(node.op_type, ()):
                found[str(value.name)] = None
    return list(found)
