"""One x86 artefact of a public model for every batch and every length of a sequence, equal to the ONNX export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import mc_opt
from mc_opt import ir
from tests.models.catalogue import MODELS, minilm_of_any_size
from tests.models.inputs import Arrays, text_image
from tests.models.judging import ARTEFACT, artefact_runner, ort_runner

PASSES = "fold-batch-norm,denseshift"

pytestmark = [pytest.mark.models, pytest.mark.tvm, pytest.mark.zig]


@pytest.mark.parametrize("passes", ["", PASSES])
def test_minilm(passes: str, public: Callable[..., Path], tmp_path: Path) -> None:
    root = public(*next(m for m in MODELS if m.name == "minilm").packages)
    _hold(minilm_of_any_size(root), _texts(), passes, tmp_path)
    with pytest.raises(ir.DataError, match="'sequence' is 600, and the model takes at most 512"):
        artefact_runner(tmp_path / "made")({k: np.ones((1, 600), np.int64) for k in ("input_ids", "attention_mask")})


@pytest.mark.parametrize("passes", ["", PASSES])
def test_ppocr_cls(passes: str, public: Callable[..., Path], tmp_path: Path) -> None:
    known = next(m for m in MODELS if m.name == "ppocr-cls")
    source = mc_opt.load_model(known.source(public(*known.packages)), shapes={"x": ("N", 3, 48, 192)})
    lines = [text_image(f"Line {k}", 48, 192, flip=k % 2 == 1) for k in range(13)]
    _hold(source, ({"x": np.stack(lines[:n])} for n in (1, 6, 13)), passes, tmp_path)


def _texts() -> Iterator[Arrays]:
    rng = np.random.default_rng(0)
    for batch in (1, 3, 8):
        for length in (1, 7, 64, 200):
            mask = np.ones((batch, length), np.int64)
            for row in range(batch):
                mask[row, max(1, length - 5 * row) :] = 0
            yield {"input_ids": rng.integers(0, 30522, (batch, length)), "attention_mask": mask}


def _hold(source: object, cases: Iterator[Arrays], passes: str, out: Path) -> None:
    """Build one artefact and hold it to its export, within max(1e-4 range, 3 r) of the original over all cases."""
    feeds = list(cases)
    ir.save_model(source, out / "source.onnx")  # type: ignore[arg-type]
    made, _ = mc_opt.compress(source, passes) if passes else (source, None)  # type: ignore[arg-type]
    mc_opt.build(made, "x86", out / "made")
    runs = [ort_runner(out / "source.onnx"), ort_runner(out / "source.onnx", optimise=False)]
    runs += [ort_runner(out / "made" / "model.onnx"), artefact_runner(out / "made")]
    (name,) = runs[0](feeds[0])
    plain, unoptimised, export, artefact = ([run(feed)[name].astype(np.float64) for feed in feeds] for run in runs)
    spread = max(a.max() for a in plain) - min(a.min() for a in plain)
    noise = _largest(plain, unoptimised)
    assert [a.shape for a in artefact] == [a.shape for a in export]
    assert _largest(export, artefact) <= max(ARTEFACT * spread, 3 * noise)


def _largest(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))
