"""Drift is measured on what a training holds out, where no other data was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mc_opt
from mc_opt import passes
from mc_opt.passes._train_data import open_source, split
from mc_opt.tools import driver
from tests._harness import model
from tests.passes.test_train import NET, patterns


def told(data: Any, **options: Any) -> tuple[passes.Report, dict[str, Any]]:
    """A run of a pass that is not trained before one that is; the report, and the drift of the first."""
    training = passes.Training(data=data, **({"epochs": 1, "loss": "labels", "batch_size": 16} | options))
    report = passes.run(
        model(NET), passes.Pipeline.parse("fold-batch-norm,fine-tune"), passes.Context(training=training, seed=3)
    ).report
    return report, report.passes[0].drift["reference"]


def test_drift_is_measured_on_held_out_samples(tmp_path: Path) -> None:
    data, other = patterns(tmp_path), patterns(tmp_path, 80, seed=1)
    for options, count in (({"holdout": 0.25}, 16), ({"held_out": other}, 64)):
        report, drift = told(data, **options)
        assert drift["samples"] == count and drift["accuracy_reference"] is not None
        assert not any("random inputs" in warning for warning in report.warnings)
        assert any(f"on {count} held-out samples" in check for check in report.checks)


def test_they_are_those_that_are_not_trained_on(tmp_path: Path) -> None:
    path = patterns(tmp_path)
    _, rest = split(open_source(path, model(NET), batchable=True), 0.25, 3)
    judged = passes.held_out_samples(passes.Training(data=path, holdout=0.25), model(NET), seed=3, states={})
    assert judged is not None and len(judged) == 16
    ((part,),) = rest.batches(batch_size=64, seed=0, epoch=0, shuffle=False)
    np.testing.assert_array_equal(np.concatenate([s.inputs["x"] for s in judged]), part.inputs["x"].numpy())


def test_what_random_sizes_do_not_fit_is_checked_and_written(tmp_path: Path) -> None:
    text = """frames (float[N,S,4] x) => (float[N,20] y) <float[4,4] w, int64[2] row = {-1, 20}>
    { h = MatMul (x, w)  y = Reshape (h, row) }"""
    mc_opt.save_model(model(text), tmp_path / "frames.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((20, 5, 4)).astype(np.float32))
    training = passes.Training(data=tmp_path / "x.npz", epochs=1)
    request = driver.Request(
        tmp_path / "frames.onnx", pipeline=passes.Pipeline.parse("fine-tune"), training=training, out=tmp_path / "out"
    )
    report = driver.compile_model(request).report
    assert not report.unchecked and report.passes[0].drift["reference"]["samples"] == 2


@pytest.mark.parametrize("options", [{"holdout": 0.0}, {"holdout": 0.001}])
def test_without_any_it_is_random_inputs_and_said(tmp_path: Path, options: dict[str, Any]) -> None:
    report, drift = told(patterns(tmp_path), **options)
    assert drift["samples"] == 8 and any("random inputs" in warning for warning in report.warnings)
