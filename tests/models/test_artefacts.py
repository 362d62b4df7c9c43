"""x86 artefacts of the public models: equal to the ONNX export on real inputs, weights packed to 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir
import pytest

import mc_opt
from tests.models.catalogue import MODELS, PublicModel
from tests.models.judging import (
    ARTEFACT,
    artefact_runner,
    compiled,
    original,
    ort_runner,
    outputs_of,
    report_of,
    source_file,
    weight_ratio,
)

PASSES = "fold-batch-norm,denseshift"
# Small to fetch and quick to build; together with those of test_exact_passes.py 90 seconds at most.
CI = ("magika", "ppocr-cls", "silero-16k-op15")
# 4 bits are 0.125 of fp32; the rest is for scales and codebooks.
WEIGHTS = 0.16

pytestmark = [pytest.mark.models, pytest.mark.tvm, pytest.mark.zig]


@pytest.mark.parametrize(
    "model", [pytest.param(m, id=m.name, marks=[pytest.mark.ci] if m.name in CI else []) for m in MODELS]
)
def test_artefact_equals_export(model: PublicModel, public: Callable[..., Path], tmp_path: Path) -> None:
    root = public(*model.packages)
    source = source_file(model, root, tmp_path)
    out = tmp_path / "out"
    done = compiled(model, source, PASSES, "x86", out)
    assert done.returncode == 0, done.stderr
    export = outputs_of(model, root, ort_runner(out / "model.onnx"))
    artefact = outputs_of(model, root, artefact_runner(out))
    assert min(len(values) for values in artefact.values()) >= 8
    judged = original(model, root, source).judge(export, artefact, ARTEFACT)
    print(model.name, judged)
    assert all(output.holds for output in judged.values()), judged
    ratio = weight_ratio(report_of(out))
    assert ratio is not None and ratio <= WEIGHTS, ratio
    _check_specialised(model, out)


def _check_specialised(model: PublicModel, out: Path) -> None:
    """With its input fixed silero has no If, and its LSTM's weights, written out as MatMul or not, are packed."""
    if not model.specialize:
        return
    nodes = [node for node in mc_opt.load_model(out / "model.onnx").graph.all_nodes() if isinstance(node, onnx_ir.Node)]
    assert "If" not in {node.op_type for node in nodes}
    for node in (n for n in nodes if n.op_type == "LSTM"):
        producers = [node.inputs[i].producer() for i in (1, 2) if node.inputs[i] is not None]  # type: ignore[union-attr]
        assert [p.op_type for p in producers if p is not None] == ["Lookup", "Lookup"]
