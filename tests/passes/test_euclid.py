"""euclid: layers of squared distances, from the graph that it writes to a small network that it trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

import mc_opt
from mc_opt import ir, passes
from tests._harness import apply, check, largest_difference, lines, model, same_in_torch, skipped

NET = """
    g (float[N,4,6,6] x) => (float[N,3] y)
    <float[8,4,3,3] a_w, float[8] a_b, float[8] s, float[8] b, float[8] m, float[8] var_v,
     float[8,2] g_w, float[2,3] f_w>
    {
      a = Conv <pads: ints = [1,1,1,1]> (x, a_w, a_b)
      n = BatchNormalization (a, s, b, m, var_v)
      r = Relu (n)
      p = GlobalAveragePool (r)
      f = Flatten (p)
      h = Gemm (f, g_w)
      y = MatMul (h, f_w)
    }
"""


def prepared(spec: str, text: str) -> onnx_ir.Model:
    """The model with the training forms of a pass."""
    source = model(text)
    step = passes.Pipeline.parse(spec).passes[0]
    assert isinstance(step, passes.TrainablePass)
    assert step.prepare(source, passes.Context())
    ir.add_functions(source)
    ir.verify(source)
    return source


def set_strength(source: onnx_ir.Model, value: float) -> None:
    for name, held in source.graph.initializers.items():
        if name.endswith(".strength"):
            held.const_value = onnx_ir.tensor(np.array(value, np.float32), name=name)


def test_layers_become_distances_under_their_names() -> None:
    check(
        "euclid{skip=}",
        NET,
        """
        a = mc_opt.EuclidConv(x, a_w, a_b) {dilations=[1, 1], pads=[1, 1, 1, 1], strides=[1, 1]}
        n = BatchNormalization(a, s, b, m, var_v)
        r = Relu(n)
        p = GlobalAveragePool(r)
        f = Flatten(p)
        h = mc_opt.EuclidLinear(f, g_w)
        y = mc_opt.EuclidLinear(h, f_w)
        """,
    )


def test_the_ends_stay_and_bare_layers_are_named() -> None:
    source = model(NET)
    context = passes.Context()
    assert passes.Pipeline.parse("euclid").passes[0].run(source, context) == 1
    assert set(context.log.skips) == {"a_w", "f_w"}
    bare, untrained = context.log.warnings
    assert "no BatchNormalization directly after g_w" in bare
    assert "without training" in untrained


def test_what_no_distance_can_replace() -> None:
    reasons = skipped(
        "euclid{skip=}",
        """
        g (float[2,5] x, float[4,2] t) => (float[3,5] l, float[2,4] s, float[5,4] u, float[1,3] v)
        <float[3,2] left, float[5,4] scaled, float[4,4] turned, float[1,3,2] batch, float[6,3] table,
         int64[1] ids = {0}>
        {
          l = MatMul (left, x)
          s = Gemm <alpha: float = 0.5> (x, scaled)
          q = MatMul (t, x)
          u = Gemm <transA: int = 1> (q, turned)
          v = Gather (table, ids)
        }
        """,
    )
    assert "from the left" in reasons["left"]
    assert "alpha=0.5" in reasons["scaled"]
    assert "transA=1" in reasons["turned"]
    assert "Gather" in reasons["table"]


@pytest.mark.parametrize(("attributes", "bias", "nodes"), [("", "c", 1), ("<beta: float = 0.5>", "c", 3), ("", "d", 2)])
def test_the_bias_of_a_gemm(attributes: str, bias: str, nodes: int) -> None:
    weights = "float[3,4] w, float[4] c, float[1,4] d"
    source = model(f"g (float[2,3] x) => (float[2,4] y) <{weights}> {{ y = Gemm {attributes} (x, w, {bias}) }}")
    changed, _ = apply("euclid{skip=}", source)
    assert len(list(changed.graph)) == nodes
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    w, b = (source.graph.initializers[n].const_value.numpy() for n in ("w", bias))
    want = -0.5 * ((x[:, :, None] - w) ** 2).sum(1) + (0.5 if attributes else 1.0) * b
    np.testing.assert_allclose(ir.Session(changed).run({"x": x})["y"], want, rtol=1e-5, atol=1e-5)


def test_no_strength_is_the_trained_model() -> None:
    """λ = 0 is the plain layer; a BatchNormalization takes a factor back. ONNX Runtime folds that of the plain one."""
    x = {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    for spec in ("euclid{rms=0 skip=}", "euclid{rms=2 skip=}", "euclid{rms=30 skip=}"):
        form = prepared(spec, NET)
        set_strength(form, 0.0)
        assert largest_difference(model(NET), form, x) <= 1e-5


def test_all_strength_is_the_stored_form() -> None:
    x = {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    form = prepared("euclid{skip= rms=8}", NET)
    stored, _ = apply("euclid{skip= rms=8}", model(NET))
    assert largest_difference(form, stored, x) == 0.0
    assert not [name for name in stored.graph.initializers if "strength" in name]


def test_strength_rises_and_then_stays() -> None:
    step = passes.Pipeline.parse("euclid{warm=0.5 skip=}").passes[0]
    form = prepared("euclid{warm=0.5 skip=}", NET)
    assert isinstance(step, passes.TrainablePass)
    for progress, strength in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        assert set(step.settings(form, progress).values()) == {strength}
    assert len(step.settings(form, 0.0)) == 3
    assert set(step.parameters(form)) == {"a_w", "a_b", "s", "b", "g_w", "f_w"}


def test_batch_norm_does_not_fold_into_a_distance() -> None:
    once, _ = apply("euclid{skip=}", model(NET))
    context = passes.Context()
    assert passes.Pipeline.parse("fold-batch-norm").passes[0].run(once, context) == 0
    assert "EuclidConv" in context.log.skips["s"]


def test_weights_can_be_quantised_after_it() -> None:
    for spec in ("euclid{skip=},denseshift{bits=4 skip=}", "euclid{skip=},denseshift{bits=4 terms=2 skip=}"):
        result = check(spec, NET)
        assert "Lookup" in {node.op_type for node in result.graph}


def test_ends_are_found_among_distances() -> None:
    result = passes.run(model(NET), passes.Pipeline.parse("euclid{skip=},denseshift"), passes.Context())
    assert {"a_w", "f_w"} <= set(result.report.passes[1].skips)


def samples(count: int = 8) -> ir.Data:
    rng = np.random.default_rng(0)
    held = [ir.Sample({"x": rng.standard_normal((2, 4, 6, 6)).astype(np.float32)}) for _ in range(count)]
    return ir.Data(lambda: iter(held), count)


def test_eight_bits_compute_in_integers_with_one_scale() -> None:
    source, data = model(NET), samples()
    result = passes.run(source, passes.Pipeline.parse("euclid{bits=8 skip=}"), passes.Context(data=data)).model
    assert lines(ir.nodes_text(result.graph))[:6] == lines(
        """
        a.1 = QuantizeLinear(x, a_w.scale, a_w.zero)
        a.2 = mc_opt.EuclidConvInteger(a.1, a_w.codes) {dilations=[1, 1], pads=[1, 1, 1, 1], strides=[1, 1]}
        a.3 = DequantizeLinear(a.2, a_w.half)
        a.4 = Unsqueeze(a_b, a_b.axes)
        a = Add(a.3, a.4)
        n = BatchNormalization(a, s, b, m, var_v)
        """
    )
    same_in_torch(result)
    floats, _ = apply("euclid{skip=}", source)
    x = next(iter(data)).inputs
    want, got = ir.Session(floats).run(x)["y"], ir.Session(result).run(x)["y"]
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()  # 8 bits of three layers


def test_what_eight_bits_need() -> None:
    assert "the range of its input is not known" in skipped("euclid{bits=8 skip=}", NET)["a_w"]
    text = "g (float[1,32769] x) => (float[1,1] y) <float[32769,1] w> { y = MatMul (x, w) }"
    source, context = model(text), passes.Context(data=ir.Data(lambda: iter(()), 0))
    assert passes.Pipeline.parse("euclid{bits=8 skip=}").passes[0].run(source, context) == 0
    assert "takes 32 bits, int32 has 31" in context.log.skips["w"]


@pytest.mark.tvm
@pytest.mark.slow
@pytest.mark.parametrize("spec", ["euclid{skip=}", "euclid{bits=8 skip=}", "euclid{skip=},denseshift{skip=}"])
def test_the_artefact_computes_the_same(spec: str, tmp_path: Path) -> None:
    source = model(NET.replace("[N,", "[2,"))
    result = passes.run(source, passes.Pipeline.parse(spec), passes.Context(data=samples())).model
    mc_opt.build(result, "x86", tmp_path / "out")
    x = next(iter(samples())).inputs
    want = ir.Session(result).run(x)["y"]
    got = mc_opt.load(tmp_path / "out").run(x)["y"]
    # A code that rounds the other way, where x/s lies between two, moves a sum by a step.
    limit = 1e-5 if "bits" not in spec else 5e-3
    assert np.abs(got - want).max() <= limit * np.abs(want).max()
