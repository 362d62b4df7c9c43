"""FakeShift and FakeSparseShift: every exponent is reached, values are exact, gradients are those of the formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mc_opt import ir
from mc_opt.ir.ops import fake_shift

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` with the gradient of x, straight through."""
    return x + (value - x).detach()


def latents(count: int, shape: tuple[int, ...] = (6, 400)) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.4, 1, (count, *shape)).astype(np.float32)
    drawn[:, 0, :8] = 0
    return [torch.tensor(array, requires_grad=True) for array in drawn]


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_recursion_reaches_every_exponent_and_zero_is_no_level(steps: int) -> None:
    levels, _ = fake_shift.tables(steps)
    assert set(levels) == {s * 2.0**k for k in range(steps + 1) for s in (-1, 1)}
    for pattern in itertools.product((0, 1), repeat=steps):
        total = 0
        for bit in pattern:
            total = (total + 1) * bit
        code = sum(bit << j for j, bit in enumerate(pattern, 1))
        assert (levels[code], levels[code + 1]) == (-(2.0**total), 2.0**total)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_values_are_those_of_the_forward_and_gradients_those_of_the_backward_formula(steps: int) -> None:
    sign, *chain = latents(1 + steps)
    scale, gain = torch.full((6, 1), 0.3), torch.linspace(0.5, 2, 6)[:, None].requires_grad_()
    parts = [sign, scale, gain, *chain]
    node = ir.node("FakeShift", [p.detach().numpy() for p in parts], output="w")
    y = ir.find_op("FakeShift").torch(node)(*parts)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((y * g).sum(), [sign, gain, *chain])

    signs = through(sign, torch.where(sign >= 0, 1.0, -1.0))
    total = torch.zeros_like(sign)
    for step in chain:
        total = (total + 1) * through(step, (step > 0).float())
    forward = signs.detach() * torch.exp2(total.detach())
    np.testing.assert_array_equal(y.detach(), forward * (scale * gain).detach())
    backward = signs * torch.sqrt(total + 1)
    # The latents learn from √(S + 1), the gain from the true value.
    mixed = (backward + (forward - backward).detach()) * (scale * gain)
    want = torch.autograd.grad((mixed * g).sum(), [sign, gain, *chain])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # products in another order; sums of 400


def test_half_latents_give_half_weights() -> None:
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((5, 4, 8)).astype(np.float16)
    node = ir.node("FakeShift", [arrays[0], np.ones((4, 1), np.float16), np.ones((4, 1), np.float16), *arrays[1:4]])
    y = ir.find_op("FakeShift").torch(node)(*(torch.from_numpy(v.const_value.numpy()) for v in node.inputs))
    assert y.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: np.ones((3, 1), np.float32)}, "scale is"),
        ({2: np.ones((1, 1), np.float32)}, r"gain is \[1, 1\], expected \[4, 1\] as scale"),
        ({3: np.ones((4, 7), np.float32)}, r"step1 is \[4, 7\], expected \[4, 8\] as sign"),
        ({3: np.ones((4, 8), np.float64)}, "step1 is DOUBLE, expected FLOAT as sign"),
        ({k: np.ones((4, 8), np.float32) for k in range(3, 11)}, "has 8 steps, expected at most 7"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[int, np.ndarray], message: str) -> None:
    ones = np.ones((4, 8), np.float32)
    inputs = dict(enumerate([ones, ones[:, :1], ones[:, :1], ones])) | change
    with pytest.raises(ir.IRError, match=message):
        ir.node("FakeShift", list(inputs.values()), output="w")


@pytest.mark.parametrize("steps", [0, 2, 6])
def test_s3_learns_by_the_derivative_of_its_own_value(steps: int) -> None:
    sign, value, *chain = latents(2 + steps)
    scale, gain = torch.full((6, 1), 0.3), torch.linspace(0.5, 2, 6)[:, None].requires_grad_()
    parts = [sign, value, scale, gain, *chain]
    node = ir.node("FakeSparseShift", [p.detach().numpy() for p in parts], output="w")
    y = ir.find_op("FakeSparseShift").torch(node)(*parts)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((y * g).sum(), [sign, value, gain, *chain])

    signs, alive = through(sign, torch.where(sign >= 0, 1.0, -1.0)), through(value, (value > 0).float())
    total = torch.zeros_like(sign)
    for step in chain:
        total = (total + 1) * through(step, (step > 0).float())
    level = signs * alive * torch.exp2(total)
    assert set(level.detach().unique().tolist()) == {0, *(s * 2.0**k for k in range(steps + 1) for s in (-1, 1))}
    assert not torch.signbit(y[value <= 0]).any(), "a 0 has no sign"
    np.testing.assert_array_equal(y.detach(), (level * (scale * gain)).detach())
    np.testing.assert_allclose(
        got[0], (g * (value > 0) * torch.exp2(total) * scale * gain).detach(), rtol=2e-5, atol=1e-6
    )
    want = torch.autograd.grad((level * (scale * gain) * g).sum(), [sign, value, gain, *chain])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)  # products in another order; sums of 400
