"""The regularisers of BNN+ and Foothill: where their wells are, and what they do to weights and scales."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests._harness import model
from tests.passes.test_binary import NET, prepared

torch = pytest.importorskip("torch")
from mc_opt.passes import _train_wells  # noqa: E402  (torch first)

pytestmark = pytest.mark.torch
KINDS = ("r1", "r2", "foothill")


@pytest.mark.parametrize("kind", KINDS)
def test_wells_are_at_plus_and_minus_the_scale_of_the_row(kind: str) -> None:
    scale = torch.tensor([[1.0], [2.0]])
    signs = torch.tensor([[1.0, 1, -1], [-1, 1, 1]])
    assert float(_train_wells.wells(signs * scale, scale, (0,), kind)) == 0
    assert float(_train_wells.wells((signs * scale).T.contiguous(), scale, (1,), kind)) == 0
    assert float(_train_wells.wells(signs * scale * 1.1, scale, (0,), kind)) > 0


def test_the_best_scale_is_the_mean_size() -> None:
    latent = torch.tensor(np.random.default_rng(0).standard_normal((3, 8)))
    scale = latent.abs().mean(1, keepdim=True).requires_grad_()
    _train_wells.wells(latent, scale, (0,), "r2").backward()
    assert float(scale.grad.abs().max()) < 1e-12


def test_the_gradients_of_r2_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    latent, scale = torch.tensor(rng.standard_normal((2, 5)), requires_grad=True), torch.ones(2, 1, requires_grad=True)
    (_train_wells.wells(latent, scale, (0,), "r2") * latent.numel()).backward()
    away = (1 - latent.abs()).detach()
    torch.testing.assert_close(latent.grad, -2 * away * latent.detach().sign())
    torch.testing.assert_close(scale.grad, 2 * away.sum(1, keepdim=True).float())


def test_foothill_lies_between_the_absolute_value_and_the_square() -> None:
    def foothill(x: float, alpha: float, beta: float) -> float:
        return alpha * x * math.tanh(beta * x / 2)

    assert foothill(0.7, 1.0, 1e4) == pytest.approx(0.7), "β → ∞: α·|x|"
    assert foothill(-0.7, 2 / 1e-4, 1e-4) == pytest.approx(0.49), "α = 2/β, β → 0: x²"
    one = torch.ones(1, 1)
    for x in (0.01, 0.3, 2.0):
        assert float(_train_wells.wells(one + x, one, (0,), "foothill")) == pytest.approx(foothill(x, 1, 5), rel=1e-4)


def test_only_regularised_methods_have_a_penalty_and_it_grows() -> None:
    for method in ("bc", "pc", "pcpp", "bnnpp"):
        ready, step = prepared(f"binary{{method={method}}}", model(NET))
        assert step.penalty(ready) is None
    ready, step = prepared("binary{method=bnnplus activations=true}", model(NET))
    penalty = step.penalty(ready)
    values = {n: torch.tensor(v.const_value.numpy()) for n, v in ready.graph.initializers.items() if v.const_value}
    assert penalty is not None
    assert [float(penalty(values, p)) > 0 for p in (0.0, 0.5)] == [False, True]
    assert float(penalty(values, 1.0)) == pytest.approx(2 * float(penalty(values, 0.5)))
    assert prepared("binary{method=bnnplus strength=0}", model(NET))[1].penalty(ready) is None
