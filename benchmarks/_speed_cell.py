"""One model at one number of threads, measured in a process of its own: `python -m benchmarks._speed_cell REQUEST`.

Prints JSON, one object a line: {"progress": [done, total, what]} and in the end {"cell": ...}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _speed_forms as forms
from benchmarks import _speed_kernels as kernels
from benchmarks import _speed_machine as machine
from benchmarks._speed_forms import Request
from benchmarks._speed_models import MODELS, Timed
from mc_opt.tools import _timing

_TRIAL = 5  # rounds that choose the fastest quantised form
_REST = 0.01  # seconds that the threads of a pool spin after its work; they would take a core from the next contender


def tell(done: int, total: int, what: str) -> None:
    """Report progress to the parent."""
    print(json.dumps({"progress": [done, total, what]}), flush=True)


def measure(request: Request) -> dict[str, Any]:
    """Everything that is known of the cell, as JSON holds it."""
    model = next(m for m in MODELS if m.name == request.model)
    folder = request.folder
    reasons = _make(model, request, folder)
    limits = machine.measure(request.threads, Path(request.cache), reads=request.beside)
    opened = _open(request, model, reasons)
    reference = opened[forms.FLOAT].outputs()
    differences = {name: _difference(reference, contender.outputs()) for name, contender in opened.items()}
    runs = {name: contender.run for name, contender in opened.items()}
    series = _timing.interleave(
        runs,
        rounds=request.rounds,
        clock=time.process_time if request.processor_time else time.perf_counter,
        before=lambda name: _settle(runs[name], request.threads),
        progress=tell,
    )
    contenders: dict[str, Any] = {}
    for name, contender in opened.items():
        contenders[name] = {
            "ms": list(series[name].milliseconds),
            "detail": contender.detail,
            "difference": differences[name],
        }
    if request.beside:
        for name, entry in contenders.items():
            tell(0, 0, f"memory of {name}")
            entry["memory"] = _memory(name, request)
    found: dict[str, Any] = {}
    # Once more: what else runs for a moment can make one thread look slow, and the gain of two too large.
    limits = limits.best(machine.measure(request.threads, Path(request.cache), reads=request.beside))
    if request.beside and request.threads == 1:
        for form in (forms.DENSE, forms.COMPRESSED):
            if form in contenders:
                tell(0, 0, f"kernels of {form}")
                found[form] = _kernels(form, request, limits)
    return {
        "model": model.name,
        "threads": request.threads,
        "clock": "processor" if request.processor_time else "wall",
        "load": os.getloadavg()[0],
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": limits.to_json(),
        "contenders": contenders,
        "reasons": reasons,
        "kernels": found,
    }


def _make(model: Timed, request: Request, folder: Path) -> dict[str, str]:
    """Write what is not there yet, or was made by other code; returns why a form is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.json"
    key = forms.fingerprint(forms.SOURCES)
    kept = json.loads(sources.read_text()) if sources.is_file() else {}
    if kept.get("fingerprint") != key:
        tell(0, 0, "graph and quantised forms")
        kept = {"fingerprint": key, "reasons": forms.make_sources(model, Path(request.root), folder)}
        sources.write_text(json.dumps(kept))
    reasons: dict[str, str] = dict(kept["reasons"])
    key = forms.fingerprint(forms.ARTEFACTS)
    for form, threads in _artefacts(model, request.threads):
        place = forms.artefact_folder(folder, form, threads)
        stamp = place.with_suffix(".fingerprint")
        if stamp.is_file() and stamp.read_text() == key:
            continue
        tell(0, 0, f"build {form}")
        stamp.unlink(missing_ok=True)
        try:
            forms.make_artefact(request, form, threads)
        except Exception as error:  # one contender fewer, and the table says why
            reasons[form] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        stamp.write_text(key)
    return reasons


def _artefacts(model: Timed, threads: int) -> list[tuple[str, int]]:
    made = [(forms.DENSE, threads), (forms.COMPRESSED, threads)]
    if model.peers:  # who round what they multiply
        made.append((forms.ROUNDED, threads))
    return [*made, (forms.SERIAL, 1)] if threads > 1 else made


def _open(request: Request, model: Timed, reasons: dict[str, str]) -> dict[str, forms.Opened]:
    """The contenders in the order of the table; why one is missing is added to `reasons`."""
    names = [forms.FLOAT, forms.INTEGER, forms.TORCH, *(f for f, _ in _artefacts(model, request.threads)), *model.peers]
    found: dict[str, forms.Opened] = {}
    for name in names:
        if name in reasons:
            continue
        tell(0, 0, f"load {name}")
        try:
            if name == forms.INTEGER:
                _choose(request.folder, request.threads)
            opened = forms.open_form(name, request)
            opened.run()
        except Exception as error:  # one contender fewer, and the table says why
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        found[name] = opened
    if forms.FLOAT not in found:
        raise RuntimeError(f"{request.model}: ONNX Runtime does not run it: {reasons[forms.FLOAT]}")
    return found


def _choose(folder: Path, threads: int) -> None:
    """Write the name of the fastest quantised form."""
    names = forms.candidates(folder)
    if not names:
        raise ValueError("no quantised form could be made")
    runs = {name: forms.open_kept(folder, name, threads).run for name in names}
    series = _timing.interleave(runs, rounds=_TRIAL, before=lambda name: _settle(runs[name], threads))
    (folder / f"chosen-{threads}").write_text(min(names, key=lambda name: series[name].median))


def _settle(run: forms.Run, threads: int) -> None:
    """Let other pools go to sleep, then wake this contender's threads and fill its caches."""
    if threads > 1:
        time.sleep(_REST)
    run()


def _difference(wanted: list[np.ndarray], got: list[np.ndarray]) -> float:
    """The largest difference over the range of its output."""
    most = 0.0
    for a, b in zip(wanted, got, strict=True):
        spread = float(np.ptp(a)) or 1.0
        most = max(most, float(np.abs(a.astype(np.float64) - b.reshape(a.shape)).max()) / spread)
    return most


def _memory(name: str, request: Request) -> dict[str, float]:
    """Peak megabytes of a fresh process that runs this contender."""
    command = [sys.executable, "-m", "benchmarks._speed_memory", name, request.text()]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(answer.strip().splitlines()[-1])
    return found


def _kernels(form: str, request: Request, limits: machine.Limits) -> dict[str, Any]:
    place = forms.artefact_folder(request.folder, form, 1)
    samples = forms.samples_of(request.folder)
    sample = samples[-1] if forms.states_of(request.folder) else samples[0]
    return kernels.profile(request.folder / "source.onnx", request.recipe(form), place, sample, limits)


def main() -> None:
    """Measure the cell that the first argument describes."""
    request = Request(**json.loads(sys.argv[1]))
    print(json.dumps({"cell": measure(request)}), flush=True)


if __name__ == "__main__":
    main()
