"""The training forms with levels: the identities of their forward and backward maps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from mc_opt import ir

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

X = np.linspace(-3, 3, 241, dtype=np.float32)
BETA = 5.0


def mapped(
    op_type: str, x: np.ndarray, settings: tuple[float, ...], attributes: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """F(x) and what reaches x of a gradient of ones."""
    numbers = [np.array(value, np.float32) for value in settings]
    node = ir.node(op_type, [x, *numbers], attributes, output="y")
    given = torch.tensor(x, requires_grad=True)
    y = ir.find_op(op_type).torch(node)(given, *map(torch.tensor, numbers))
    y.backward(torch.ones_like(y))
    return y.detach().numpy(), given.grad.numpy()


def swish_sign(x: np.ndarray, beta: float) -> np.ndarray:
    z = beta * x.astype(float)
    sigmoid = 1 / (1 + np.exp(-z))
    return 2 * sigmoid * (1 + z * (1 - sigmoid)) - 1


def swish_slope(x: np.ndarray, beta: float) -> np.ndarray:
    z = beta * x.astype(float)
    return beta * (2 - z * np.tanh(z / 2)) / (1 + np.cosh(z))


@pytest.mark.parametrize("levels", [2, 3])
def test_prox_goes_from_the_identity_to_the_nearest_level(levels: int) -> None:
    soft, slope = mapped("FakeProx", X, (0.0,), {"levels": levels})
    np.testing.assert_allclose(soft, X, atol=3e-7)  # sums of numbers up to 3
    assert (slope == 1).all()
    hard, slope = mapped("FakeProx", X, (1.0,), {"levels": levels})
    assert set(hard.tolist()) == set(np.linspace(-1, 1, levels).tolist()), "the levels to the bit"
    assert (slope == 1).all(), "BinaryConnect: straight through"
    away = np.abs(X[:, None] - np.linspace(-1, 1, levels))
    np.testing.assert_allclose(np.abs(hard - X), away.min(axis=1), atol=3e-7)


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.9])
def test_prox_is_monotone_and_continuous(levels: int, kappa: float) -> None:
    y, _ = mapped("FakeProx", X, (kappa,), {"levels": levels})
    steps = np.diff(y)
    assert steps.min() >= -3e-7
    assert steps.max() <= (X[1] - X[0]) / (1 - kappa) + 1e-6


def test_prox_stays_on_a_level_as_far_as_kappa_says() -> None:
    y, _ = mapped("FakeProx", np.array([-0.8, -0.5, 0.19, 0.21, 0.79, 0.81], np.float32), (0.4,), {"levels": 3})
    np.testing.assert_allclose(y, [-1, -0.5, 0, 1 / 60, 1 - 1 / 60, 1], atol=1e-6)


def test_zero_is_plus_one() -> None:
    zeros = np.array([0.0, -0.0], np.float32)
    assert mapped("FakeProx", zeros, (1.0,), {})[0].tolist() == [1, 1]
    assert mapped("FakeSwishSign", zeros, (BETA, 1.0), {})[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("transform", "slope"),
    [(0, lambda x: np.ones_like(x)), (1, lambda x: np.abs(x) <= 1), (2, lambda x: np.maximum(1 - np.abs(x) / 2, 0))],
)
@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_the_gradient_of_a_pair_is_that_of_its_transform(transform: int, slope: object, kappa: float) -> None:
    x = X[np.abs(np.abs(X) - 2) > 1e-6]  # at ±2 the corner of the transform has no one slope
    _, found = mapped("FakeProx", x, (kappa,), {"transform": transform})
    np.testing.assert_allclose(found, slope(x), atol=1e-6)  # type: ignore[operator]


@pytest.mark.parametrize("hard", [0.0, 1.0])
@pytest.mark.parametrize("levels", [2, 3])
def test_the_gradient_of_swish_sign_is_the_derivative_of_the_soft_map(hard: float, levels: int) -> None:
    y, slope = mapped("FakeSwishSign", X, (BETA, hard), {"levels": levels})
    middle = (0.0,) if levels == 2 else (-0.5, 0.5)
    h = 1 / (levels - 1)
    np.testing.assert_allclose(slope, sum(h * swish_slope(X - m, BETA / h) for m in middle), atol=2e-5)
    if hard:
        assert set(y.tolist()) == set(np.linspace(-1, 1, levels).tolist())
        return
    np.testing.assert_allclose(y, sum(h * swish_sign(X - m, BETA / h) for m in middle), atol=2e-6)
    step = 1e-4
    ahead, behind = (sum(h * swish_sign(X.astype(float) + d - m, BETA / h) for m in middle) for d in (step, -step))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), atol=1e-4)  # finite differences


def test_swish_sign_is_the_derivative_of_foothill() -> None:
    def foothill(x: np.ndarray) -> np.ndarray:
        return x * np.tanh(BETA * x / 2)

    y, slope = mapped("FakeSwishSign", X, (BETA, 0.0), {})
    x, step = X.astype(float), 1e-5
    np.testing.assert_allclose(y, (foothill(x + step) - foothill(x - step)) / (2 * step), atol=2e-6)
    assert slope[X == 0] == pytest.approx(BETA)
    assert y.max() == pytest.approx(1.1997, abs=1e-3), "it overshoots at βx = 2.399"
    assert (slope[BETA * np.abs(X) > 2.4] < 0).all()


def test_gradients_stay_finite_far_away() -> None:
    far = np.array([-1e4, -3e2, 3e2, 1e4], np.float32)
    for hard in (0.0, 1.0):
        y, slope = mapped("FakeSwishSign", far, (BETA, hard), {})
        assert y.tolist() == [-1, -1, 1, 1]
        assert (slope == 0).all()
    for transform in range(3):
        assert np.isfinite(mapped("FakeProx", far, (0.9,), {"transform": transform})).all()


@pytest.mark.parametrize("op_type", ["FakeProx", "FakeSwishSign"])
def test_scale_and_unit_multiply_forward_and_backward(op_type: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    scale, unit = (rng.uniform(1, 2, (5, 1)).astype(np.float32) for _ in range(2))
    numbers = [np.array(0.5, np.float32)] * len(ir.find_op(op_type).settings)
    bare, bare_slope = mapped(op_type, x, tuple(map(float, numbers)), {})
    node = ir.node(op_type, [x, *numbers, scale, unit], {"axes": (1,)}, output="y")
    given, s = torch.tensor(x, requires_grad=True), torch.tensor(scale, requires_grad=True)
    y = ir.find_op(op_type).torch(node)(given, *map(torch.tensor, numbers), s, torch.tensor(unit))
    g = rng.standard_normal((3, 5)).astype(np.float32)
    y.backward(torch.tensor(g))
    np.testing.assert_allclose(y.detach(), bare * (scale * unit).T, rtol=1e-6)
    np.testing.assert_allclose(given.grad, g * bare_slope * (scale * unit).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(s.grad[:, 0], (g * bare).sum(0) * unit[:, 0], rtol=1e-5, atol=1e-6)
    learned = [ir.find_op(op_type).learns(node, index) for index in range(len(node.inputs))]
    assert learned == [True, *[False] * len(numbers), True, False]


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ((None, None), {"levels": 4}, "levels is 4, expected 2 or 3"),
        ((None, None), {"transform": 3}, r"transform is 3, expected one of 0 \(identity\)"),
        ((np.ones((2, 1), np.float32), None), {}, r"scale is FLOAT\[2, 1\], expected FLOAT\[3, 1\]"),
        ((None, np.ones((3, 1), np.float32)), {}, "has a unit and no scale"),
    ],
)
def test_refusals(inputs: tuple[np.ndarray | None, ...], attributes: Mapping[str, int], message: str) -> None:
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ir.IRError, match=message):
        ir.node("FakeProx", [x, np.array(1, np.float32), *inputs], attributes, output="y")
    with pytest.raises(ir.IRError, match=r"sharpness is \[1\], expected one number"):
        ir.node("FakeProx", [x, np.ones(1, np.float32)], output="y")
