"""The diff of every public model and its compressed form: each change has its pass and rule, saving changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mc_opt
from tests.models.catalogue import MODELS, PublicModel
from tests.models.judging import compiled, source_file

PASSES = "fold-batch-norm,denseshift"
CI = ("magika", "ppocr-cls", "silero-16k-op15")
LIMIT = 3.0
"""Seconds for the largest of them, with room: the longest measured was 0.3 s."""

pytestmark = pytest.mark.models


def _parameters() -> list[object]:
    """Every model with its shapes fixed, and as it came where that is something else."""
    return [
        pytest.param(
            model, as_it_came, id=model.name + "-open" * as_it_came, marks=[pytest.mark.ci] if model.name in CI else []
        )
        for model in MODELS
        for as_it_came in ((False, True) if model.shapes or model.specialize else (False,))
    ]


@pytest.mark.parametrize(("model", "as_it_came"), _parameters())
def test_every_change_has_its_pass_and_rule(
    model: PublicModel, as_it_came: bool, public: Callable[..., Path], tmp_path: Path
) -> None:
    source = source_file(model, public(*model.packages), tmp_path)
    done = compiled(model, source, PASSES, "onnx", tmp_path / "out", as_it_came=as_it_came)
    assert done.returncode == 0, done.stderr
    before = mc_opt.load_model(source)
    after = mc_opt.load_model(tmp_path / "out/model.onnx")
    start = time.process_time()
    found = mc_opt.diff(before, after)
    assert time.process_time() - start < LIMIT
    assert not found.equal and found.unexplained() == ()
    assert {origin.made_by for change in found.changes for origin in change.by} <= {
        "--shape", "specialize", "fold-constants", "fold-batch-norm", "denseshift"
    }  # fmt: skip
    mc_opt.save_model(after, tmp_path / "again")
    again = mc_opt.diff(after, tmp_path / "again")
    assert again.equal and not again.renames
    assert sum(layer.after.bytes for layer in found.layers if layer.after) == found.after.bytes
    assert sum(layer.before.bytes for layer in found.layers if layer.before) == found.before.bytes
