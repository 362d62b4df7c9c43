"""Every public model through `mc-opt`, as a user runs it: outputs before, after and in the artefact, and the bounds.

    python -m benchmarks.public_models                              exact passes, ONNX only
    python -m benchmarks.public_models --passes fold-batch-norm,denseshift --target x86
    python -m benchmarks.public_models --passes fold-batch-norm,denseshift --target arm     under qemu, minutes a model

Per output it prints |a-b| beside the allowed difference: max(1e-5 range, 3 r) for exact passes against the original,
max(1e-4 range, 3 r) for the artefact against the export. range = max - min of the original's output over all inputs;
r = the original's own difference in ONNX Runtime with graph optimisation off and on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.models._fetch import fetch_public
from tests.models.catalogue import MODELS, PublicModel
from tests.models.judging import (
    ARTEFACT,
    EXACT,
    Judged,
    compiled,
    original,
    ort_runner,
    outputs_of,
    report_of,
    running,
    source_file,
    weight_ratio,
)


def examine(model: PublicModel, root: Path, passes: str, target: str) -> dict[str, Any]:
    """One model through the command line, and all its comparisons."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = source_file(model, root, folder)
        out = folder / "out"
        start = time.perf_counter()
        done = compiled(model, source, passes, target, out)
        seconds = time.perf_counter() - start
        if done.returncode:
            return {"model": model.name, "error": done.stderr.strip().splitlines()[-1:], "code": done.returncode}
        reference = original(model, root, source)
        export = outputs_of(model, root, ort_runner(out / "model.onnx"))
        judged = reference.judge(reference.outputs, export, EXACT)
        row: dict[str, Any] = {
            "model": model.name,
            "seconds": round(seconds, 1),
            "range": {k: j.spread for k, j in judged.items()},
            "r": dict(reference.noise),
            "weight_ratio": weight_ratio(report_of(out)),
        }
        row |= _compared("export_vs_original", "exact", judged)
        built = next((kind for kind in ("x86", "arm") if kind in target), None)
        if built:
            with running(out, built) as run:
                artefact = outputs_of(model, root, run)
            row |= _compared("artefact_vs_export", "artefact_equal", reference.judge(export, artefact, ARTEFACT))
        return row


def _compared(what: str, verdict: str, judged: Mapping[str, Judged]) -> dict[str, Any]:
    return {what: {k: j.difference for k, j in judged.items()}, verdict: all(j.holds for j in judged.values())}


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
