"""binary: signs with a scale a row, the forms of each method, and what training does to them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

import mc_opt
from mc_opt import ir, passes
from mc_opt.passes import _binary
from mc_opt.passes._trainable import TrainablePass, forms
from tests._harness import apply, check, model, same_in_torch, skipped

METHODS = ("bc", "pc", "pcpp", "bnnpp", "bnnplus", "foothill")
LINEAR = "g (float[N,16] x) => (float[N,12] y) <float[16,12] w> { y = MatMul (x, w) }"
NET = """net (float[8,1,8,8] x) => (float[8,3] y)
<
  float[6,1,3,3] first, float[8,6,3,3] conv, float[8] scale, float[8] bias, float[8] mean, float[8] variance,
  float[32,16] fc, float[16,3] last, int64[2] flat = {8, 32}
>
{
  a = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (x, first)
  b = Conv <pads: ints = [1,1,1,1], strides: ints = [2,2]> (a, conv)
  n = BatchNormalization (b, scale, bias, mean, variance)
  r = Relu (n)
  f = Reshape (r, flat)
  h = MatMul (f, fc)
  t = Relu (h)
  y = MatMul (t, last)
}"""


def prepared(spec: str, source: onnx_ir.Model) -> tuple[onnx_ir.Model, TrainablePass]:
    clone = source.clone()
    step = passes.Pipeline.parse(spec).passes[0]
    assert isinstance(step, TrainablePass)
    assert step.prepare(clone, passes.Context())
    ir.add_functions(clone)
    ir.verify(clone)
    return clone, step


def at(ready: onnx_ir.Model, step: TrainablePass, progress: float) -> onnx_ir.Model:
    """A prepared model at this share of its training."""
    clone = ready.clone()
    for name, value in step.settings(clone, progress).items():
        clone.graph.initializers[name].const_value = onnx_ir.tensor(np.array(value, np.float32), name=name)
    return clone


def converted(ready: onnx_ir.Model, step: TrainablePass) -> onnx_ir.Model:
    clone = ready.clone()
    assert step.convert(clone, passes.Context())
    ir.verify(clone)
    return clone


def trained(
    ready: onnx_ir.Model, step: TrainablePass, data: Mapping[str, np.ndarray], goal: np.ndarray, steps: int = 60
) -> tuple[onnx_ir.Model, list[float]]:
    """Fit the first output to `goal` and give the model with what it learned, and the loss at each step."""
    torch = pytest.importorskip("torch")
    module = ir.interpret(ready)
    known = ir.names(module).tensors
    parameters = {known[name]: value for name, value in module.named_parameters()}
    numbers = {known[name]: value for name, value in module.named_buffers() if name in known}
    learned = [parameters[name] for name in step.parameters(ready)]
    optimiser = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0)
    penalty = step.penalty(ready)
    losses = []
    for k in range(steps + 1):
        for name, value in step.settings(ready, k / steps).items():
            numbers[name].fill_(value)
        (y,) = ir.run_module(module, data).values()
        loss = (y - torch.tensor(goal)).square().mean()
        losses.append(float(loss.detach()))
        if k == steps:
            break
        if penalty is not None:
            loss = loss + penalty(parameters, k / steps)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
        optimiser.step()
    clone = ready.clone()
    ir.state_to_model(module, clone)
    return clone, losses


def inputs(shape: tuple[int, ...] = (8, 1, 8, 8)) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


def test_without_training_a_weight_becomes_its_signs() -> None:
    source = model(LINEAR)
    result = check(
        "binary{skip=}",
        LINEAR,
        """
        w = mc_opt.Lookup(w.codes, binary.1bit, w.scale) {axes=[1], bits=1, shape=[16, 12]}
        y = MatMul(x, w)""",
    )
    w = source.graph.initializers["w"].const_value.numpy()
    held = {name: value.const_value.numpy() for name, value in result.graph.initializers.items()}
    assert set(held) == {"w.codes", "binary.1bit", "w.scale"}
    assert held["binary.1bit"].tolist() == [-1, 1]
    np.testing.assert_allclose(held["w.scale"][:, 0], np.abs(w).mean(axis=0), rtol=1e-6)
    codes = ir.unpack_codes(held["w.codes"], 1, w.size).reshape(12, 16)
    assert np.array_equal(codes, w.T >= 0)


def test_mean_is_the_best_scale_of_signs() -> None:
    w = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    best = _binary.mean_scale(w)
    for other in (best * 0.99, best * 1.01):
        assert (((w - best * np.sign(w)) ** 2).sum(1) < ((w - other * np.sign(w)) ** 2).sum(1)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_times_scale_and_unit_are_the_weight(dtype: type) -> None:
    w = np.random.default_rng(0).standard_normal((4, 9)).astype(dtype)
    w[1] = 0
    w[2] *= dtype(2e-4)
    latent, scale, unit = _binary.latents(w, _binary.mean_scale(w))
    assert latent.dtype == scale.dtype == unit.dtype == dtype
    np.testing.assert_allclose(
        latent * _binary.GAIN * (scale * unit), w, rtol=2e-3 if dtype == np.float16 else 1e-6, atol=1e-7
    )
    assert scale[:, 0].tolist() == [1, 0, 1, 1], "a row of zeros stays 0"


@pytest.mark.parametrize("method", METHODS)
def test_each_method_ends_where_it_is_stored(method: str) -> None:
    ready, step = prepared(f"binary{{method={method}}}", model(NET))
    assert [n.op_type for n in forms(ready, "binary")] == ["FakeProx" if method in METHODS[:3] else "FakeSwishSign"] * 2
    assert step.parameters(ready) == ("conv.latent", "conv.scale", "fc.latent", "fc.scale")
    stored = converted(ready, step)
    end = ir.Session(at(ready, step, 1.0)).run(inputs())["y"]
    assert np.array_equal(end, ir.Session(stored).run(inputs())["y"]), "the same numbers, to the bit"
    assert set(step.settings(ready, 0.5)) <= set(ready.graph.initializers)
    assert not set(step.settings(ready, 0.5)) & set(stored.graph.initializers), "what only training needs is gone"


def test_prox_connect_starts_as_the_float_model() -> None:
    ready, step = prepared("binary{method=pc}", model(NET))
    start = ir.Session(at(ready, step, 0.0)).run(inputs())["y"]
    np.testing.assert_allclose(start, ir.Session(model(NET)).run(inputs())["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_settings_only_grow_and_end_hard(method: str) -> None:
    ready, step = prepared(f"binary{{method={method}}}", model(NET))
    way = [dict(step.settings(ready, p)) for p in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert all(a[name] <= b[name] for a, b in itertools.pairwise(way) for name in a)
    assert way[-1] == way[-2], "the last third is hard"


def test_layers_may_use_other_methods() -> None:
    step = passes.Pipeline.parse("binary{method=bc}").passes[0].with_overrides((("fc", {"method": "bnnpp"}),))
    ready = model(NET)
    assert step.prepare(ready, passes.Context()) == 2
    assert [n.op_type for n in forms(ready, "binary")] == ["FakeProx", "FakeSwishSign"]
    assert set(step.settings(ready, 0.0)) == {"binary.bc.sharpness", "binary.bnnpp.sharpness", "binary.bnnpp.hard"}


@pytest.mark.torch
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_training_lowers_the_loss_and_is_what_is_stored(method: str) -> None:
    source = model(NET)
    goal = ir.Session(source).run(inputs())["y"]
    ready, step = prepared(f"binary{{method={method}}}", source)
    learned, losses = trained(ready, step, inputs(), goal)
    before = float(((ir.Session(converted(ready, step)).run(inputs())["y"] - goal) ** 2).mean())
    stored = converted(learned, step)
    after = float(((ir.Session(stored).run(inputs())["y"] - goal) ** 2).mean())
    assert after < 0.5 * before
    assert after == pytest.approx(losses[-1], rel=1e-4), "what was trained is what is stored"
    books = [n.inputs[1] for n in stored.graph if n.op_type == "Lookup"]
    assert len(books) == 2 and len(set(books)) == 1
    same_in_torch(stored)


@pytest.mark.tvm
@pytest.mark.zig
@pytest.mark.slow
@pytest.mark.parametrize("spec", ["binary", "binary{activations=true}"])
def test_the_artefact_is_the_stored_model(tmp_path: Path, spec: str) -> None:
    source = model(NET)
    goal = ir.Session(source).run(inputs())["y"]
    ready, step = prepared(spec, source)
    stored = converted(trained(ready, step, inputs(), goal, steps=10)[0], step)
    mc_opt.build(stored, "x86{cpu=x86-64-v3}", tmp_path)
    y = mc_opt.load(tmp_path).run(inputs())["y"]
    np.testing.assert_allclose(y, ir.Session(stored).run(inputs())["y"], rtol=1e-4, atol=1e-4)


def test_what_is_left_alone_has_a_reason() -> None:
    assert set(skipped("binary", NET)) == {"first", "last"}
    small = "g (float[2,2] x) => (float[2,1] y) <float[2,1] w> { y = MatMul (x, w) }"
    assert "the codes would save 3 bytes, their codebook takes 8" in skipped("binary{skip=}", small)["w"]
    thin = "g (float[2,1] x) => (float[2,9] y) <float[1,9] w> { y = MatMul (x, w) }"
    assert "9 x 1 weights would take" in skipped("binary{skip=}", thin)["w"]
    broken = skipped("binary{skip=}", LINEAR, {"w": np.full((16, 12), np.nan, np.float32)})
    assert "NaN" in broken["w"]


def test_all_kinds_of_layers_and_row_axes() -> None:
    result = check(
        "binary{skip=}",
        """g (float[2,4,9,9] x, int64[3] ids, float[5,1,8] s) => (float[2,6,7,7] y, float[3,8] e, float[5,2,1,16] h)
        <float[6,4,3,3] conv, float[64,8] table, float[2,64,8] wi, float[2,64,16] wr> {
            y = Conv (x, conv)
            e = Gather (table, ids)
            h = LSTM <hidden_size: int = 16, direction: string = "bidirectional"> (s, wi, wr)
        }""",
    )
    axes = {n.outputs[0].name: list(n.attributes["axes"].as_ints()) for n in result.graph if n.op_type == "Lookup"}
    assert axes == {"conv": [0], "table": [0], "wi": [0, 1], "wr": [0, 1]}


def test_half_precision_has_a_codebook_of_its_own() -> None:
    text = LINEAR.replace("float[", "float16[")
    changed, _ = apply("binary{skip=}", model(text))
    assert changed.graph.initializers["binary.1bit.float16"].dtype == onnx_ir.DataType.FLOAT16
    ir.verify(changed)


def test_a_sign_stands_before_the_relu_which_goes_where_nothing_else_needs_it() -> None:
    result = check(
        "binary{activations=true}",
        """g (float[2,4,6,6] x) => (float[2,3,3,3] y)
        <float[4,4,1,1] a, float[4] s, float[4] b, float[4] m, float[4] var, float[8,4,3,3] c, float[3,8,1,1] z> {
            h = Conv (x, a)
            n = BatchNormalization (h, s, b, m, var)
            r = Relu (n)
            p = MaxPool <kernel_shape: ints = [2,2], strides: ints = [2,2]> (r)
            k = Conv <pads: ints = [1,1,1,1]> (p, c)
            y = Conv (k, z)
        }""",
        """
        h = Conv(x, a)
        n = BatchNormalization(h, s, b, m, var)
        c = mc_opt.Lookup(c.codes, binary.1bit, c.scale) {bits=1, shape=[8, 4, 3, 3]}
        p.unrectified = MaxPool(n) {kernel_shape=[2, 2], strides=[2, 2]}
        p.unrectified.signs.1 = GreaterOrEqual(p.unrectified, binary.0)
        p.unrectified.signs = Where(p.unrectified.signs.1, binary.1, binary.-1)
        k = Conv(p.unrectified.signs, c) {pads=[1, 1, 1, 1]}
        y = Conv(k, z)""",
    )
    assert result.graph.outputs[0].name == "y"


def test_a_relu_that_others_need_stays() -> None:
    text = """g (float[2,8] x) => (float[2,8] y)
    <float[8,16] first, float[16,16] a, float[16,16] b, float[16,8] last> {
        f = MatMul (x, first)
        r = Relu (f)
        h = MatMul (r, a)
        i = MatMul (r, b)
        s = Add (h, i)
        t = Add (s, r)
        y = MatMul (t, last)
    }"""
    changed, _ = apply("binary{activations=true}", model(text))
    ir.verify(changed)
    by_op = [n.op_type for n in changed.graph]
    assert by_op.count("Relu") == 1 and by_op.count("Where") == 1, "one sign for both layers"
    where = next(n for n in changed.graph if n.op_type == "GreaterOrEqual")
    assert where.inputs[0].name == "f"


@pytest.mark.parametrize(
    ("rectifier", "source"),
    [
        ("Relu (f)", "f"),
        ("Clip (f, zero, six)", "f"),
        ("Clip (f, low, six)", "r"),
        ("HardSwish (f)", "f"),
        ("Tanh (f)", "r"),
    ],
)
def test_which_rectifiers_are_passed_by(rectifier: str, source: str) -> None:
    text = f"""g (float[2,8] x) => (float[2,8] y)
    <float[8,16] first, float[16,16] a, float[16,8] last, float zero = {{0}}, float six = {{6}}, float low = {{-1}}> {{
        f = MatMul (x, first)
        r = {rectifier}
        h = MatMul (r, a)
        y = MatMul (h, last)
    }}"""
    changed, _ = apply("binary{activations=true}", model(text))
    compared = next(n for n in changed.graph if n.op_type == "GreaterOrEqual")
    assert compared.inputs[0].name == source


def test_layers_without_batch_norm_are_warned_about() -> None:
    log = passes.Context()
    passes.Pipeline.parse("binary").passes[0].run(model(NET), log)
    assert log.log.warnings[0].startswith("no BatchNormalization follows 1 of 2 layers (fc):")
    biased = """g (float[2,8] x) => (float[2,16] n)
    <float[8,16] w, float[16] b, float[16] s, float[16] m, float[16] var> {
        h = MatMul (x, w)
        i = Add (b, h)
        n = BatchNormalization (i, s, b, m, var)
    }"""
    log = passes.Context()
    assert passes.Pipeline.parse("binary{skip=}").passes[0].run(model(biased), log)
    assert not log.log.warnings


@pytest.mark.torch
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_weights_and_activations_train_and_are_what_is_stored(method: str) -> None:
    source = model(NET)
    goal = ir.Session(source).run(inputs())["y"]
    ready, step = prepared(f"binary{{method={method} activations=true}}", source)
    assert len(list(forms(ready, "binary"))) == 4
    untrained = converted(ready, step)
    end = ir.Session(at(ready, step, 1.0)).run(inputs())["y"]
    assert np.array_equal(end, ir.Session(untrained).run(inputs())["y"]), "the same numbers, to the bit"
    learned, losses = trained(ready, step, inputs(), goal)
    stored = converted(learned, step)
    after = float(((ir.Session(stored).run(inputs())["y"] - goal) ** 2).mean())
    assert after < float(((end - goal) ** 2).mean())
    assert after == pytest.approx(losses[-1], rel=1e-4), "what was trained is what is stored"
    same_in_torch(stored)
