"""What holds for every trained pass, found by its file: it trains, converts, exports, and runs the same everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mc_opt
from mc_opt import ir, passes
from tests._harness import model, to_bytes
from tests.passes.test_train import patterns

NET = """
net (float[N,1,6,6] x) => (float[N,4] y)
<float[16,1,3,3] stem_w, float[16] s1, float[16] b1, float[16] m1, float[16] var1,
 float[32,16,3,3] wide_w, float[32] s2, float[32] b2, float[32] m2, float[32] var2,
 float[32,32,3,3] deep_w, float[32] s3, float[32] b3, float[32] m3, float[32] var3, float[4,32] head_w>
{
  c1 = Conv <pads: ints = [1,1,1,1]> (x, stem_w)
  n1 = BatchNormalization (c1, s1, b1, m1, var1)
  r1 = Relu (n1)
  c2 = Conv <pads: ints = [1,1,1,1]> (r1, wide_w)
  n2 = BatchNormalization (c2, s2, b2, m2, var2)
  r2 = Relu (n2)
  c3 = Conv <pads: ints = [1,1,1,1]> (r2, deep_w)
  n3 = BatchNormalization (c3, s3, b3, m3, var3)
  r3 = Relu (n3)
  p = GlobalAveragePool (r3)
  f = Flatten (p)
  y = Gemm <transB: int = 1> (f, head_w)
}
"""
METHODS = ("bc", "pc", "pcpp", "bnnpp", "bnnplus", "foothill")
# Options under which a small network has something for the pass; the others are found by their names.
SPECS = {
    "sekron": ["sekron{ratio=0.3}"],
    "kron": ["kron{ratio=0.3}"],
    "binary": [*(f"binary{{method={m}}}" for m in METHODS), "binary{activations=true}"],
    "diffmask": [f"diffmask{{granularity={g}}}" for g in ("filter", "weight")],
}
TRAINED = [n for n in passes.pass_names() if issubclass(passes.find_pass(n), passes.TrainablePass)]
CASES = [spec for name in TRAINED for spec in SPECS.get(name, [name])]
BUILT = {name: SPECS.get(name, [name])[-1] for name in TRAINED}


def trained(spec: str, folder: Path) -> tuple[object, passes.Report]:
    training = passes.Training(
        data=patterns(folder), epochs=2, batch_size=16, loss="labels,output", holdout=0.25, parameters=("all",)
    )
    ctx = passes.Context(training=training)
    result = passes.run(model(NET), passes.Pipeline.parse(spec), ctx)
    return result.model, result.report


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("spec", CASES)
def test_it_trains_converts_and_runs_the_same_in_torch(tmp_path: Path, spec: str) -> None:
    made, report = trained(spec, tmp_path)
    assert report.passes[0].training is not None and report.passes[0].training.steps == 6
    assert not [n for n in made.graph if n.domain == "mc_opt" and ir.find_op(n.op_type).training_form]
    mc_opt.save_model(made, tmp_path / "made.onnx")
    stored = mc_opt.load_model(tmp_path / "made.onnx")
    with np.load(tmp_path / "patterns0.npz") as file:
        expected = ir.Session(stored).run({"x": file["x"]})["y"]
        value = ir.run_module(mc_opt.to_torch(stored), {"x": file["x"]})["y"].detach().numpy()
    # Sums of a few hundred terms in another order; a sign or a step whose input is 0 but for rounding may turn.
    np.testing.assert_allclose(value, expected, atol=1e-4 * np.ptp(expected))


@pytest.mark.slow
# A training this short leaves masks above their budget, which convert then meets.
@pytest.mark.parametrize("spec", [spec for spec in CASES if "diffmask" not in spec])
def test_the_figures_on_held_out_samples_are_those_of_what_is_stored(tmp_path: Path, spec: str) -> None:
    made, report = trained(spec, tmp_path)
    told = report.passes[0].training
    assert told is not None and told.metric == "accuracy"
    source = passes.Training(data=tmp_path / "patterns0.npz")
    with np.load(source.data) as file:
        right = ir.Session(made).run({"x": file["x"]})["y"].argmax(1) == file["label"]
    order = np.random.default_rng(0).permutation(64)
    assert told.epochs[-1].metric == pytest.approx(float(right[np.sort(order[:16])].mean()))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    assert to_bytes(trained("binary", tmp_path)[0]) == to_bytes(trained("binary", tmp_path)[0])


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.tvm
@pytest.mark.parametrize("name", TRAINED)
def test_the_x86_artefact_is_the_export(tmp_path: Path, name: str) -> None:
    made, _ = trained(BUILT[name], tmp_path)
    mc_opt.build(made, "x86", tmp_path / "out", shapes={"x": (1, 1, 6, 6)})
    artefact = mc_opt.load(tmp_path / "out", target="x86")
    session = ir.Session(tmp_path / "out" / "model.onnx")
    with np.load(tmp_path / "patterns0.npz") as file:
        for x in file["x"][:8]:
            expected = session.run({"x": x[None]})["y"]
            np.testing.assert_allclose(artefact.run({"x": x[None]})["y"], expected, atol=1e-4 * np.ptp(expected))
