"""ternary: −1, 0 and 1 with the best scale a row, and what training does to them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mc_opt import ir
from mc_opt.passes import _binary
from mc_opt.passes._trainable import forms
from tests._harness import check, model, same_in_torch
from tests.passes.test_binary import LINEAR, NET, at, converted, inputs, prepared, trained

METHODS = ("bc", "pc", "bnnpp")


def error(w: np.ndarray, alpha: float) -> float:
    """‖w − α·t‖² with each t the nearest of −1, 0, 1."""
    return float(np.minimum(w**2, (np.abs(w) - alpha) ** 2).sum())


def test_the_scale_is_the_best_of_all() -> None:
    for seed in range(20):
        w = np.random.default_rng(seed).standard_normal((1, 7)).astype(np.float32)
        alpha = float(_binary.ternary_scale(w)[0, 0])
        best = min(
            float(((w - w[0, list(kept)].__abs__().mean() * t) ** 2).sum())
            for k in range(1, 8)
            for kept in itertools.combinations(range(7), k)
            for t in [np.sign(w) * np.isin(np.arange(7), kept)]
        )
        assert error(w, alpha) == pytest.approx(best, rel=1e-5)


def test_it_is_never_worse_than_the_threshold_of_ternary_weight_networks() -> None:
    w = np.random.default_rng(0).laplace(size=(30, 64)).astype(np.float32)
    ours = _binary.ternary_scale(w)
    for row, alpha in zip(w, ours[:, 0], strict=True):
        kept = np.abs(row) > 0.7 * np.abs(row).mean()
        theirs = np.abs(row[kept]).mean()
        assert error(row, alpha) <= ((row - theirs * np.sign(row) * kept) ** 2).sum() * (1 + 1e-6)


def test_without_training_a_weight_becomes_its_nearest_levels() -> None:
    source = model(LINEAR)
    result = check(
        "ternary{skip=}",
        LINEAR,
        """
        w = mc_opt.Lookup(w.codes, ternary.2bit, w.scale) {axes=[1], bits=2, shape=[16, 12]}
        y = MatMul(x, w)""",
    )
    w = source.graph.initializers["w"].const_value.numpy()
    held = {name: value.const_value.numpy() for name, value in result.graph.initializers.items()}
    assert held["ternary.2bit"].tolist() == [-1, 0, 1]
    codes = ir.unpack_codes(held["w.codes"], 2, w.size).reshape(12, 16).astype(int) - 1
    assert np.array_equal(codes, np.sign(w.T) * (np.abs(w.T) > held["w.scale"] / 2))
    assert (codes == 0).any()


@pytest.mark.torch
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_training_lowers_the_loss_and_is_what_is_stored(method: str) -> None:
    source = model(NET)
    goal = ir.Session(source).run(inputs())["y"]
    ready, step = prepared(f"ternary{{method={method}}}", source)
    assert len(list(forms(ready, "ternary"))) == 2
    untrained = converted(ready, step)
    end = ir.Session(at(ready, step, 1.0)).run(inputs())["y"]
    assert np.array_equal(end, ir.Session(untrained).run(inputs())["y"]), "the same numbers, to the bit"
    learned, losses = trained(ready, step, inputs(), goal, steps=200)
    stored = converted(learned, step)
    after = float(((ir.Session(stored).run(inputs())["y"] - goal) ** 2).mean())
    assert after < 0.5 * float(((end - goal) ** 2).mean())
    assert after == pytest.approx(losses[-1], rel=1e-4), "what was trained is what is stored"
    same_in_torch(stored)
