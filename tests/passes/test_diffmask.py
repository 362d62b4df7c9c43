"""diffmask: masks of ones change no bit, gradients follow the formulas, what is removed is what is masked."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from mc_opt import ir, passes
from mc_opt.passes._blocks import blocks_of
from mc_opt.passes.diffmask import DiffMask
from tests._harness import apply, model, same_in_torch, skipped
from tests.passes.masked import RESIDUAL, random_net, recurrent_net


def prepared(step: DiffMask, source: onnx_ir.Model) -> onnx_ir.Model:
    clone = source.clone()
    assert step.prepare(clone, passes.Context())
    ir.add_functions(clone)
    ir.verify(clone)
    return clone


def set_thetas(of: onnx_ir.Model, seed: int) -> None:
    """Thetas on both sides of 0."""
    rng = np.random.default_rng(seed)
    for name, value in of.graph.initializers.items():
        if ".theta" in name and "index" not in name and value.const_value is not None:
            shape = value.const_value.numpy().shape
            value.const_value = onnx_ir.tensor(rng.standard_normal(shape).astype(np.float32))
    of.graph.initializers["diffmask.threshold"].const_value = onnx_ir.tensor(np.array(0, np.float32))


def outputs(of: onnx_ir.Model) -> list[np.ndarray]:
    session = ir.Session(of, optimise=False)
    return [array for sample in ir.seeded_data(of, 2, 0) for array in session.run(sample.inputs).values()]


CASES = [
    ("filter", random_net(1)),
    ("filter", random_net(4)),
    ("filter", random_net(7)),
    ("filter", random_net(11)),
    ("node", recurrent_net("LSTM", "bidirectional")),
    ("node", recurrent_net("GRU")),
    ("block", RESIDUAL),
    ("weight", RESIDUAL),
    ("weight", recurrent_net("LSTM")),
]


@pytest.mark.parametrize(("granularity", "text"), CASES)
def test_what_is_removed_is_what_was_masked(granularity: str, text: str) -> None:
    source, step = model(text), DiffMask(granularity=granularity, share=0.99)  # type: ignore[arg-type]  # of the list
    masked = prepared(step, source)
    for a, b in zip(outputs(source), outputs(masked), strict=True):
        assert a.tobytes() == b.tobytes(), "masks of ones change no bit"
    same_in_torch(masked)
    set_thetas(masked, 5)
    expected = outputs(masked)
    assert any(a.tobytes() != b.tobytes() for a, b in zip(outputs(source), expected, strict=True))
    step.convert(masked, passes.Context())
    ir.add_functions(masked)
    ir.verify(masked)
    assert not any(name.startswith("diffmask") or ".theta" in name for name in masked.graph.initializers)
    for a, b in zip(expected, outputs(masked), strict=True):
        # Sums of fewer products in another order.
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * max(1, float(np.abs(a).max())))
    same_in_torch(masked)
    size = passes.size_of
    if granularity != "weight":
        assert size(masked).parameters < size(source).parameters


@pytest.mark.parametrize("budget", ["count", "params", "macs", "time"])
@pytest.mark.parametrize("granularity", ["filter", "block", "weight"])
def test_the_budget_is_met(granularity: str, budget: str) -> None:
    if (granularity, budget) == ("weight", "time"):
        with pytest.raises(ValueError, match="single zeros save no time"):
            DiffMask(granularity="weight", budget="time")
        return
    source = model(RESIDUAL)
    step = passes.Pipeline.parse(f"diffmask{{granularity={granularity} budget={budget} share=0.7}}").passes[0]
    clone, context = source.clone(), passes.Context()
    assert step.run(clone, context)
    assert not context.log.warnings
    (note,) = (text for layer, text in context.log.notes if not layer)
    assert float(note.split(";")[1].split()[0]) <= 0.7
    ir.add_functions(clone)
    ir.verify(clone)


def test_blocks() -> None:
    source = model(RESIDUAL)
    assert [(b.name, len(b.nodes), b.skip.name) for b in blocks_of(source)] == [("w2", 3, "a"), ("w3", 1, "s1")]
    small, _ = apply("diffmask{granularity=block}", source)
    # The branch of smaller weights goes: one of two.
    assert [n.op_type for n in small.graph].count("Identity") == 1
    assert len([n for n in small.graph.initializers if n.startswith("w")]) in (3, 4)
    assert "w2" in skipped("diffmask{granularity=block skip=w2}", RESIDUAL)


def test_a_budget_out_of_reach_is_told() -> None:
    clone, context = model(random_net(0)).clone(), passes.Context()
    passes.Pipeline.parse("diffmask{share=0.01 budget=params}").passes[0].run(clone, context)
    assert "0.01 was asked for" in context.log.warnings[0]


@pytest.mark.torch
def test_gradients() -> None:
    """∂L/∂x = g·m, ∂L/∂θ = m·Σ g·x·β·m̃(1 − m̃)."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for shape, whole in (((3,), False), ((2, 3, 4), True)):
        x, g = (torch.tensor(rng.standard_normal((2, 3, 4)), dtype=torch.float32) for _ in range(2))
        theta = torch.tensor(rng.standard_normal(shape), dtype=torch.float32, requires_grad=True)
        values = [x.requires_grad_(), theta, torch.tensor(-0.5), torch.tensor(3.0)]
        arrays = [v.detach().numpy() for v in values]
        node = ir.node("FakeMask", arrays, {"axis": 1}, output="y")
        function = ir.find_op("FakeMask").torch(node)
        assert function is not None
        (function(*values) * g).sum().backward()
        live = (theta.detach() > -0.5).float()
        mask = live.reshape(shape if whole else (3, 1)).expand_as(x)
        soft = torch.sigmoid(3 * (theta.detach() + 0.5))
        each = g * x.detach()
        torch.testing.assert_close(x.grad, g * mask)
        torch.testing.assert_close(theta.grad, (each if whole else each.sum((0, 2))) * 3 * soft * (1 - soft) * live)


@pytest.mark.torch
def test_the_penalty_holds_the_cost_at_its_falling_target() -> None:
    torch = pytest.importorskip("torch")
    step = DiffMask(budget="macs", share=0.5)
    masked = prepared(step, model(random_net(2)))
    penalty = step.penalty(masked)
    assert penalty is not None
    thetas = {
        name: torch.tensor(value.const_value.numpy(), requires_grad=True)
        for name, value in masked.graph.initializers.items()
        if ".theta" in name and "index" not in name and value.const_value is not None
    }
    for progress in (0.0, 0.2, 0.6, 1.0):
        # The thetas at the start follow the target by themselves, up to units that go between two points of it.
        assert float(penalty(thetas, progress).detach()) < 0.3
    for moved, sign in ((0.05, 1), (-0.05, -1)):
        others = {name: (theta.detach() + moved).requires_grad_() for name, theta in thetas.items()}
        excess = penalty(others, 0.5)
        excess.backward()
        assert float(excess.detach()) > 0
        assert all((sign * theta.grad >= 0).all() for theta in others.values() if theta.grad is not None)


@pytest.mark.torch
def test_masks_are_trained_with_the_weights_beside_them() -> None:
    """A channel that the task needs stays, and the budget is met by training alone."""
    torch = pytest.importorskip("torch")
    from mc_opt.ir.run import interp, module

    step = DiffMask(share=0.5)
    source = model(
        """
        net (float[16,4] x) => (float[16,2] y) <float[4,8] a, float[8] b, float[8,2] c>
        { h = MatMul (x, a) i = Add (h, b) r = Tanh (i) y = MatMul (r, c) }
        """
    )
    masked = prepared(step, source)
    assert set(step.parameters(masked)) == {"a.theta", "a", "b", "c"}
    graph = interp.interpret(masked)
    names = module.names(graph).tensors
    parameters = {names[key]: p for key, p in graph.named_parameters() if key in names}
    settings = {names[key]: b for key, b in graph.named_buffers() if key in names}
    optimizer = torch.optim.AdamW([parameters[n] for n in step.parameters(masked)], lr=1e-3, weight_decay=0)
    penalty = step.penalty(masked)
    assert penalty is not None
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((16, 4)), dtype=torch.float32)
    wanted = ir.Session(source).run({"x": x.numpy()})["y"]
    steps = 400
    for k in range(steps):
        for name, value in step.settings(masked, k / steps).items():
            settings[name].fill_(value)
        loss = ((graph(x)[0] - torch.tensor(wanted)) ** 2).mean() + penalty(parameters, k / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.state_to_model(graph, masked)
    theta = masked.graph.initializers["a.theta"].const_value
    assert theta is not None
    left = int((theta.numpy() > 0).sum())
    assert left in (3, 4), "one of 8 channels may overshoot"
    context = passes.Context()
    expected = graph(x)[0].detach().numpy()
    step.convert(masked, context)
    ir.add_functions(masked)
    assert "0 of them for the budget" in context.log.notes[0][1]
    assert masked.graph.initializers["a"].shape == (4, left)
    np.testing.assert_allclose(ir.Session(masked).run({"x": x.numpy()})["y"], expected, atol=1e-5)
