"""The child's side of measuring tiles: candidates compiled, held to the rule's result, and raced against it."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from mc_opt.targets import _build, _candidates, _race, _runtime
from mc_opt.targets._build import Reporter
from mc_opt.targets._candidates import Kernel
from mc_opt.targets._machine import Machine
from mc_opt.targets._pools import POOLS
from mc_opt.targets._relax import intrinsics
from mc_opt.targets.kernels import _schedule

# Sums in another order: float32 differs by 1e-6 of the largest, a wrong index by its size. As in the artefact's check.
_TOLERANCE = 1e-4


def serve() -> None:
    """Entry of the child process: a descriptor and a file with the request are its arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means, and ends this process
    reporter = Reporter(int(sys.argv[1]))
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    machine = Machine(**{**request["machine"], "features": tuple(request["machine"]["features"])})
    try:
        _measure(request["model"], machine, known=request["known"], broken=request["broken"], reporter=reporter)
        answer: dict[str, Any] = {"done": True}
    except Exception as error:
        answer = _build.described(error)
    reporter.send(answer)


def _measure(
    path: str, machine: Machine, *, known: Collection[str], broken: Mapping[str, Mapping[str, str]], reporter: Reporter
) -> None:
    """Measure every shape of a model that is not known yet; `broken` has candidates that ended an earlier child."""
    intrinsics.register()
    if machine.threads > 1:
        POOLS.set(_runtime.load(), machine.threads)
    offered, rule = _candidates.kernels(path, machine, {})
    offered = {shape: names for shape, names in offered.items() if shape in rule}
    wanted = {shape: names for shape, names in offered.items() if shape not in known}
    reporter.send({"offered": {shape: list(names) for shape, names in offered.items()}})
    field: dict[str, list[Kernel | None]] = {shape: [rule[shape]] for shape in wanted}
    count = max(map(len, wanted.values()), default=0)
    for k in range(1, count):
        reporter.progress(k, count, "lower the candidates of tiles")
        tiles = {shape: names[k] for shape, names in wanted.items() if k < len(names)}
        made = _candidates.kernels(path, machine, tiles)[1]
        for shape in tiles:
            field[shape].append(made.get(shape))
    for n, (shape, names) in enumerate(wanted.items()):
        reporter.progress(n, len(wanted), f"measure tiles: {shape}")
        entry = _raced(shape, names, field.pop(shape), machine, broken.get(shape, {}), reporter)
        reporter.send({"shape": shape, "entry": entry})


def _raced(
    shape: str,
    names: Sequence[str],
    kernels: Sequence[Kernel | None],
    machine: Machine,
    broken: Mapping[str, str],
    reporter: Reporter,
) -> dict[str, Any]:
    """What became of the candidates of a shape, in the fields of a table's entry."""
    rows: dict[str, dict[str, Any]] = {name: {"tile": name} for name in names}
    assert kernels[0] is not None
    inputs = kernels[0].inputs()
    wanted: list[np.ndarray] = []
    places: dict[Any, Any] = {}
    runners: dict[str, _race.Runner] = {}
    for name, kernel in zip(names, kernels, strict=True):
        if name in broken:
            rows[name]["failed"] = broken[name]
            continue
        if names[0] in broken:  # nothing to hold it to
            continue
        reporter.send({"trying": [shape, name]})
        try:
            if kernel is None:
                raise ValueError("no kernel takes it")
            runner, results = _prepared(kernel, inputs, machine, places, strict=bool(wanted))
            if wanted:
                _compare(results, wanted)
        except Exception as error:  # whatever TVM, LLVM or a kernel raise: the candidate is left out
            rows[name]["failed"] = _schedule.first_line(error)
            if name == names[0]:
                break
            continue
        wanted = wanted or results
        runners[name] = runner
    reporter.send({"trying": [shape, ""]})
    chosen = names[0]
    if runners:
        place, times = _race.race(list(runners.values()))
        chosen = list(runners)[place]
        for name, took in zip(runners, times, strict=True):
            rows[name] |= {"microseconds": took.seconds * 1e6, "ratio": took.ratio}
    return {"chosen": chosen, "candidates": list(rows.values())}


def _prepared(
    kernel: Kernel, inputs: Sequence[np.ndarray], machine: Machine, places: dict[Any, Any], *, strict: bool
) -> tuple[_race.Runner, list[np.ndarray]]:
    """The kernel compiled, and its results; `strict` raises ValueError where its schedule fell back.

    Candidates share `places`, the tensors that they read and write: where one lies in memory makes some percent.
    """
    function, notes = _candidates.compiled(kernel.function, machine)
    if notes and strict:
        raise ValueError(notes[0])
    given = iter(kernel.inputs(like=inputs))
    tensors = []
    for k, (shape, dtype) in enumerate(kernel.buffers):
        held = kernel.arguments[k] if k < len(kernel.arguments) else None
        if held is None:
            held = places.setdefault((k, shape), tvm.runtime.empty(shape, dtype))
            held.copyfrom(next(given) if k < len(kernel.arguments) else _unwritten(shape, dtype))
        tensors.append(held)
    outputs = tensors[len(kernel.arguments) :]

    # A thread's own time does not count what other processes take from it.
    clock = time.thread_time if machine.threads == 1 else time.perf_counter

    def run(count: int) -> float:
        start = clock()
        for _ in range(count):
            function(*tensors)
        return clock() - start

    run(1)
    return run, [output.numpy() for output in outputs]


def _unwritten(shape: Sequence[int], dtype: str) -> np.ndarray:
    """What an output holds before: not what the candidate before it wrote."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 1, dtype)


def _compare(results: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    """ValueError where results differ by more than the rounding of sums in another order."""
    for got, rule in zip(results, wanted, strict=True):
        finite = np.isfinite(rule)
        difference = np.abs(got[finite].astype(np.float64) - rule[finite]).max(initial=0.0)
        largest = np.abs(rule[finite].astype(np.float64)).max(initial=0.0)
        if (np.isfinite(got) != finite).any() or difference > _TOLERANCE * largest:
            raise ValueError(f"another result than the rule's tile: max |a-b| {difference:.3g} of {largest:.3g}")
