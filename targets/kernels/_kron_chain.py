"""The tensor between the stages of a chain of factors: the dimensions of its channels, and who sums over which."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax

from mc_opt import ir
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter, transposed


@dataclass(frozen=True)
class Place:
    """Where a stage stands: dimensions before its own, its groups, what it sums over, behind, and what it makes."""

    before: tuple[str, ...]
    groups: tuple[str, ...]
    summed: tuple[str, ...]
    behind: tuple[str, ...]
    made: tuple[str, ...]


class Running:
    """The tensor between stages, [*positions, Π order], and the extents of its channels' dimensions.

    It is held under whatever shape the last kernel gave it: a view of a view would be a copy.
    """

    def __init__(self, e: Emitter, x: relax.Expr, chain: ir.Chain, *, group: int = 1, reverse: bool = False) -> None:
        self.e, self.chain, self.reverse = e, chain, reverse
        self._held, self.positions = x, dims.sizes(x)[:-1]
        numbers = range(1, len(chain.shapes) + 1)
        self.extents = {"g": group}
        self.extents |= {f"c{k}": chain.inputs(k) for k in numbers} | {f"f{k}": chain.outputs(k) for k in numbers}
        self.extents |= {f"r{r}": chain.rank(r) for r in range(chain.ranks)}
        self.extents["f1"] //= group
        self.order = self.real(["g", *(f"c{k}" for k in numbers)])

    @property
    def dtype(self) -> str:
        """The type of its elements."""
        return str(self._held.ty.dtype)

    def real(self, names: Sequence[str]) -> tuple[str, ...]:
        """The dimensions that are longer than 1."""
        return tuple(name for name in names if self.extents[name] > 1)

    def size(self, names: Sequence[str]) -> int:
        """The product of extents."""
        return math.prod(self.extents[name] for name in names)

    def place(self, stage: ir.Stage) -> Place:
        """Where a stage stands in the present order."""
        k = stage.factor
        groups = [*(["g"] if k == 1 else []), *(f"r{r}" for r in stage.grouped)]
        summed = [f"c{k}", *(f"r{r}" for r in stage.summed)]
        own = [d for d in self.order if d in groups or d in summed]
        # Without channels of its own a stage puts what it makes behind the inputs that are still to be summed.
        first = self.order.index(own[0]) if own else sum(d[0] in "gc" for d in self.order)
        ranks, outputs = self.real([f"r{r}" for r in stage.made]), self.real([f"f{k}"])
        return Place(
            before=tuple(d for d in self.order[:first] if d not in own),
            groups=tuple(d for d in own if d in groups),
            summed=tuple(d for d in own if d in summed),
            behind=tuple(d for d in self.order[first:] if d not in own),
            # The stage after the next sums over the ranks and what stands there, side by side.
            made=outputs + ranks if self.reverse else ranks + outputs,
        )

    def arrange(self, order: Sequence[str]) -> None:
        """Move the dimensions into another order."""
        if tuple(order) == self.order:
            return
        count = len(self.positions)
        perm = [*range(count), *(count + self.order.index(d) for d in order)]
        x = self.view([*self.positions, *(self.extents[d] for d in self.order)])
        self.set(self.e.moved(functools.partial(transposed, perm=perm), x, name="transpose"), self.positions, order)

    def view(self, shape: Sequence[Dim]) -> relax.Expr:
        """The tensor under another shape."""
        return self.e.reshape(self._held, shape)

    def set(self, x: relax.Expr, positions: Sequence[Dim], order: Sequence[str]) -> None:
        """What a stage made."""
        self._held, self.positions, self.order = x, list(positions), tuple(order)

    def result(self) -> relax.Expr:
        """The tensor as [*positions, Π order]."""
        return self.view([*self.positions, self.size(self.order)])


@dataclass(frozen=True)
class Order:
    """A factor as a convolution's weight: its axes moved, then [groups · made, summed, *kernel]."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, factor: np.ndarray) -> np.ndarray:
        """The factor, or its codes, in this order."""
        return factor.transpose(self.axes).reshape(self.shape)

    def computed(self, e: Emitter, factor: relax.Expr) -> relax.Expr:
        """A factor that the model computes, in this order."""
        moved = e.moved(functools.partial(transposed, perm=self.axes), factor, name="transpose")
        return e.reshape(moved, self.shape)


def order_of(chain: ir.Chain, stage: ir.Stage, place: Place) -> Order:
    """How the factor of a stage is to be read."""
    shape = chain.shapes[stage.factor - 1]
    names = [*(f"r{r}" for r in range(chain.ranks)), f"f{stage.factor}", f"c{stage.factor}"]
    outer = [d for d in (*place.groups, *place.made) if d in names]
    if "g" in place.groups and f"f{stage.factor}" not in outer:  # as many outputs as groups
        outer.append(f"f{stage.factor}")
    inner = [d for d in place.summed if d in names]
    rest = [d for d in names if d not in outer and d not in inner]  # of extent 1
    axes = (*(names.index(d) for d in (*outer, *rest, *inner)), *range(len(names), len(shape)))
    rows, columns = (math.prod(shape[names.index(d)] for d in part) for part in (outer, inner))
    return Order(axes, (rows, columns, *shape[len(names) :]))
