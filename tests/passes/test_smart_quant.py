"""smart-quant: the regulariser, how a layer's bits follow from β, and what is stored."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

import mc_opt
from mc_opt import ir, passes
from mc_opt.passes import _binary
from tests._harness import check, model, same_in_torch
from tests.passes.test_binary import LINEAR, NET, at, converted, inputs, prepared, trained

TERNARY, MIDDLE, BINARY = math.pi / 4, 3 * math.pi / 8, math.pi / 2 - 1e-3
U = np.linspace(-2, 2, 401, dtype=np.float32)


def regulariser(u: np.ndarray, beta: float, gamma: float = 0.0) -> tuple[float, float]:
    """R and ∂R/∂β."""
    torch = pytest.importorskip("torch")
    from mc_opt.passes import _train_wells

    shape = torch.tensor(beta, requires_grad=True)
    value = _train_wells.three_wells(torch.tensor(u), shape, gamma)
    value.backward()
    return float(value.detach()), float(shape.grad)


@pytest.mark.torch
def test_wells_are_at_the_levels() -> None:
    assert regulariser(np.array([-1, 0, 1], np.float32), TERNARY)[0] == 0
    assert regulariser(np.array([-1, 1], np.float32), BINARY)[0] == 0
    assert regulariser(np.array([0.4, 1.2], np.float32), TERNARY)[0] == pytest.approx((0.4**2 + 0.2**2) / 2)


@pytest.mark.torch
def test_towards_a_right_angle_only_the_binary_wells_are_left() -> None:
    away = U[np.abs(U) > 1 / (1 + math.sqrt(math.tan(BINARY)))]
    assert regulariser(away, BINARY)[0] == pytest.approx(float(((np.abs(away) - 1) ** 2).mean()), rel=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("beta", [TERNARY + 0.01, 1.0, 1.4])
def test_the_wells_meet_where_the_threshold_is(beta: float) -> None:
    edge = 1 / (1 + math.sqrt(math.tan(beta)))
    inner, outer = (np.full(3, edge * f, np.float32) for f in (0.999, 1.001))
    assert regulariser(inner, beta)[0] == pytest.approx(float(math.tan(beta) * inner[0] ** 2), rel=1e-5)
    assert regulariser(outer, beta)[0] == pytest.approx(float((1 - outer[0]) ** 2), rel=1e-5)
    assert ir.threshold(U, beta) == pytest.approx(edge, rel=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("gamma", [0.0, 0.001, 0.5])
@pytest.mark.parametrize("beta", [TERNARY + 0.01, 1.2])
def test_the_gradient_of_beta_follows_its_formula(beta: float, gamma: float) -> None:
    zero = np.abs(U) < 1 / (1 + math.sqrt(math.tan(beta)))
    want = (U[zero] ** 2).sum() / U.size / math.cos(beta) ** 2 - gamma / math.sin(beta) ** 2
    assert regulariser(U, beta, gamma)[1] == pytest.approx(float(want), rel=1e-3)


@pytest.mark.torch
@pytest.mark.parametrize(("beta", "slope"), [(0.5, -1), (1.0, 0), (1.6, 1)])
def test_a_wall_holds_beta(beta: float, slope: float) -> None:
    torch = pytest.importorskip("torch")
    from mc_opt.passes import _train_wells

    shape = torch.tensor(beta, requires_grad=True)
    _train_wells.wall(shape).backward()
    assert float(shape.grad) == slope


def test_few_zeros_or_a_large_beta_make_a_layer_binary() -> None:
    u = np.ones(100, np.float32)
    u[:5] = 0.1
    assert ir.threshold(u, 1.0) > 0
    u[0] = 1
    assert ir.threshold(u, 1.0) == 0
    assert ir.threshold(U, math.pi / 2 - 0.04) == 0 < ir.threshold(U, math.pi / 2 - 0.06)


def test_the_scale_is_the_best_for_its_codes() -> None:
    w = np.random.default_rng(0).standard_normal((4, 60)).astype(np.float32)
    bound = 0.5
    scale = _binary.kept_mean(w, bound)
    t = _binary.codes_beyond(w, bound).astype(np.float32) - 1
    np.testing.assert_allclose(scale[:, 0], (w * t).sum(1) / (t * t).sum(1), rtol=1e-5)


@pytest.mark.torch
def test_the_loss_moves_beta_through_the_threshold() -> None:
    torch = pytest.importorskip("torch")
    x = np.array([-3, -0.6, -0.2, 0.3, 0.5, 2], np.float32)
    node = ir.node("FakeThreshold", [x, np.array(1.0, np.float32)], output="y")
    given, beta = torch.tensor(x, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = ir.find_op("FakeThreshold").torch(node)(given, beta)
    g = torch.arange(1.0, 7.0)
    y.backward(g)
    assert torch.equal(given.grad, g)
    root = math.sqrt(math.tan(1.0))
    delta = 1 / (1 + root)
    slope = -1 / (1 + root) ** 2 / (2 * root) / math.cos(1.0) ** 2
    near = np.abs(x) < 2 * delta
    want = -(g.numpy() * np.sign(x) * near).sum() / (2 * delta) * slope
    assert float(beta.grad) == pytest.approx(float(want), rel=1e-5)
    assert y.tolist() == [-1, -1, 0, 0, 1, 1], f"the threshold is {delta}"


def test_without_training_a_layer_is_ternary() -> None:
    result = check(
        "smart-quant{skip=}",
        LINEAR,
        """
        w = mc_opt.Lookup(w.codes, smart-quant.2bit, w.scale) {axes=[1], bits=2, shape=[16, 12]}
        y = MatMul(x, w)""",
    )
    assert set(result.graph.initializers) == {"w.codes", "smart-quant.2bit", "w.scale"}


def with_beta(ready: onnx_ir.Model, **betas: float) -> onnx_ir.Model:
    clone = ready.clone()
    for name, beta in betas.items():
        clone.graph.initializers[f"{name}.beta"].const_value = onnx_ir.tensor(np.array(beta, np.float32))
    return clone


def test_each_layer_has_the_bits_that_its_beta_asks_for() -> None:
    ready, step = prepared("smart-quant", model(NET))
    chosen = with_beta(ready, conv=1.56, fc=0.9)
    ctx = passes.Context()
    stored = chosen.clone()
    step.convert(stored, ctx)
    ir.verify(stored)
    bits = {n.outputs[0].name: n.attributes["bits"].as_int() for n in stored.graph if n.op_type == "Lookup"}
    assert bits == {"conv": 1, "fc": 2}
    notes = dict(ctx.log.notes)
    assert notes["conv"].startswith("1 bit") and notes["fc"].startswith("2 bits")
    assert notes[""] == f"{(8 * 6 * 9 + 2 * 32 * 16) / (8 * 6 * 9 + 32 * 16):.2f} bits a weight on average"
    y = ir.Session(stored).run(inputs())["y"]
    assert np.array_equal(y, ir.Session(at(chosen, step, 1.0)).run(inputs())["y"])


@pytest.mark.torch
@pytest.mark.slow
def test_training_lowers_the_loss_and_is_what_is_stored() -> None:
    source = model(NET)
    goal = ir.Session(source).run(inputs())["y"]
    ready, step = prepared("smart-quant", source)
    assert [n for n in step.parameters(ready) if n.startswith("fc")] == ["fc.latent", "fc.beta", "fc.scale"]
    before = float(((ir.Session(converted(ready, step)).run(inputs())["y"] - goal) ** 2).mean())
    learned, losses = trained(ready, step, inputs(), goal)
    stored = converted(learned, step)
    after = float(((ir.Session(stored).run(inputs())["y"] - goal) ** 2).mean())
    assert after < 0.5 * before
    assert after == pytest.approx(losses[-1], rel=1e-4), "what was trained is what is stored"
    same_in_torch(stored)


@pytest.mark.torch
@pytest.mark.slow
def test_gamma_pushes_to_one_bit() -> None:
    source = model(NET)
    goal = ir.Session(source).run(inputs())["y"]
    ready, step = prepared("smart-quant{gamma=1000 strength=10}", source)
    stored = converted(trained(ready, step, inputs(), goal, steps=100)[0], step)
    assert {n.attributes["bits"].as_int() for n in stored.graph if n.op_type == "Lookup"} == {1}


@pytest.mark.tvm
@pytest.mark.zig
@pytest.mark.slow
def test_the_artefact_is_the_stored_model(tmp_path: Path) -> None:
    ready, step = prepared("smart-quant", model(NET))
    stored = converted(with_beta(ready, conv=1.56, fc=0.9), step)
    mc_opt.build(stored, "x86{cpu=x86-64-v3}", tmp_path)
    y = mc_opt.load(tmp_path).run(inputs())["y"]
    np.testing.assert_allclose(y, ir.Session(stored).run(inputs())["y"], rtol=1e-4, atol=1e-4)
