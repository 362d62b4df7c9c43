"""The factors of a weight: errors, full ranks, certificates, and what holds for every structure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_opt import ir
from mc_opt.passes import _factor_chain, _factor_svd
from mc_opt.passes._factor import Structure, block, relative_error
from mc_opt.passes._factor_fit import fit
from mc_opt.passes._plan_form import Form, forms

SHAPES = [(6, 4), (4, 6, 3), (4, 6, 2, 3), (4, 2, 3, 1, 2)]


def weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def error(w: np.ndarray, form: Form, ranks: tuple[int, ...]) -> float:
    factors = fit(w, form, ranks, rng=np.random.default_rng(0))
    found = relative_error(w, factors)
    dense = ir.kron_weight(factors.arrays, factors.ranks)
    assert found == pytest.approx(np.linalg.norm(w - dense) / np.linalg.norm(w), abs=1e-12)
    assert all(shape == want for shape, want in zip(factors.shapes, form.shapes(ranks), strict=True))
    assert factors.parameters == form.parameters(ranks)
    return found


def one_of(shape: tuple[int, ...], structure: Structure, index: int) -> Form:
    listed = list(forms(shape, structure))
    return listed[index % len(listed)]


@given(
    shape=st.sampled_from(SHAPES),
    structure=st.sampled_from(["gkpd", "tucker", "tt", "sekron"]),
    index=st.integers(0, 10**6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_the_error_is_zero_at_full_rank(shape: tuple[int, ...], structure: Structure, index: int, seed: int) -> None:
    form = one_of(shape, structure, index)
    # Gram matrices hold squares: what float64 keeps of them is 1e-8 of the largest singular value.
    assert error(weight(shape, seed), form, form.largest()) < 1e-7


@given(
    shape=st.sampled_from(SHAPES),
    structure=st.sampled_from(["gkpd", "tucker", "tt", "sekron"]),
    index=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=60)
def test_the_error_does_not_rise_with_any_rank(
    shape: tuple[int, ...], structure: Structure, index: int, data: st.DataObject
) -> None:
    form, w = one_of(shape, structure, index), weight(shape, index)
    largest = form.largest()
    axis = data.draw(st.integers(0, len(largest) - 1))
    ranks = [data.draw(st.integers(1, most)) for most in largest]
    # The other ranks must let the one grow, or the shapes are lowered: a chain's rank is at most its neighbour's
    # times the size between them.
    ranks = [most if j != axis else rank for j, (rank, most) in enumerate(zip(ranks, largest, strict=True))]
    errors = []
    for rank in range(1, largest[axis] + 1):
        ranks[axis] = rank
        factors = fit(w, form, ranks, rng=np.random.default_rng(0))
        errors.append(relative_error(w, factors))
    assert all(later <= before + 1e-7 for before, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("first", [(2, 2, 1), (4, 1, 3), (1, 6, 1), (4, 3, 1)])
def test_gkpd_loses_the_singular_values_that_it_drops(first: tuple[int, ...]) -> None:
    w = weight((4, 6, 3))
    second = tuple(size // part for size, part in zip(w.shape, first, strict=True))
    values = np.linalg.svd(block(w, (first, second)), compute_uv=False)
    np.testing.assert_allclose(_factor_svd.spectrum(block(w, (first, second))), values**2, atol=1e-12)
    for rank in range(1, len(values) + 1):
        expected = math.sqrt(float(np.square(values[rank:]).sum())) / np.linalg.norm(w)
        assert error(w, Form("gkpd", (first, second), ((0, 1),)), (rank,)) == pytest.approx(expected, abs=1e-7)


def test_the_singular_values_are_shared_evenly() -> None:
    w = weight((8, 6, 3, 3))
    for form in (Form("gkpd", ((8, 2, 3, 1), (1, 3, 1, 3)), ((0, 1),)), one_of(w.shape, "cp", 0)):
        factors = fit(w, form, (4,), rng=np.random.default_rng(0))
        norms = np.array([np.linalg.norm(a.reshape(4, -1), axis=1) for a in factors.arrays])
        np.testing.assert_allclose(norms, np.broadcast_to(norms[:1], norms.shape), rtol=1e-9)


def test_a_worked_example_of_two_factors() -> None:
    a = np.array([[[[1], [2]]], [[[3], [4]]]], np.float64)
    b = np.array([[[[1, -1, 2]], [[0, 3, 1]]]], np.float64)
    w = ir.kron_weight([a[None], b[None]], 1)
    assert w.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(w[0, 0], [[1, -1, 2], [2, -2, 4]])
    np.testing.assert_array_equal(w[1, 1], [[0, 9, 3], [0, 12, 4]])
    values = np.sqrt(_factor_svd.spectrum(block(w, (a.shape, b.shape))))
    assert values[0] == pytest.approx(21.908902, abs=1e-6) and values[1:].max() < 1e-6
    assert error(w, Form("gkpd", (a.shape, b.shape), ((0, 1),)), (1,)) < 1e-7


def test_sweeps_only_lower_the_error() -> None:
    tensor = weight((12, 8, 9)) + 1

    def errors(fitted: Callable[[int], np.ndarray]) -> list[float]:
        return [float(np.linalg.norm(tensor - fitted(sweeps))) for sweeps in (0, 1, 4, 16)]

    def chain(sweeps: int) -> np.ndarray:
        first, middle, last = _factor_chain.train(tensor, (4, 3), sweeps=sweeps)
        return np.einsum("ai,abj,bk->ijk", first[:, 0], middle, last[0])

    def tucker(sweeps: int) -> np.ndarray:
        core, (first, _, last) = _factor_chain.tucker(tensor, (4, None, 3), sweeps=sweeps)
        return np.einsum("ajb,ia,kb->ijk", core, first, last)

    def nested(sweeps: int) -> np.ndarray:
        return _factor_svd.expand(_factor_svd.nested(tensor, (3, 2), sweeps=sweeps))

    for fitted in (chain, tucker, nested):
        found = errors(fitted)
        assert found == sorted(found, reverse=True) and found[-1] < found[0]


def test_a_planted_polyadic_form_is_found() -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal((5, size)) for size in (12, 10, 9))
    w = np.einsum("rf,rc,rk->fck", a, b, c)
    assert error(w, Form("cp", ((12, 1, 1), (1, 1, 9), (1, 10, 1)), ((0, 1, 2),)), (5,)) < 1e-3


def test_a_large_table_is_factorised_by_the_gram_matrix_of_its_small_side() -> None:
    w = weight((20000, 24))
    form = Form("gkpd", ((20000, 1), (1, 24)), ((0, 1),))
    values = np.linalg.svd(w, compute_uv=False)
    expected = math.sqrt(float(np.square(values[12:]).sum()) / float(np.square(values).sum()))
    assert error(w, form, (12,)) == pytest.approx(expected, rel=1e-9)


def test_the_randomised_range_finder_keeps_what_the_exact_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((80, 60)) @ np.diag(0.8 ** np.arange(60)) @ rng.standard_normal((60, 120))
    form = Form("gkpd", ((80, 1), (1, 120)), ((0, 1),))
    exact = error(w, form, (8,))
    monkeypatch.setattr(_factor_svd, "_EXACT", 10)
    assert error(w, form, (8,)) == pytest.approx(exact, rel=1e-3)


def test_pieces_do_not_change_the_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight((12, 8, 3))
    factors = fit(w, Form("gkpd", ((6, 2, 1), (2, 4, 3)), ((0, 1),)), (3,), rng=np.random.default_rng(0))
    whole = relative_error(w, factors)
    monkeypatch.setattr("mc_opt.passes._factor._PIECE", 100)
    assert relative_error(w, factors) == pytest.approx(whole, rel=1e-12)
