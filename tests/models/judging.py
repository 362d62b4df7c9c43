"""How outputs of a public model are judged: before and after passes and in the artefact, each beside its bound.

max(1e-5 range, 3 r) holds for exact passes against the original, max(1e-4 range, 3 r) for the artefact against the
export. range = max - min of the original's output over all inputs; r = the original's own difference in ONNX Runtime
with graph optimisation off and on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import mc_opt
from tests import _qemu
from tests.models.catalogue import PublicModel
from tests.models.inputs import Arrays

EXACT, ARTEFACT = 1e-5, 1e-4
Runner = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Judged:
    """One output: its largest difference, its spread over the inputs, the original's own difference r, the bound."""

    difference: float
    spread: float
    noise: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound."""
        return self.difference <= self.bound


@dataclass(frozen=True)
class Original:
    """The model as it came: its outputs over all inputs, and its own difference without graph optimisation."""

    outputs: Mapping[str, np.ndarray]
    noise: Mapping[str, float]

    def judge(self, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], tolerance: float) -> dict[str, Judged]:
        """The difference of `a` and `b`, output by output, beside max(tolerance range, 3 r)."""
        judged = {}
        for name, difference in largest_difference(a, b).items():
            spread, noise = _spread(self.outputs[name]), self.noise[name]
            judged[name] = Judged(difference, spread, noise, max(tolerance * spread, 3 * noise))
        return judged


def original(model: PublicModel, root: Path, source: Path) -> Original:
    """Run the model as it came, with graph optimisation on and off."""
    outputs = outputs_of(model, root, ort_runner(source))
    return Original(outputs, largest_difference(outputs, outputs_of(model, root, ort_runner(source, optimise=False))))


def ort_runner(path: Path, *, optimise: bool = True) -> Runner:
    """Run `path` in ONNX Runtime, one thread; inputs the model does not have are left out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {i.name for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    return lambda feed: dict(
        zip(outputs, session.run(None, {k: v for k, v in feed.items() if k in inputs}), strict=True)
    )


def artefact_runner(folder: Path) -> Runner:
    """Run the x86 artefact of an output folder."""
    artefact = mc_opt.load(folder, target="x86")
    inputs = {port.name for port in artefact.inputs}
    return lambda feed: artefact.run({k: v for k, v in feed.items() if k in inputs})


@contextmanager
def running(out: Path, target: str) -> Iterator[Runner]:
    """The artefact of an output folder as a function: x86 in this process, arm under qemu."""
    if target != "arm":
        yield artefact_runner(out)
        return
    with _qemu.artefact(out / "arm") as run:
        yield run


def outputs_of(model: PublicModel, root: Path, run: Runner) -> dict[str, np.ndarray]:
    """All outputs over all inputs, states carried within a sequence: {output: [inputs, ...]}."""
    collected: dict[str, list[np.ndarray]] = {}
    for sequence in model.sequences(root):
        carried: Arrays = {}
        for step in sequence:
            result = run({**carried, **step})
            carried = {state: result[output] for output, state in model.states.items()}
            for name, value in result.items():
                collected.setdefault(name, []).append(value)
    return {name: np.stack(values) for name, values in collected.items()}


def largest_difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Max |a - b| per output, in double precision; NaN counts as infinite."""
    return {k: float(np.nan_to_num(np.abs(a[k].astype(np.float64) - b[k]), nan=np.inf).max()) for k in a}


def source_file(model: PublicModel, root: Path, folder: Path) -> Path:
    """The model as a file; a captured one is saved first."""
    source = model.source(root)
    if isinstance(source, Path):
        return source
    mc_opt.save_model(source, folder / "source")
    return folder / "source" / "model.onnx"


def compiled(
    model: PublicModel, source: Path, passes: str, target: str, out: Path, *, as_it_came: bool = False
) -> subprocess.CompletedProcess[str]:
    """What the command line does that a user would type.

    Args:
        model: says which shapes are fixed and which input is specialised.
        source: the model's file.
        passes: what `--passes` says behind that.
        target: what `--target` says.
        out: the output folder.
        as_it_came: leave shapes symbolic and specialise nothing.
    """
    shapes: list[str] = []
    if not as_it_came:
        shapes = [f"--shape={name}={'x'.join(map(str, dims))}" for name, dims in model.shapes.items()]
        if model.specialize:
            passes = f"specialize{{{model.specialize}}},fold-constants,{passes.removeprefix('fold-constants,')}"
    mc = str(Path(sys.executable).with_name("mc-opt"))
    command = [mc, str(source), "--passes", passes, "--target", target, *shapes, "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def report_of(out: Path) -> dict[str, Any]:
    """The report of an output folder."""
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def weight_ratio(report: Mapping[str, Any]) -> float | None:
    """Stored bytes of the rewritten layers over their fp32 bytes; None when no layer became smaller."""
    layers = [layer for layer in report["layers"] if layer["bytes_after"] < layer["bytes_before"]]
    before = sum(layer["bytes_before"] for layer in layers)
    return sum(layer["bytes_after"] for layer in layers) / before if before else None


def _spread(values: np.ndarray) -> float:
    return float(values.max() - values.min())
