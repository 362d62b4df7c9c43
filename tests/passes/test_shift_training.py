"""Shift weights in training: the forms start as the stored ones, learn, and come out as what they computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

import mc_opt
from mc_opt import ir, passes
from mc_opt.ir.run import interp, module
from tests._harness import apply, model, same_in_torch
from tests.passes.zoo import ZOO

pytestmark = [pytest.mark.torch, pytest.mark.slow]
torch = pytest.importorskip("torch")

CNN = """cnn (float[16,3,6,6] x) => (float[16,5] y)
<float[12,3,3,3] a, float[24,12,3,3] b, float[5,24] c, int64[2] shape = {16, 24}> {
    h = Conv <pads: ints = [1,1,1,1]> (x, a)
    i = Relu (h)
    j = Conv <pads: ints = [1,1,1,1]> (i, b)
    k = Relu (j)
    l = GlobalAveragePool (k)
    m = Reshape (l, shape)
    y = Gemm <transB: int = 1> (m, c)
}"""
SPECS = ["denseshift{bits=3 skip=}", "s3{skip=}", "denseshift{bits=2 terms=2 skip=}"]


def prepared(spec: str, source: onnx_ir.Model, seed: int = 0) -> tuple[onnx_ir.Model, passes.TrainablePass]:
    clone = source.clone()
    step = passes.Pipeline.parse(spec).passes[0]
    assert isinstance(step, passes.TrainablePass)
    assert step.prepare(clone, passes.Context(seed=seed, training=passes.Training()))
    ir.add_functions(clone)
    ir.verify(clone)
    return clone, step


def converted(made: onnx_ir.Model, step: passes.TrainablePass) -> onnx_ir.Model:
    clone = made.clone()
    assert step.convert(clone, passes.Context())
    ir.add_functions(clone)
    ir.verify(clone)
    return clone


def train(made: onnx_ir.Model, step: passes.TrainablePass, source: onnx_ir.Model, steps: int) -> list[float]:
    """Adam on the squared difference from the source's outputs; the losses, and the trained numbers in `made`."""
    graph, teacher = interp.interpret(made), interp.interpret(source)
    known = module.names(graph).tensors
    trained = {known[n]: p for n, p in graph.named_parameters() if known[n] in step.parameters(made)}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    penalty, losses = step.penalty(made), []
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 3, 6, 6)).astype(np.float32))
    for number in range(steps):
        loss = (graph(x)[0] - teacher(x)[0].detach()).square().mean()
        losses.append(loss.item())
        loss = loss if penalty is None else loss + penalty(trained, number / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ir.state_to_model(graph, made)
    return losses


def arrays(source: onnx_ir.Model) -> dict[str, np.ndarray]:
    return {k: v.const_value.numpy() for k, v in source.graph.initializers.items() if v.const_value is not None}


@pytest.mark.parametrize("spec", [
    *SPECS, "denseshift{skip= rounding=log2}", "denseshift{group_size=5 skip=}", "denseshift{bits=2 skip= spread=1}",
    "s3{bits=2 skip=}", "s3{bits=4 skip= group_size=5}",
])  # fmt: skip
def test_a_form_that_is_not_trained_is_stored_as_without_a_training(spec: str) -> None:
    source = model(ZOO)
    want, _ = apply(spec, source)
    made, step = prepared(spec, source)
    got = converted(made, step)
    assert ir.nodes_text(got.graph) == ir.nodes_text(want.graph)
    assert arrays(got).keys() == arrays(want).keys()
    for name, array in arrays(want).items():
        np.testing.assert_array_equal(arrays(got)[name], array, err_msg=name)


def test_terms_of_rows_of_zeros_and_of_what_one_term_holds_start_as_they_are_stored() -> None:
    w = np.zeros((8, 12), np.float32)
    w[:, 1:4] = np.random.default_rng(0).standard_normal((8, 3))
    w[0] = w[1] = 0
    source = model("g (float[2,8] x) => (float[2,12] y) <float[8,12] w> { y = MatMul (x, w) }", {"w": w})
    for spec in ("denseshift{bits=2 terms=2 skip=}", "denseshift{bits=3 skip=}", "s3{skip=}"):
        made, step = prepared(spec, source)
        x = {"x": np.eye(2, 8, dtype=np.float32)}
        want = ir.Session(apply(spec, source)[0]).run(x)["y"]
        np.testing.assert_array_equal(ir.Session(made).run(x)["y"], want)
        np.testing.assert_array_equal(ir.Session(converted(made, step)).run(x)["y"], want)


@pytest.mark.parametrize("spec", SPECS)
def test_a_trained_form_is_stored_as_what_it_computes(spec: str) -> None:
    source = model(CNN)
    made, step = prepared(spec, source)
    assert all(name.rpartition(".")[2] != "scale" for name in step.parameters(made)), "the gain is what is learned"
    losses = train(made, step, source, 60)
    assert losses[-1] < 0.7 * losses[0]
    x = {"x": np.random.default_rng(1).standard_normal((16, 3, 6, 6)).astype(np.float32)}
    with torch.no_grad():
        weights = {n.outputs[0].name for n in made.graph if n.op_type.startswith("Fake")}
        want = module.run_module(interp.interpret(made), x)["y"].numpy()
    result = converted(made, step)
    assert weights == {n.outputs[0].name for n in result.graph if n.op_type == "Lookup"}
    assert not any(name.endswith(("sign", "gain", "step1")) for name in result.graph.initializers)
    same_in_torch(result)
    # Sums of 108 products in other orders; the weights are the same numbers.
    np.testing.assert_allclose(ir.Session(result).run(x)["y"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["denseshift{bits=3 skip=}", "s3{skip=}"])
def test_a_trained_form_is_the_same_in_an_artefact(spec: str, tmp_path: Path) -> None:
    source = model(CNN)
    made, step = prepared(spec, source)
    train(made, step, source, 10)
    x = {"x": np.random.default_rng(1).standard_normal((16, 3, 6, 6)).astype(np.float32)}
    with torch.no_grad():
        want = module.run_module(interp.interpret(made), x)["y"].numpy()
    mc_opt.build(converted(made, step), "x86", tmp_path / "x86")
    np.testing.assert_allclose(mc_opt.load(tmp_path / "x86").run(x)["y"], want, rtol=1e-5, atol=1e-5)  # order of sums


def test_a_negative_gain_turns_the_signs() -> None:
    source = model(CNN)
    made, step = prepared("denseshift{bits=3 skip=}", source)
    gain = made.graph.initializers["b.gain"]
    assert gain.const_value is not None
    turned = gain.const_value.numpy().copy()
    turned[::2] = -0.5
    gain.const_value = onnx_ir.tensor(turned)
    x = {"x": np.random.default_rng(1).standard_normal((16, 3, 6, 6)).astype(np.float32)}
    result = converted(made, step)
    assert (arrays(result)["b.scale"] > 0).all()
    np.testing.assert_array_equal(ir.Session(made).run(x)["y"], ir.Session(result).run(x)["y"])


def test_random_latents_have_the_low_variance_and_keep_the_power() -> None:
    source = model(CNN)
    made, step = prepared("denseshift{bits=3 init=random skip=}", source)
    found = arrays(made)
    for what in ("sign", "step1", "step3"):
        assert 0.8e-3 < found[f"b.{what}"].std() < 1.2e-3
    decoded = {n.outputs[0].name: n for n in converted(made, step).graph if n.op_type == "Lookup"}
    inputs = [v.const_value.numpy() for v in decoded["b"].inputs if v is not None and v.const_value is not None]
    w = ir.decode(*inputs, bits=3, shape=(24, 12, 3, 3))
    rows = [np.square(array.reshape(24, -1)).sum(axis=1) for array in (w, arrays(source)["b"])]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)  # an fp32 scale
    same = arrays(prepared("denseshift{bits=3 init=random skip=}", source)[0])["b.sign"]
    other = arrays(prepared("denseshift{bits=3 init=random skip=}", source, seed=1)[0])["b.sign"]
    assert np.array_equal(same, found["b.sign"]) and not np.array_equal(other, found["b.sign"])


CELL = """cell (float[N,5,8] s, int64[N,5] ids) => (float[N,4] y)
<float[20,8] table, float[1,64,8] w, float[1,64,16] r, float[16,4] head, int64[1] zero = {0}> {
    e = Gather (table, ids)
    both = Add (e, s)
    t = Transpose <perm: ints = [1,0,2]> (both)
    seq, hidden, cell = LSTM <hidden_size: int = 16> (t, w, r)
    last = Squeeze (hidden, zero)
    h = MatMul (last, head)
    y = Tanh (h)
}"""


@pytest.mark.parametrize("spec", ["denseshift{bits=2 skip=}", "s3{bits=2 skip=}"])
def test_cells_and_tables_learn_from_the_original_by_the_engine(spec: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = {"s": rng.standard_normal((96, 5, 8)).astype(np.float32), "ids": rng.integers(0, 20, (96, 5))}
    np.savez(tmp_path / "data.npz", **data)
    source = model(CELL)
    training = passes.Training(data=tmp_path / "data.npz", loss="output", epochs=20, lr=3e-3, batch_size=16)
    pipeline = passes.Pipeline.parse(spec)
    result = passes.run(source, pipeline, passes.Context(training=training))
    assert [n.op_type for n in result.model.graph].count("Lookup") == 4
    untrained = passes.run(source, pipeline, passes.Context()).model
    want, before, after = (ir.Session(m).run(data)["y"] for m in (source, untrained, result.model))
    assert np.square(after - want).mean() < 0.6 * np.square(before - want).mean()
    same_in_torch(result.model)
