"""Exact passes on the public models: outputs stay, on real inputs; every BatchNormalization is folded or declined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

import mc_opt
from tests.models.catalogue import MODELS, PublicModel
from tests.models.judging import (
    EXACT,
    compiled,
    largest_difference,
    original,
    ort_runner,
    outputs_of,
    report_of,
    source_file,
)

PASSES = "fold-constants,fold-batch-norm"
# Small to fetch and quick to run; together with those of test_artefacts.py 90 seconds at most.
CI = ("magika", "ppocr-cls", "silero-16k-op15")
# BatchNormalization nodes of the models as they come, counted in the files.
BATCH_NORMS = {"efficientnet-lite0": 49, "ppocr-cls": 35, "ppocr-det": 3, "ppocr-rec": 6}

pytestmark = pytest.mark.models


def _parameters(*, only_open: bool = False) -> list[object]:
    return [
        pytest.param(model, id=model.name, marks=[pytest.mark.ci] if model.name in CI and not only_open else [])
        for model in MODELS
        if not only_open or model.shapes or model.specialize
    ]


def _batch_norms(path: Path) -> int:
    model = mc_opt.load_model(path)
    return sum(isinstance(n, onnx_ir.Node) and n.op_type == "BatchNormalization" for n in model.graph.all_nodes())


@pytest.mark.parametrize("model", _parameters())
def test_outputs_stay_equal(model: PublicModel, public: Callable[..., Path], tmp_path: Path) -> None:
    root = public(*model.packages)
    source = source_file(model, root, tmp_path)
    done = compiled(model, source, PASSES, "onnx", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    reference = original(model, root, source)
    assert min(len(values) for values in reference.outputs.values()) >= 8
    export = outputs_of(model, root, ort_runner(tmp_path / "out/model.onnx"))
    judged = reference.judge(reference.outputs, export, EXACT)
    print(model.name, judged)
    assert all(output.holds for output in judged.values()), judged
    folded = next(p for p in report_of(tmp_path / "out")["passes"] if p["name"] == "fold-batch-norm")
    assert folded["rewrites"] + len(folded["skips"]) == BATCH_NORMS.get(model.name, 0)
    assert _batch_norms(tmp_path / "out/model.onnx") == len(folded["skips"])
    assert all(folded["skips"].values())


@pytest.mark.parametrize("model", _parameters(only_open=True))
def test_outputs_stay_equal_with_open_shapes(model: PublicModel, public: Callable[..., Path], tmp_path: Path) -> None:
    root = public(*model.packages)
    source = source_file(model, root, tmp_path)
    done = compiled(model, source, PASSES, "onnx", tmp_path / "out", as_it_came=True)
    assert done.returncode == 0, done.stderr
    reference = original(model, root, source)
    export = outputs_of(model, root, ort_runner(tmp_path / "out/model.onnx"))
    judged = reference.judge(reference.outputs, export, EXACT)
    assert all(output.holds for output in judged.values()), judged


def test_a_difference_is_seen() -> None:
    a = {"y": np.array([0.0, 1.0])}
    assert largest_difference(a, {"y": np.array([0.0, 1.5])}) == {"y": 0.5}
    assert largest_difference(a, {"y": np.array([0.0, np.nan])}) == {"y": np.inf}
