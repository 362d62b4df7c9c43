"""Which factors a layer gets: every form at the asked size, the predicted time as a limit, the least error wins.

Forms are sifted before they are fitted. At a size the ranks and so the time of most forms follow from their shapes
alone, and those slower than the dense layer go; singular values, computed within an effort that knows no clock, give
the error of the rest; the best few are fitted and measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mc_opt import ir
from mc_opt.passes._factor import Factors, Structure, relative_error
from mc_opt.passes._factor_cp import sweep_cost
from mc_opt.passes._factor_fit import fit
from mc_opt.passes._plan_form import STRUCTURES, Form, forms, with_ranks
from mc_opt.passes._plan_ranks import Goal, Spectra, cp_rank, room, search
from mc_opt.passes._plan_time import Place, dense_time, factored_time, most_multiplications, stage_loads

EFFORT = 0.6  # seconds a layer for singular values, by estimate
_FIT_EFFORT = 2.0  # seconds for the fewest sweeps of a cp form that is looked at beside other structures
_NEAR = 1.05  # errors within this factor are the same: then the faster wins
# A fit may bring an error below its prediction by this factor: a bound, a truncation or, of gkpd, the error itself.
_REFINABLE: dict[Structure, float] = {"gkpd": 1.0, "tucker": 1.08, "tt": 1.2, "sekron": 1.2, "cp": 1.0}
_SHRINK = 4  # attempts to meet the time with smaller ranks
_ROOM = 0.6  # of the asked size must be usable within the time, or a form is not worth its singular values


@dataclass(frozen=True)
class Asked:
    """What a pass wants of one layer.

    Attributes:
        ratio: at most that share of the layer's parameters.
        error: in its place: the smallest that stays within that relative error; 0 for none.
        flops: in its place: at most that share of the multiplications; 0 for none.
        structures: those to choose from.
        ranks: the ranks themselves; empty to find them.
        limit_time: nothing that is predicted to be slower than the dense layer; and where multiplications are to be
            saved, nothing that does not save at least half as large a share of the time.
        split_only: forms that divide an axis between factors alone.
        effort: seconds for singular values and for each fit with many minima, by an estimate that knows no clock.
    """

    ratio: float = 0.5
    error: float = 0.0
    flops: float = 0.0
    structures: tuple[Structure, ...] = ()
    ranks: tuple[int, ...] = ()
    limit_time: bool = True
    split_only: bool = False
    effort: float = EFFORT

    @property
    def most_time(self) -> float:
        """The share of the dense layer's predicted time that factors may take."""
        return (1 + self.flops) / 2 if self.flops else 1.0


@dataclass(frozen=True)
class Layer:
    """A weight [F, C / group, K_1, ..] (linear: [F, C]), where it stands, and whether it is a table read by rows."""

    weight: np.ndarray
    place: Place
    table: bool = False


@dataclass(frozen=True)
class Candidate:
    """A form with ranks.

    Attributes:
        form: the form.
        ranks: one number for each of its rank indices.
        error: the relative error, predicted; None where only a fit tells.
        nanoseconds: predicted.
    """

    form: Form
    ranks: tuple[int, ...]
    error: float | None
    nanoseconds: float

    @property
    def parameters(self) -> int:
        """Elements of all factors."""
        return int(self.form.parameters(self.ranks))

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, block)) for block in self.form.blocks)
        return f"{self.form.structure} {shapes} of rank {','.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Chosen:
    """The factors of one layer, in the weight's type.

    Attributes:
        factors: the arrays.
        candidate: the form and ranks; its `error` is measured on the stored factors.
        dense_nanoseconds: predicted for the layer as it was.
    """

    factors: Factors
    candidate: Candidate
    dense_nanoseconds: float


def choose(layer: Layer, asked: Asked, *, seed: int) -> Chosen | ir.Skip:
    """The factors of a layer, or why it stays dense, with the numbers."""
    spectra = Spectra(layer.weight, asked.effort)
    if not spectra.power:
        return ir.Skip("all its weights are 0; there is nothing to approximate")
    dense = dense_time(layer.place, layer.weight.shape)
    limit = dense * asked.most_time if asked.limit_time and not layer.table else math.inf
    found = [c for c in _candidates(layer, asked, spectra, limit) if c is not None]
    if not found:
        return ir.Skip(_nothing(layer, asked, dense, limit))
    measured = [m for m in (_measured(layer, c, asked, seed) for c in _finalists(found, asked)) if _keeps(m[1], asked)]
    if not measured:
        return ir.Skip(f"error={asked.error:g}: no factors within it are smaller than the weight")
    best = _pick([candidate for _, candidate in measured], asked)
    return Chosen(next(factors for factors, candidate in measured if candidate is best), best, dense)


def _nothing(layer: Layer, asked: Asked, dense: float, limit: float) -> str:
    """Why no form is left: the size, or the time."""
    size, shape = layer.weight.size, " x ".join(map(str, layer.weight.shape))
    fastest = _fastest(layer, asked)
    if fastest is not None and fastest.nanoseconds > limit:
        took, was = fastest.nanoseconds / 1e3, dense / 1e3
        word = "save too little time" if asked.flops and took <= was else "be slower"
        return f"would {word}: {fastest} is predicted to take {took:.1f} us, dense {was:.1f} us"
    if asked.ranks:
        ranks = ",".join(map(str, asked.ranks))
        return f"ranks={ranks}: no factors of {shape} have them in {_most(layer, asked)} numbers"
    if asked.error:
        return (
            f"error={asked.error:g}: no factors of {shape} within it are both smaller than {size} numbers and no slower"
        )
    if asked.flops:
        return f"flops={asked.flops:g}: no factors of {shape} keep to it"
    return f"no factors of {shape} fit in {_most(layer, asked)} numbers, {asked.ratio:g} of its {size}"


def _most(layer: Layer, asked: Asked) -> int:
    """The most numbers that factors may have; always fewer than the weight's."""
    share = 1.0 if asked.error or asked.flops else asked.ratio
    return min(int(share * layer.weight.size), layer.weight.size - 1)


def _candidates(layer: Layer, asked: Asked, spectra: Spectra, limit: float) -> Iterator[Candidate | None]:
    """A candidate for every form that is worth looking at, the most promising first while there is effort left."""
    goal = Goal(_most(layer, asked), error=asked.error or None, ranks=asked.ranks or None)
    most = math.inf
    if asked.flops:
        most = asked.flops * ir.dense_work(layer.weight.shape, outputs=layer.place.outputs).mul
    for form in _by_promise(_listed(layer, asked), goal, spectra):
        own = dataclasses.replace(
            goal,
            multiplications=min(most, most_multiplications(layer.place, form, limit)),
            loads=stage_loads(layer.place, form),
        )
        if _is_sized(asked) and room(form, own) < _ROOM:
            continue
        if spectra.effort < 0 and not _is_known(form, spectra):
            continue
        yield _in_time(form, own, layer, asked, spectra, limit)


def _in_time(form: Form, goal: Goal, layer: Layer, asked: Asked, spectra: Spectra, limit: float) -> Candidate | None:
    """The candidate of a form within the time; vectors that are not full are known with the ranks alone."""
    found = _of_form(form, goal, layer, asked, spectra)
    for _ in range(_SHRINK):
        if found is None or found.nanoseconds <= limit:
            return found
        made = float(form.multiplications(found.ranks, goal.loads))
        goal = dataclasses.replace(goal, multiplications=made * max(0.5, 0.98 * limit / found.nanoseconds))
        if asked.ranks or (_is_sized(asked) and room(form, goal) < _ROOM):
            return None
        found = _of_form(form, goal, layer, asked, spectra)
    return None


def _is_sized(asked: Asked) -> bool:
    """Whether a number of parameters is asked for, not an error or a number of multiplications."""
    return not (asked.error or asked.flops or asked.ranks)


def _fastest(layer: Layer, asked: Asked) -> Candidate | None:
    """The fastest of the forms of two factors at the asked size, to say how far the layer is from gaining."""
    goal = Goal(_most(layer, asked))
    ranks = (
        (form, min(goal.parameters // sum(form.sizes), *form.largest()))
        for form in _listed(layer, asked)
        if len(form.carriers) == 1
    )
    found = (_candidate(form, (rank,), None, layer) for form, rank in ranks if rank >= 1)
    return min(found, key=lambda c: c.nanoseconds, default=None)


def _listed(layer: Layer, asked: Asked) -> list[Form]:
    """Every form of the structures; what is a gkpd in another structure's name is left to gkpd, where that is asked."""
    listed: list[Form] = []
    for structure in asked.structures:
        own = list(forms(layer.weight.shape, structure, group=layer.place.group, table=layer.table))
        if asked.ranks and structure == "tucker":
            own = with_ranks(own, asked.ranks)
        if structure != "gkpd" and "gkpd" in asked.structures:
            own = [form for form in own if len(form.blocks) > 2]
        known = {form.blocks for form in listed if len(form.blocks) == 3 and form.structure == "tucker"}
        if structure == "tt":  # a chain of three factors is a Tucker form of two axes
            own = [form for form in own if form.blocks not in known]
        listed += [form for form in own if form.splits_an_axis or not asked.split_only]
    return listed


def _is_known(form: Form, spectra: Spectra) -> bool:
    return form.structure == "gkpd" and not spectra.cost(form.blocks[0])


def _by_promise(listed: Sequence[Form], goal: Goal, spectra: Spectra) -> list[Form]:
    """Forms whose factors are whole axes first, cheap ones before; then by what such shapes keep of random weights."""

    def promise(form: Form) -> tuple[bool, int, float]:
        order = STRUCTURES.index(form.structure)
        if not form.splits_an_axis:
            return False, order, spectra.cost(form.blocks[0])
        small, large = sorted((form.sizes[0], math.prod(form.sizes[1:])))
        share = min(1.0, goal.parameters / (small + large) / small)
        return True, order, -min(1.0, share + 3.4 * math.sqrt(small / large) * share * (1 - share))

    return sorted(listed, key=promise)


def _candidate(form: Form, ranks: tuple[int, ...], error: float | None, layer: Layer) -> Candidate:
    return Candidate(form, ranks, error, factored_time(layer.place, form.shapes(ranks), len(ranks)))


def _of_form(form: Form, goal: Goal, layer: Layer, asked: Asked, spectra: Spectra) -> Candidate | None:
    if form.structure == "cp" and len(form.blocks) > 2:
        return _of_cp(form, goal, layer, asked)
    found = search(form, spectra, goal)
    return None if found is None else _candidate(form, found[0], math.sqrt(found[1] / spectra.power), layer)


def _of_cp(form: Form, goal: Goal, layer: Layer, asked: Asked) -> Candidate | None:
    """A cp form at the size, if its fit is affordable; its error is not known before."""
    rank = cp_rank(form, goal)
    if rank is None or (goal.error is not None and len(asked.structures) > 1):
        return None
    if len(asked.structures) > 1 and 8 * sweep_cost(form.sizes, rank) > _FIT_EFFORT:
        return None
    if goal.error is not None:
        return _smallest_cp(form, rank, goal.error, layer, asked)
    return _candidate(form, (rank,), None, layer)


def _smallest_cp(form: Form, most: int, error: float, layer: Layer, asked: Asked) -> Candidate | None:
    """The least rank whose fit stays within an error, by bisection: the fits' errors fall with the rank, nearly."""
    found, low, high = None, 1, most
    while low <= high:
        middle = (low + high) // 2
        trial = _measured(layer, _candidate(form, (middle,), None, layer), asked, seed=0)[1]
        if trial.error is not None and trial.error <= error:
            found, high = trial, middle - 1
        else:
            low = middle + 1
    return found


def _finalists(found: Sequence[Candidate], asked: Asked) -> list[Candidate]:
    """The few to fit: of each structure the best by prediction, and what only a fit can judge."""
    known = [c for c in found if c.error is not None]
    best = min((_value(c, asked) for c in known), default=0.0)
    finalists = []
    for structure in asked.structures:
        own = [c for c in known if c.form.structure == structure]
        if own and min(_value(c, asked) for c in own) <= best * _REFINABLE[structure]:
            finalists.append(_pick(own, asked))
    return finalists + [c for c in found if c.error is None]


def _value(candidate: Candidate, asked: Asked) -> float:
    """What is to be small: the size within an error, or the error."""
    assert candidate.error is not None
    return candidate.parameters if asked.error else candidate.error


def _pick(candidates: Sequence[Candidate], asked: Asked) -> Candidate:
    """The one with the least value; of nearly equals the fastest."""
    best = min(_value(c, asked) for c in candidates)
    factor = _NEAR if asked.limit_time else 1.0
    near = [c for c in candidates if _value(c, asked) <= best * factor]
    return min(near, key=lambda c: (c.nanoseconds, _value(c, asked)))


def _measured(layer: Layer, candidate: Candidate, asked: Asked, seed: int) -> tuple[Factors, Candidate]:
    factors = fit(layer.weight, candidate.form, candidate.ranks, rng=np.random.default_rng(seed), effort=asked.effort)
    factors = factors.astype(layer.weight.dtype)
    return factors, dataclasses.replace(candidate, error=relative_error(layer.weight, factors))


def _keeps(candidate: Candidate, asked: Asked) -> bool:
    return not asked.error or (candidate.error is not None and candidate.error <= asked.error)
