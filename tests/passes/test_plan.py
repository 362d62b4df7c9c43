"""The plan of a layer: forms and their counts, the ranks that singular values give, and the limits."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_opt import ir, targets
from mc_opt.passes import _plan, _plan_ranks
from mc_opt.passes._factor import Structure, relative_error
from mc_opt.passes._factor_chain import tucker
from mc_opt.passes._factor_fit import fit
from mc_opt.passes._factor_svd import expand, nested
from mc_opt.passes._plan_form import STRUCTURES, Form, forms, with_ranks
from mc_opt.passes._plan_ranks import Goal, Spectra, room, search
from mc_opt.passes._plan_time import Place, most_multiplications, stage_loads

SHAPES = [(6, 4), (4, 6, 3), (4, 6, 2, 3), (4, 2, 3, 1, 2)]
PRICE = targets.find_target("x86").price


def place(positions: int = 400, group: int = 1) -> Place:
    return Place(positions, positions, group, 4, PRICE)


def weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random, with singular values that fall."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, math.prod(shape[1:]) + 1) ** -0.5
    return (rng.standard_normal((shape[0], len(scale))) * scale).reshape(shape).astype(np.float32)


def plan(w: np.ndarray, positions: int = 400, **asked: object) -> _plan.Chosen | ir.Skip:
    wanted = dataclasses.replace(_plan.Asked(structures=STRUCTURES, effort=0.1), **asked)  # type: ignore[arg-type]
    return _plan.choose(_plan.Layer(w, place(positions)), wanted, seed=0)


# ---- forms


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_makes_the_weight_and_every_rank_has_two_carriers(
    shape: tuple[int, ...], structure: Structure
) -> None:
    listed = list(forms(shape, structure))
    assert listed and len(set(listed)) == len(listed)
    for form in listed:
        assert form.dense == shape
        assert all(len(who) >= 2 for who in form.carriers)
        assert all(math.prod(block) > 1 for block in form.blocks) or form.structure == "tucker"


@given(
    shape=st.sampled_from(SHAPES),
    structure=st.sampled_from(STRUCTURES),
    index=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=100)
def test_numbers_and_multiplications_are_those_of_the_chain(
    shape: tuple[int, ...], structure: Structure, index: int, data: st.DataObject
) -> None:
    listed = list(forms(shape, structure))
    form = listed[index % len(listed)]
    ranks = tuple(data.draw(st.integers(2, 5)) for _ in form.carriers)
    shapes = form.shapes(ranks)
    assert form.parameters(ranks) == sum(math.prod(s) for s in shapes)
    at = Place(100, 250, 1, 4, PRICE)
    counted = ir.factored_work(shapes, len(ranks), outputs=100, inputs=250).mul
    assert form.multiplications(ranks, stage_loads(at, form)) == pytest.approx(counted, rel=1e-9)


def test_factor_one_spans_the_groups_and_the_rows_of_a_table() -> None:
    assert all(form.blocks[0][0] % 3 == 0 for form in forms((6, 4, 3), "gkpd", group=3))
    tables = [form.blocks for form in forms((50, 6), "gkpd", table=True)]
    assert tables == [((50, 1), (1, 6)), ((50, 2), (1, 3)), ((50, 3), (1, 2))]
    assert list(forms((50, 6), "tt", table=True)) == [Form("tt", ((50, 1), (1, 6)), ((0, 1),))]


def test_two_ranks_of_a_tucker_form_are_those_of_the_channels() -> None:
    listed = list(forms((8, 6, 3, 3), "tucker"))
    (channels,) = with_ranks(listed, (2, 2))
    assert channels.blocks == ((8, 1, 1, 1), (1, 1, 3, 3), (1, 6, 1, 1))
    assert len(with_ranks(listed, (2, 2, 2, 2))) == 1


def test_splitting_an_axis_is_told_from_sharing_it_out() -> None:
    assert Form("gkpd", ((4, 2, 3), (1, 3, 1)), ((0, 1),)).splits_an_axis
    assert not Form("gkpd", ((4, 1, 3), (1, 6, 1)), ((0, 1),)).splits_an_axis


# ---- ranks


@given(
    shape=st.sampled_from(SHAPES),
    structure=st.sampled_from(["gkpd", "tucker", "tt", "sekron"]),
    index=st.integers(0, 10**6),
    share=st.floats(0.1, 0.9),
    by_error=st.booleans(),
)
@settings(max_examples=80)
def test_the_search_finds_what_trying_every_rank_finds(
    shape: tuple[int, ...], structure: Structure, index: int, share: float, *, by_error: bool
) -> None:
    listed = list(forms(shape, structure))
    form, w = listed[index % len(listed)], weight(shape, index)
    spectra = Spectra(w, 10.0)
    goal = Goal(w.size) if by_error else Goal(int(share * w.size))
    goal = dataclasses.replace(goal, error=share) if by_error else goal
    tried = []
    for ranks in itertools.product(*(range(1, most + 1) for most in form.largest())):
        lost = float(_plan_ranks._lost(form, spectra, [np.arange(1, rank + 1) for rank in ranks]).flat[-1])
        if form.parameters(ranks) <= goal.parameters and (not by_error or lost <= share**2 * spectra.power):
            tried.append((form.parameters(ranks) if by_error else lost, ranks))
    found = search(form, spectra, goal)
    if not tried:
        assert found is None
        return
    assert found is not None
    value = form.parameters(found[0]) if by_error else found[1]
    assert value == pytest.approx(min(tried)[0], abs=1e-9 * spectra.power)


def test_a_coarse_grid_is_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight((24, 20, 3, 3))
    form = Form("tucker", ((24, 1, 1, 1), (1, 1, 3, 3), (1, 20, 1, 1)), ((0, 1), (1, 2)))
    exact = search(form, Spectra(w, 10.0), Goal(w.size // 3))
    monkeypatch.setattr(_plan_ranks, "_GRID", 64)
    coarse = search(form, Spectra(w, 10.0), Goal(w.size // 3))
    assert exact is not None and coarse is not None
    assert exact[1] <= coarse[1] <= exact[1] * 1.1


@pytest.mark.parametrize("ranks", [(2, 3), (4, 6), (1, 1)])
def test_what_a_tucker_form_loses_is_known_before(ranks: tuple[int, int]) -> None:
    w = weight((4, 6, 2, 3))
    form = with_ranks(list(forms(w.shape, "tucker")), ranks)[0]
    spectra = Spectra(w, 10.0)
    lost = float(_plan_ranks._lost(form, spectra, [np.array([rank]) for rank in ranks]).flat[0])
    core, _ = tucker(w.astype(np.float64), [ranks[0], ranks[1], None, None])
    kept = fit(w, form, ranks, rng=np.random.default_rng(0))
    assert relative_error(w, kept) <= math.sqrt(lost / spectra.power) + 1e-7
    assert core.shape == (*ranks, 2, 3)


@pytest.mark.parametrize("ranks", [(2, 1), (3, 2)])
def test_what_a_nested_form_loses_is_known_before(ranks: tuple[int, int]) -> None:
    w = weight((4, 6, 3))
    form = next(f for f in forms(w.shape, "sekron") if len(f.blocks) == 3)
    spectra = Spectra(w, 10.0)
    lost = _plan_ranks._lost(form, spectra, [np.arange(1, rank + 1) for rank in ranks])[-1, -1]
    tensor = _plan_ranks.block(w, form.blocks)
    assert np.square(tensor - expand(nested(tensor, ranks))).sum() == pytest.approx(lost, rel=1e-6)


def test_singular_values_are_computed_once() -> None:
    spectra = Spectra(weight((8, 6, 3)), 10.0)
    spectra.lost((8, 1, 1))
    left = spectra.effort
    assert left < 10.0 and spectra.cost((8, 1, 1)) == 0
    spectra.lost((8, 1, 1))
    assert spectra.effort == left


def test_room_is_what_the_multiplications_leave_of_the_size() -> None:
    form = Form("gkpd", ((64, 1), (1, 64)), ((0, 1),))
    loads = stage_loads(place(1), form)
    assert room(form, Goal(2048, multiplications=math.inf, loads=loads)) == 1
    assert room(form, Goal(2048, multiplications=1024, loads=loads)) == pytest.approx(0.5, abs=0.1)
    assert most_multiplications(place(), form, 0.0) == 0


# ---- choices


def test_nothing_is_slower_than_the_dense_layer() -> None:
    for positions in (1, 20, 1000):
        chosen = plan(weight((96, 64)), positions)
        if isinstance(chosen, _plan.Chosen):
            assert chosen.candidate.nanoseconds <= chosen.dense_nanoseconds
    tiny = plan(weight((6, 4)), 1)
    assert isinstance(tiny, ir.Skip) and "would be slower" in tiny.reason


@pytest.mark.parametrize("ratio", [0.5, 0.2])
@pytest.mark.parametrize("shape", [(16, 12, 3, 3), (48, 64)])
def test_more_structures_lose_no_more_and_the_size_is_kept(shape: tuple[int, ...], ratio: float) -> None:
    w = weight(shape)
    best = plan(w, ratio=ratio, limit_time=False)
    assert isinstance(best, _plan.Chosen) and best.candidate.error is not None
    assert best.factors.parameters <= ratio * w.size
    assert best.candidate.error == relative_error(w, best.factors)
    for structure in STRUCTURES:
        own = plan(w, ratio=ratio, limit_time=False, structures=(structure,))
        if isinstance(own, _plan.Chosen) and own.candidate.error is not None:
            assert own.factors.structure == structure
            # A form that predictions put far behind is not fitted; no more than that may be lost.
            assert best.candidate.error <= own.candidate.error * 1.02


def test_less_room_loses_more() -> None:
    errors = []
    for ratio in (0.1, 0.2, 0.4, 0.8):
        chosen = plan(weight((48, 64)), ratio=ratio, limit_time=False)
        assert isinstance(chosen, _plan.Chosen)
        errors.append(chosen.candidate.error)
    assert errors == sorted(errors, reverse=True)


def test_an_error_is_met_in_every_structure() -> None:
    rng = np.random.default_rng(0)
    w = np.einsum("rf,rc,rk->fck", *(rng.standard_normal((4, size)) for size in (24, 20, 9))).astype(np.float32)
    for structure in STRUCTURES:
        chosen = plan(w.reshape(24, 20, 3, 3), error=0.05, limit_time=False, structures=(structure,))
        assert isinstance(chosen, _plan.Chosen), structure
        assert chosen.candidate.error is not None and chosen.candidate.error <= 0.05
        assert chosen.factors.parameters < w.size / 2


def test_forms_that_split_an_axis_can_be_asked_for_alone() -> None:
    chosen = plan(weight((32, 24, 3, 3)), split_only=True, limit_time=False)
    assert isinstance(chosen, _plan.Chosen) and chosen.candidate.form.splits_an_axis


def test_the_same_seed_gives_the_same_factors() -> None:
    first, second = (plan(weight((32, 24, 3, 3)), structures=("cp",), limit_time=False) for _ in range(2))
    assert isinstance(first, _plan.Chosen) and isinstance(second, _plan.Chosen)
    for a, b in zip(first.factors.arrays, second.factors.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
