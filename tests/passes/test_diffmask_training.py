"""diffmask through the training loop: training meets the budget, and the smaller model is the one that was judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mc_opt
from mc_opt import ir, passes
from tests._harness import model, same_in_torch
from tests.passes.test_binary_training import NET, stripes

pytestmark = [pytest.mark.torch, pytest.mark.slow]
pytest.importorskip("torch")


@pytest.mark.parametrize("spec", ["diffmask", "diffmask{budget=macs}", "diffmask{granularity=weight share=0.3}"])
def test_a_run_removes_what_it_judged(tmp_path: Path, spec: str) -> None:
    data = stripes(tmp_path)
    training = passes.Training(data=data, held_out=data, epochs=20, batch_size=16, lr=1e-2, loss="labels")
    source = model(NET)
    context = passes.Context(training=training)
    result = passes.run(source, passes.Pipeline.parse(spec), context, check="structure")
    report = result.report.passes[-1]
    assert report.training is not None and report.training.epochs[-1].metric is not None
    (note,) = (text for layer, text in report.notes if not layer)
    assert ", 0 of them for the budget" in note, "what was removed was masked"
    ir.verify(result.model)
    held = np.load(data)
    scores = ir.Session(result.model).run({"x": held["x"]})["y"]
    accuracy = float((scores.argmax(1) == held["label"]).mean())
    assert accuracy > 0.9, "and four classes by chance are 0.25"
    assert accuracy == pytest.approx(report.training.epochs[-1].metric, abs=0.01), "stored as it was judged"
    if "weight" not in spec:
        assert passes.size_of(result.model).parameters < passes.size_of(source).parameters
    fixed = result.model.clone()
    ir.fix_shapes(fixed, {"x": (2, 1, 6, 6)})
    same_in_torch(fixed)
    if spec == "diffmask":
        mc_opt.build(fixed, "x86", tmp_path / "artefact")
        got = mc_opt.load(tmp_path / "artefact").run({"x": held["x"][:2]})["y"]
        np.testing.assert_allclose(got, scores[:2], rtol=1e-4, atol=1e-4)


def test_a_rate_of_0_moves_nothing_and_removes_the_share(tmp_path: Path) -> None:
    training = passes.Training(data=stripes(tmp_path), epochs=1, batch_size=64, lr=0.0, loss="labels")
    parsed = passes.Pipeline.parse("diffmask")
    trained = passes.run(model(NET), parsed, passes.Context(training=training), check="structure").report
    assert trained.after == passes.run(model(NET), parsed, passes.Context(), check="structure").report.after


@pytest.mark.parametrize("other", ["denseshift{skip=}", "binary{skip=}"])
def test_channels_are_not_masked_together_with_other_forms(tmp_path: Path, other: str) -> None:
    training = passes.Training(data=stripes(tmp_path), epochs=1, joint=True)
    text = "another pass holds their weights; train it before other passes and not together with them"
    with pytest.raises(passes.PassError, match=text):
        passes.run(
            model(NET), passes.Pipeline.parse(f"diffmask,{other}"), passes.Context(training=training), check="structure"
        )
