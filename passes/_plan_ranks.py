"""The ranks of a form that lose least at a size, or are smallest within an error, read off singular values.

What a form loses at given ranks is known before it is factorised: exactly for gkpd, nested sekron and the truncated
Tucker form, up to a bound for a chain. Every search looks at a grid of rank tuples at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mc_opt.passes._factor import Shape, block
from mc_opt.passes._factor_chain import project, unfold
from mc_opt.passes._factor_svd import gkpd, spectrum, tails
from mc_opt.passes._plan_form import Form

_GRID = 1 << 18  # rank tuples that are looked at in one go
_SPECTRUM = 2.5e-11, 9e-11  # seconds of an operation of a Gram matrix and of an eigenproblem, for the effort


@dataclass(frozen=True)
class Goal:
    """What is asked of a layer's factors.

    Attributes:
        parameters: at most so many.
        multiplications: at most so many.
        loads: multiplications of each factor's stage at rank one; of the form that is searched.
        error: None, or the relative error to stay within at the least size.
        ranks: None, or the ranks themselves.
    """

    parameters: int
    multiplications: float = math.inf
    loads: tuple[float, ...] = ()
    error: float | None = None
    ranks: tuple[int, ...] | None = None


@dataclass
class Spectra:
    """What is known about one weight's singular values; computed once, whichever form asks.

    Attributes:
        weight: [F, C, K_1, ..].
        effort: seconds of work that may still be spent, by an estimate that knows no clock.
    """

    weight: np.ndarray
    effort: float
    _tails: dict[Shape, np.ndarray] = field(default_factory=dict)
    _tucker: np.ndarray | None = None

    def __post_init__(self) -> None:
        wide = self.weight.astype(np.float64)
        self.power = float(np.vdot(wide, wide))

    def cost(self, first: Shape) -> float:
        """Seconds of the singular values of one unfolding; 0 when they are known."""
        if first in self._tails:
            return 0.0
        one = int(np.prod(first))
        side = min(one, self.weight.size // one)
        return _SPECTRUM[0] * self.weight.size * side + _SPECTRUM[1] * side**3 + 3e-5

    def lost(self, first: Shape) -> np.ndarray:
        """What each rank of the unfolding (factor 1 of shape `first` against the rest) loses: [min side + 1]."""
        if first not in self._tails:
            self.effort -= self.cost(first)
            second = tuple(size // part for size, part in zip(self.weight.shape, first, strict=True))
            self._tails[first] = tails(spectrum(block(self.weight, (first, second))))
        return self._tails[first]

    def tucker_kept(self) -> np.ndarray:
        """The power of the higher-order SVD's core up to each corner: [F + 1, C + 1, K_1 + 1, ..]."""
        if self._tucker is None:
            wide = self.weight.astype(np.float64)
            self.effort -= sum(self.cost(_only(wide.shape, axis)) for axis in range(wide.ndim)) + 1e-9 * wide.size
            turns = [
                np.linalg.eigh(unfold(wide, axis) @ unfold(wide, axis).T)[1][:, ::-1] if size > 1 else None
                for axis, size in enumerate(wide.shape)
            ]
            kept = np.pad(np.square(project(wide, turns)), [(1, 0)] * wide.ndim)
            for axis in range(wide.ndim):
                kept = np.cumsum(kept, axis=axis)
            self._tucker = kept
        return self._tucker


def search(form: Form, spectra: Spectra, goal: Goal) -> tuple[tuple[int, ...], float] | None:
    """The ranks that lose least within the goal, and the squared error that they lose; None if none fit.

    Of cp only the form of two factors is searched, as it is a gkpd: see `cp_rank`.
    """
    largest = form.largest()
    if goal.ranks is not None:
        if len(goal.ranks) != len(largest):
            return None
        axes = [np.array([min(rank, most)]) for rank, most in zip(goal.ranks, largest, strict=True)]
    else:
        axes = _axes(form, largest, goal)
    if not all(axis.size for axis in axes):
        return None
    found = _best(form, spectra, goal, axes)
    if found is None or goal.ranks is not None:
        return found
    return _refined(form, spectra, goal, found, axes, largest)


def room(form: Form, goal: Goal) -> float:
    """How much of what the form can use of the goal's parameters is left within its multiplications: a share."""
    axes = [np.unique(np.geomspace(1, most, min(most, 24)).astype(int)) for most in form.largest()]
    grid = np.meshgrid(*axes, indexing="ij")
    parameters = form.parameters(grid)
    within = np.where(parameters <= goal.parameters, parameters, 0)
    used = np.where(_fits(form, goal, grid, parameters), within, 0)
    return float(used.max()) / max(1.0, float(within.max()))


def _fits(form: Form, goal: Goal, grid: Sequence[np.ndarray], parameters: np.ndarray) -> np.ndarray:
    fits: np.ndarray = parameters <= goal.parameters
    if goal.loads:
        fits &= form.multiplications(grid, goal.loads) <= goal.multiplications
    return fits


def cp_rank(form: Form, goal: Goal) -> int | None:
    """The rank of a cp form that fills the goal's size."""
    rank = goal.ranks[0] if goal.ranks is not None else goal.parameters // sum(form.sizes)
    rank = min(rank, *form.largest())
    if goal.ranks is None and math.isfinite(goal.multiplications):
        rank = min(rank, int(goal.multiplications // sum(goal.loads)))
    return rank if rank >= 1 and rank * sum(form.sizes) <= goal.parameters else None


def _axes(form: Form, largest: tuple[int, ...], goal: Goal) -> list[np.ndarray]:
    """Ranks to look at along each rank axis: all, or a geometric grid where all are too many."""
    count = max(4, int(_GRID ** (1 / len(largest))))
    axes = []
    for j, most in enumerate(largest):
        ones = [1] * len(largest)
        while most > 1 and form.parameters([*ones[:j], most, *ones[j + 1 :]]) > goal.parameters:
            most = min(most - 1, int(most * 0.98))
        fits = form.parameters([*ones[:j], most, *ones[j + 1 :]]) <= goal.parameters
        values = np.arange(1, most + 1) if most <= count else np.unique(np.geomspace(1, most, count).astype(int))
        axes.append(values if fits else values[:0])
    return axes


def _best(form: Form, spectra: Spectra, goal: Goal, axes: Sequence[np.ndarray]) -> tuple[tuple[int, ...], float] | None:
    grid = np.meshgrid(*axes, indexing="ij")
    parameters = form.parameters(grid)
    fits = _fits(form, goal, grid, parameters)
    if not fits.any():
        return None
    lost = _lost(form, spectra, axes)
    if goal.error is not None:
        fits &= lost <= goal.error**2 * spectra.power
    if not fits.any():
        return None
    ranked = parameters if goal.error is not None else lost
    place = np.unravel_index(np.argmin(np.where(fits, ranked, np.inf)), lost.shape)
    return tuple(int(axis[i]) for axis, i in zip(axes, place, strict=True)), float(lost[place])


def _refined(
    form: Form,
    spectra: Spectra,
    goal: Goal,
    found: tuple[tuple[int, ...], float],
    axes: Sequence[np.ndarray],
    largest: tuple[int, ...],
) -> tuple[tuple[int, ...], float]:
    """The best between the neighbours on the grid of what was found there."""
    if all(len(axis) == axis[-1] for axis in axes):
        return found
    fine = []
    for axis, rank, most in zip(axes, found[0], largest, strict=True):
        place = int(np.searchsorted(axis, rank))
        low, high = axis[max(0, place - 1)], axis[place + 1] if place + 1 < len(axis) else most
        fine.append(np.unique(np.linspace(low, high, max(4, int(_GRID ** (1 / len(axes))))).astype(int)))
    better = _best(form, spectra, goal, fine)
    return better if better is not None else found


def _lost(form: Form, spectra: Spectra, axes: Sequence[np.ndarray]) -> np.ndarray:
    """The squared error at every rank tuple of a grid: [len(axis) for each rank axis]."""
    match form.structure:
        case "gkpd" | "cp" if len(form.blocks) == 2:
            lost: np.ndarray = spectra.lost(form.blocks[0])[axes[0]]
            return lost
        case "tt":
            lost = np.zeros(())
            for j, axis in enumerate(axes):
                lost = lost[..., None] + spectra.lost(form.unfolding(j))[axis]
            return lost
        case "tucker":
            index: list[np.ndarray] = [np.array([size]) for size in form.dense]
            for j, ranks in enumerate(axes):
                index[form.axis(form.mode(j))] = ranks
            kept = spectra.tucker_kept()[np.ix_(*index)]
            # the grid in the order of the rank axes, which for the channels is not that of the weight's axes
            order = [form.axis(form.mode(j)) for j in range(len(axes))]
            kept = np.moveaxis(kept, order, range(len(order)))
            lost = np.maximum(spectra.power - kept.reshape([len(axis) for axis in axes]), 0)
            return lost
        case "sekron":
            return _nested_lost(form, spectra, axes)
        case _:
            raise AssertionError(f"{form.structure} is not read off singular values")


def _nested_lost(form: Form, spectra: Spectra, axes: Sequence[np.ndarray]) -> np.ndarray:
    """What two nested levels keep: the sum over the outer terms of what the inner SVD of each keeps."""
    tensor = block(spectra.weight, form.blocks)
    count = int(axes[0][-1])
    _, right = gkpd(tensor.reshape(len(tensor), -1), count)
    # gkpd shares the singular values: with both halves put back, a right vector is one child.
    norms = np.linalg.norm(right, axis=1)
    children = (right * norms[:, None]).reshape(len(right), *tensor.shape[1:])
    if children.shape[1] > children.shape[2]:
        children = children.transpose(0, 2, 1)
    values = np.maximum(np.linalg.eigvalsh(children @ children.transpose(0, 2, 1)), 0)[:, ::-1]
    kept = np.cumsum(np.cumsum(np.pad(values, [(1, 0), (1, 0)]), axis=0), axis=1)
    side = min(tensor.shape[0], tensor[0].size)
    spectra.effort -= _SPECTRUM[0] * tensor.size * side + _SPECTRUM[1] * (side**3 + count * values.shape[1] ** 3)
    lost: np.ndarray = np.maximum(spectra.power - kept[np.ix_(axes[0], axes[1])], 0)
    return lost


def _only(shape: Shape, axis: int) -> Shape:
    return tuple(size if a == axis else 1 for a, size in enumerate(shape))
