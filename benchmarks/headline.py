"""The headline command on every public model: how much is factored, and whether every target says what the export says.

    python -m benchmarks.headline                        sekron,denseshift for onnx, x86 and arm (under qemu)
    python -m benchmarks.headline --only magika ppocr-cls --target onnx,x86

factored = bytes of the eligible weights that `sekron` replaced, over the bytes of all of them. Eligible is every
constant weight of 4,096 elements or more of a Conv with more than one channel a group, a Gemm, a MatMul or a Gather;
LSTM and GRU weights are counted apart. Each artefact is held to max(1e-4 range, 3 r) of the export; export - original
is what the compression costs without training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir

import mc_opt
from tests.models._fetch import fetch_public
from tests.models.catalogue import MODELS, PublicModel
from tests.models.judging import (
    ARTEFACT,
    compiled,
    original,
    ort_runner,
    outputs_of,
    running,
    source_file,
)

PASSES = "sekron,denseshift"
SMALLEST = 4096
FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Coverage:
    """Bytes of the eligible weights, of those that are factored, and of the recurrent weights, which come later."""

    eligible: int
    factored: int
    recurrent: int
    left: tuple[str, ...]

    @property
    def share(self) -> float:
        """The factored share of the eligible bytes."""
        return self.factored / self.eligible if self.eligible else 1.0


def coverage(before: onnx_ir.Model, after: onnx_ir.Model) -> Coverage:
    """Which of the weights of `before` are factors in `after`, by the names that factors take from their weight."""
    eligible = {v.name: v for _, v in _weights(before, _is_eligible)}
    recurrent = {v.name: v for _, v in _weights(before, _is_recurrent)}
    made = {value.name or "" for node in after.graph.all_nodes() for value in node.inputs if value is not None}
    factored = [name for name in eligible if f"{name}.factor1" in made and name not in made]
    return Coverage(
        sum(_bytes(v) for v in eligible.values()),
        sum(_bytes(eligible[name]) for name in factored),
        sum(_bytes(v) for v in recurrent.values()),
        tuple(sorted(name or "?" for name in eligible if name not in factored)),
    )


def _weights(model: onnx_ir.Model, taken: Any) -> Iterator[tuple[onnx_ir.Node, onnx_ir.Value]]:
    for node in model.graph.all_nodes():
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.dtype not in FLOATS:
                continue
            if _size(value) >= SMALLEST and taken(node, index, value):
                yield node, value


def _is_eligible(node: onnx_ir.Node, index: int, value: onnx_ir.Value) -> bool:
    assert value.shape is not None
    match node.op_type:
        case "Conv":
            return index == 1 and int(value.shape[1]) > 1  # type: ignore[call-overload]  # a constant has numbers
        case "Gather":
            return index == 0
        case "Gemm" | "MatMul":
            return index < 2
    return False


def _is_recurrent(node: onnx_ir.Node, index: int, _value: onnx_ir.Value) -> bool:
    return node.op_type in ("LSTM", "GRU", "RNN") and index in (1, 2)


def _size(value: onnx_ir.Value) -> int:
    assert value.const_value is not None
    return math.prod(value.const_value.shape.numpy())


def _bytes(value: onnx_ir.Value) -> int:
    assert value.const_value is not None
    return int(value.const_value.nbytes)


def examine(model: PublicModel, root: Path, passes: str, target: str) -> dict[str, Any]:
    """One model through the command line: coverage, quality, and each artefact beside the export."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = source_file(model, root, folder)
        out = folder / "out"
        start = time.perf_counter()
        done = compiled(model, source, passes, target, out)
        if done.returncode:
            return {"model": model.name, "error": done.stderr.strip().splitlines()[-1:], "code": done.returncode}
        row: dict[str, Any] = {"model": model.name, "seconds": round(time.perf_counter() - start, 1)}
        before, after = mc_opt.load_model(source), mc_opt.load_model(out / "model.onnx")
        if model.specialize:
            before, _ = mc_opt.compress(before, f"specialize{{{model.specialize}}},fold-constants")
        found = coverage(before, after)
        row |= {"factored": found.share, "left": found.left, "recurrent_bytes": found.recurrent}
        unexplained = mc_opt.diff(source, out).unexplained()
        row |= {"unexplained": [str(change) for change in unexplained]}
        reference = original(model, root, source)
        export = outputs_of(model, root, ort_runner(out / "model.onnx"))
        row["quality"] = {k: j.difference / j.spread for k, j in reference.judge(reference.outputs, export, 1).items()}
        for kind in (t for t in ("x86", "arm") if t in target):
            with running(out, kind) as run:
                judged = reference.judge(export, outputs_of(model, root, run), ARTEFACT)
            row[kind] = {k: [j.difference, j.bound] for k, j in judged.items()}
            row[f"{kind}_holds"] = all(j.holds for j in judged.values())
        return row


def holds(row: Mapping[str, Any]) -> bool:
    """Whether a row keeps every bar."""
    return (
        "error" not in row
        and row["factored"] >= 0.8
        and not row["unexplained"]
        and all(row.get(f"{kind}_holds", True) for kind in ("x86", "arm"))
    )


def line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    if "error" in row:
        return f"| {row['model']} | exit {row['code']}: {row['error']} |"
    x86, arm = (_beside_bounds(row, kind) for kind in ("x86", "arm"))
    quality = " ".join(f"{v:.2g}" for v in row["quality"].values())
    return (
        f"| {row['model']} | {'yes' if holds(row) else 'NO'} | {100 * row['factored']:.1f} % | "
        f"{row['recurrent_bytes']} | {quality} | {x86} | {arm} | {len(row['unexplained'])} | "
        f"{row['seconds']} |"
    )


def _beside_bounds(row: Mapping[str, Any], kind: str) -> str:
    return " ".join(f"{difference:.1e}/{bound:.1e}" for difference, bound in row.get(kind, {}).values())


def main() -> int:
    """Print the table; exit 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", default=PASSES)
    parser.add_argument("--target", default="onnx,x86,arm")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--json", type=Path, help="also write the rows here, after each model")
    options = parser.parse_args()
    root = fetch_public()
    print("| model | holds | factored | LSTM/GRU bytes | loss / range | x86 / bound | arm / bound | unexplained | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for model in MODELS:
        if options.only and model.name not in options.only:
            continue
        rows.append(examine(model, root, options.passes, options.target))
        print(line(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(holds(row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
