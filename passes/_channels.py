"""Groups of channels that can be removed: what each one removes, and why others must stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir

from mc_opt import ir
from mc_opt.passes._channels_axes import Place, walk_of

STAYS = -1
"""The unit of a position that always stays."""

Kind = Literal["filter", "node"]

_RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Group:
    """Channels (units) that occur in the same places, and of which some may go.

    Attributes:
        name: the layer of the first weight that makes them.
        layers: those of all weights that make them.
        kind: `node` for hidden units of a recurrent cell, `filter` for all others.
        units: their numbers, in the order of their positions.
        reason: why none of them can go; None where they can.
    """

    name: str
    layers: tuple[str, ...]
    kind: Kind
    units: tuple[int, ...]
    reason: ir.Skip | None = None


@dataclass(frozen=True)
class Channels:
    """The units of a model: every set of positions that can only go together is one.

    Attributes:
        count: of all units.
        groups: in the order of the weights that make them.
        units: by value, the unit of every position of each axis; None for an axis that stays whole.
        makers: axes of weights whose positions make units.
        sums: where nodes sum over units: with zeros there, a model computes what it does without these units.
    """

    count: int
    groups: tuple[Group, ...]
    units: Mapping[onnx_ir.Value, tuple[np.ndarray | None, ...]]
    makers: tuple[Place, ...]
    sums: tuple[Place, ...]

    def at(self, place: Place) -> np.ndarray | None:
        """The units along the axis of a place."""
        return self.units[place.value][place.axis]


def channels_of(model: onnx_ir.Model) -> Channels:
    """Find the units of the main graph.

    Two positions are one unit when ops tie them, directly or through others: a connected component. Units of the same
    axes form a group.
    """
    walk = walk_of(model)
    pairs = (pair for a, b in walk.ties for pair in zip(a.tolist(), b.tolist(), strict=True))
    components = ir.components(walk.count, pairs)
    source = np.concatenate([*walk.sources, np.zeros(0, np.int64)])
    unit_of = np.full(walk.count, STAYS)
    made: dict[int, list[Place]] = {}
    for place in walk.makers:
        axis = walk.of(place.value)[place.axis]
        for atom in () if isinstance(axis, ir.Skip) else np.unique(axis).tolist():
            made.setdefault(atom, []).append(place)
    found: dict[tuple[frozenset[int], str | None], list[tuple[int, ...]]] = {}
    for atoms in components:
        if any(atom in made for atom in atoms):
            reason = next((walk.fixed[atom] for atom in atoms if atom in walk.fixed), None)
            found.setdefault((frozenset(source[list(atoms)].tolist()), reason), []).append(atoms)
    order = {id(place): number for number, place in enumerate(walk.makers)}
    drafts = []
    for (_, reason), sets in found.items():
        makers = {id(p): p for atoms in sets[:1] for atom in atoms for p in made.get(atom, ())}
        drafts.append((sorted(makers.values(), key=lambda p: order[id(p)]), reason, sets))
    drafts.sort(key=lambda draft: (order[id(draft[0][0])], draft[2][0]))
    groups = []
    count = 0
    for places, reason, sets in drafts:
        units: list[int] = []
        for atoms in sets if reason is None else ():
            unit_of[list(atoms)] = count + len(units)
            units.append(count + len(units))
        count += len(units)
        groups.append(_group(places, tuple(units), reason))
    units_of = {value: tuple(_units(axis, unit_of) for axis in axes) for value, axes in walk.axes.items()}
    return Channels(count, tuple(groups), units_of, tuple(walk.makers), tuple(walk.sums))


def _group(makers: list[Place], units: tuple[int, ...], reason: str | None) -> Group:
    layers = tuple(dict.fromkeys(ir.layer_of(place.value) for place in makers))
    kind: Kind = "node" if any(place.node.op_type in _RECURRENT for place in makers) else "filter"
    if reason is None and len(units) == 1:
        reason = "it has one channel"
    return Group(layers[0], layers, kind, units, None if reason is None else ir.Skip(reason))


def _units(axis: np.ndarray | ir.Skip, unit_of: np.ndarray) -> np.ndarray | None:
    if isinstance(axis, ir.Skip):
        return None
    units: np.ndarray = unit_of[axis]
    return units if (units != STAYS).any() else None
