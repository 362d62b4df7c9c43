"""ARM artefacts of public models, run under qemu: equal to the ONNX export on real inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.catalogue import MODELS, PublicModel
from tests.models.judging import ARTEFACT, compiled, original, ort_runner, outputs_of, running, source_file

PASSES = "fold-batch-norm,denseshift"
NAMES = ("minilm", "magika", "ppocr-cls", "silero-16k-op15")
CI = ("ppocr-cls",)

pytestmark = [pytest.mark.models, pytest.mark.qemu, pytest.mark.tvm, pytest.mark.zig]


@pytest.mark.parametrize(
    ("model", "form"),
    [
        pytest.param(m, form, id=f"{m.name}-{form}", marks=[pytest.mark.ci] if m.name in CI and form == "vm" else [])
        for m in MODELS
        if m.name in NAMES
        for form in ("vm", "static")
    ],
)
def test_artefact_equals_export(model: PublicModel, form: str, public: Callable[..., Path], tmp_path: Path) -> None:
    root = public(*model.packages)
    source = source_file(model, root, tmp_path)
    out = tmp_path / "out"
    done = compiled(model, source, PASSES, f"arm{{form={form}}}", out)
    assert done.returncode == 0, done.stderr
    export = outputs_of(model, root, ort_runner(out / "model.onnx"))
    with running(out, "arm") as run:
        artefact = outputs_of(model, root, run)
    assert min(len(values) for values in artefact.values()) >= 8
    judged = original(model, root, source).judge(export, artefact, ARTEFACT)
    assert all(output.holds for output in judged.values()), judged
