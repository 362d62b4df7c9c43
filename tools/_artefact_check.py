"""An artefact held to the ONNX file that it was built from, on the machine that built it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

from mc_opt import ir

if TYPE_CHECKING:
    import numpy as np

    from mc_opt import targets
    from mc_opt.tools.driver import Request

# Kernels sum in other orders than ONNX Runtime, over many layers.
_SHARE = 1e-4
# Each takes one run of the artefact and one in ONNX Runtime.
_SAMPLES = 4

Inputs = dict[str, "np.ndarray"]


def first_samples(request: Request, model: onnx_ir.Model, data: ir.Data | None, count: int = _SAMPLES) -> list[Inputs]:
    """Inputs of the first samples, random ones where there are none; of a model with states, of the first step."""
    names = {str(value.name) for value in model.graph.inputs}
    count = 1 if request.states else count
    source = ir.seeded_data(model, count, request.seed) if data is None else data
    return [{k: v for k, v in sample.inputs.items() if k in names} for sample in itertools.islice(source, count)]


def drift_of(artefact: targets.Artefact, path: Path, samples: Sequence[Inputs]) -> ir.Drift:
    """How far the artefact's outputs are from those of the ONNX file at `path` in ONNX Runtime.

    Raises:
        IRError: one of the two fails.
    """
    session = ir.Session(path)
    meter = ir.DriftMeter()
    for inputs in samples:
        meter.add(session.run(inputs), artefact.run(inputs))
    return meter.result()


def complaint(drift: ir.Drift, path: Path, samples: Sequence[Inputs]) -> str | None:
    """What differs by more than the rounding of kernels and of ONNX Runtime itself; None when nothing does."""
    if drift.unmatched == 0 and drift.relative is not None and drift.relative <= _SHARE:
        return None
    verdict = ir.judge(drift, ir.noise(path, samples), share=_SHARE)
    return None if verdict.ok else "; ".join(str(output) for output in verdict.outputs if not output.ok)
