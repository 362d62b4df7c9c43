"""Drift is measured on what a training holds out, where no other data was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_opt import passes
from mc_opt.passes._held_out import held_out_samples
from mc_opt.passes._train_data import open_source, split
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
    judged = held_out_samples(passes.Training(data=path, holdout=0.25), model(NET), 3)
    assert judged is not None and len(judged) == 16
    ((part,),) = rest.batches(batch_size=64, seed=0, epoch=0, shuffle=False)
    np.testing.assert_array_equal(np.concatenate([s.inputs["x"] for s in judged]), part.inputs["x"].numpy())


@pytest.mark.parametrize("options", [{"holdout": 0.0}, {"holdout": 0.001}])
def test_without_any_it_is_random_inputs_and_said(tmp_path: Path, options: dict[str, Any]) -> None:
    report, drift = told(patterns(tmp_path), **options)
    assert drift["samples"] == 8 and any("random inputs" in warning for warning in report.warnings)
