"""Every public model through `mc-opt`, as a user runs it: outputs before, after and in the artefact, and the bounds.

    python -m benchmarks.public_models                              exact passes, ONNX only
    python -m benchmarks.public_models --passes fold-batch-norm,denseshift --target x86

Per output it prints |a-b| beside the allowed difference: max(1e-5 range, 3 r) for exact passes against the original,
max(1e-4 range, 3 r) for the artefact against the export. range = max - min of the original's output over all inputs;
r = the original's own difference in ONNX Runtime with graph optimisation off and on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import mc_opt
from tests.models._fetch import fetch_public
from tests.models.catalogue import MODELS, Arrays, PublicModel

EXACT, ARTEFACT = 1e-5, 1e-4
Runner = Callable[[Arrays], Arrays]


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


def command(model: PublicModel, source: Path, passes: str, target: str, out: Path) -> list[str]:
    """The command line a user would type."""
    if model.specialize:
        passes = f"specialize{{{model.specialize}}},fold-constants,{passes}"
    shapes = [f"--shape={name}={'x'.join(map(str, dims))}" for name, dims in model.shapes.items()]
    mc = str(Path(sys.executable).with_name("mc-opt"))
    return [mc, str(source), "--passes", passes, "--target", target, *shapes, "-o", str(out)]


def weight_ratio(report: dict[str, Any]) -> float | None:
    """Stored bytes of the rewritten layers over their fp32 bytes."""
    layers = [layer for layer in report["layers"] if layer["bytes_after"] < layer["bytes_before"]]
    before = sum(layer["bytes_before"] for layer in layers)
    return sum(layer["bytes_after"] for layer in layers) / before if before else None


def examine(model: PublicModel, root: Path, passes: str, target: str) -> dict[str, Any]:
    """One model through the command line, and all its comparisons."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = source_file(model, root, folder)
        out = folder / "out"
        start = time.perf_counter()
        done = subprocess.run(command(model, source, passes, target, out), capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            return {"model": model.name, "error": done.stderr.strip().splitlines()[-1:], "code": done.returncode}
        original = outputs_of(model, root, ort_runner(source))
        noise = largest_difference(original, outputs_of(model, root, ort_runner(source, optimise=False)))
        spread = {k: float(v.max() - v.min()) for k, v in original.items()}
        export = outputs_of(model, root, ort_runner(out / "model.onnx"))
        row: dict[str, Any] = {"model": model.name, "seconds": round(seconds, 1), "range": spread, "r": noise}
        row["export_vs_original"] = largest_difference(original, export)
        row["exact"] = all(
            difference <= max(EXACT * spread[k], 3 * noise[k]) for k, difference in row["export_vs_original"].items()
        )
        report = json.loads((out / "report.json").read_text())
        row["weight_ratio"] = weight_ratio(report)
        if "x86" in target:
            row["artefact_vs_export"] = largest_difference(export, outputs_of(model, root, artefact_runner(out)))
            row["artefact_equal"] = all(
                difference <= max(ARTEFACT * spread[k], 3 * noise[k])
                for k, difference in row["artefact_vs_export"].items()
            )
        return row


def line(row: dict[str, Any], *, lossy: bool) -> str:
    """One row of the table."""
    if "error" in row:
        return f"| {row['model']} | exit {row['code']}: {row['error']} |"
    show = lambda values: " ".join(f"{v:.1e}" for v in values.values())  # noqa: E731 - used in place
    verdict = row.get("artefact_equal", True) and (lossy or row["exact"])
    ratio = "-" if row["weight_ratio"] is None else f"{row['weight_ratio']:.4f}"
    return (
        f"| {row['model']} | {'yes' if verdict else 'NO'} | {show(row['range'])} | {show(row['r'])} | "
        f"{show(row['export_vs_original'])} | {show(row.get('artefact_vs_export', {}))} | {ratio} | {row['seconds']} |"
    )


def main() -> int:
    """Print the table; exit 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", default="fold-constants,fold-batch-norm")
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    root = fetch_public()
    lossy = "denseshift" in options.passes
    print("| model | within | range | r | export - original | artefact - export | weight bytes | s |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for model in MODELS:
        if options.only and model.name not in options.only:
            continue
        rows.append(examine(model, root, options.passes, options.target))
        print(line(rows[-1], lossy=lossy), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    failed = [r for r in rows if "error" in r or not r.get("artefact_equal", True) or not (lossy or r["exact"])]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
