"""What each kernel of an artefact takes and how near its limit that is: bytes over bandwidth, or sums over the ports.

Times are those between two calls that TVM's virtual machine makes of an instrument. Arithmetic and bytes are counted
in the kernels before they are scheduled, in a lowering of the same model: the same names, in the same order.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, tirx

import mc_opt
from benchmarks import _speed_ports as ports
from benchmarks._speed_machine import Limits
from mc_opt import ir
from mc_opt.targets import _build, _machine, _manifest, _runtime
from mc_opt.targets._machine import Activations
from mc_opt.targets._relax import lower
from mc_opt.targets.kernels import _join

_RUNS = 20
_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min)
_OPERANDS = ("a", "b", "value", "true_value", "false_value", "body", "args")


def profile(
    source: Path,
    recipe: str,
    folder: Path,
    sample: dict[str, np.ndarray],
    limits: Limits,
    *,
    activations: Activations = "float32",
) -> dict[str, Any]:
    """Milliseconds of a run and of its kernels, longest first, with their work and limits."""
    counted = work(source, recipe, activations)
    artefact = mc_opt.load(folder)
    calls, total = _times(artefact, sample)
    cpu = artefact.manifest.cpu
    loops = ports.main_loops(artefact.folder / "model.so", cpu)
    constants = sum(found["constants"] for found in counted.values())
    rows = []
    for name, times in calls.items():
        known = counted.get(name)
        row: dict[str, Any] = {"name": name, "calls": len(times), "ms": sum(times) * 1e3}
        if known is not None:
            row |= _limit(known, loops.get(name), limits, constants, lanes=_machine.native().lanes)
            row["share"] = row["limit_ms"] * len(times) / row["ms"]
        rows.append(row)
    rows.sort(key=lambda row: -row["ms"])
    return {"ms": total * 1e3, "kernels": rows, "ports": bool(loops)}


def _limit(
    known: dict[str, float], loop: ports.Loop | None, limits: Limits, constants: float, *, lanes: int
) -> dict[str, Any]:
    """What bounds one call: its arithmetic, its constants or its other operands."""
    # Two ports multiply and add a vector a cycle.
    cycles_a_second = limits.fma[0] * 1e9 / (2 * 2 * lanes)
    rate = limits.fma[0] * 1e9
    if loop is not None and loop.flops:
        rate = min(rate, loop.flops / loop.cycles * cycles_a_second)
    seconds = {
        "ports": known["flops"] / rate,
        # The constants of the whole model pass by between two calls of this kernel.
        "weights": known["constants"] / limits.bandwidth(constants) / 1e9,
        "activations": known["activations"] / limits.bandwidth(known["activations"]) / 1e9,
    }
    bound = max(seconds, key=lambda key: seconds[key])
    return known | {"limit_ms": seconds[bound] * 1e3, "bound": bound, "peak": rate / 1e9}


# --- times --------------------------------------------------------------------------------------


def _times(artefact: Any, sample: dict[str, np.ndarray]) -> tuple[dict[str, list[float]], float]:
    """Seconds of each call in a run by the kernel's name, and of a whole run without the instrument: all minima."""
    constants = _runtime.read(artefact.folder / _manifest.CONSTANTS)
    machine = _runtime.Processor(artefact.folder / "model.so", constants, threads=None, pooled=True)
    states = set(artefact.manifest.states.values())
    held = {port.name: np.zeros(port.shape, port.dtype) for port in artefact.inputs if port.name in states}
    tensors = [machine.place((sample | held)[port.name]) for port in artefact.inputs]
    total = math.inf
    for _ in range(_RUNS):
        start = time.perf_counter()
        machine.call(tensors)
        total = min(total, time.perf_counter() - start)
    found: list[tuple[str, float]] = []
    start = 0.0

    def instrument(_function: Any, name: Any, before: bool, _result: Any, *_arguments: Any) -> None:
        nonlocal start
        if before:
            start = time.perf_counter()
        else:
            found.append((str(name), time.perf_counter() - start))

    machine.instrument(instrument)
    runs = []
    for _ in range(_RUNS):
        found.clear()
        machine.call(tensors)
        runs.append([seconds for _, seconds in found])
    calls: dict[str, list[float]] = {}
    for (name, _), seconds in zip(found, np.min(runs, axis=0), strict=True):
        calls.setdefault(name, []).append(float(seconds))
    return calls, total


# --- work ---------------------------------------------------------------------------------------


def work(source: Path, recipe: str, activations: Activations = "float32") -> dict[str, dict[str, float]]:
    """By the kernel's name: floating-point operations, and bytes of its constants and of its other operands."""
    model = ir.load_model(source)
    if recipe:
        model, _ = mc_opt.compress(model, recipe, check="structure")
    machine = dataclasses.replace(_machine.native(), activations=activations)
    lowered = lower.lower(model, machine, lambda *_: None)
    with _build.target_of(machine):
        module = _build.fuse(lowered.module)
        joined, _ = _join.join(module, machine)
    apart, functions = ({v.name_hint: f for v, f in m.functions.items()} for m in (module, joined))
    found: dict[str, dict[str, float]] = {}
    for block in functions["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not (isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.call_tir"):
                continue
            name = call.args[0].name_hint
            constants = sum(a.value.numpy().nbytes for a in call.args[1].fields if isinstance(a, tvm.ir.GenericConst))
            function = functions[name]
            operands = sum(_bytes(parameter.ty) for parameter in function.params)
            parts = (
                [apart[part] for part in function.attrs[_join.PARTS]] if _join.PARTS in function.attrs else [function]
            )
            flops = sum(sum(_flops(part.body, 1)) for part in parts)
            row = {"flops": flops, "constants": constants, "activations": operands - constants}
            if "gather" in name:  # reads what it picks, not the whole table
                row["constants"] = 0.0
            found.setdefault(name, row)
    return found


def _bytes(kind: Any) -> int:
    """Of a buffer parameter."""
    return math.prod(int(d) for d in kind.shape) * np.dtype(str(kind.dtype)).itemsize


def _flops(statement: Any, times: int) -> Iterator[float]:
    """The operations of each store below, so often as its loops run; of a branch, the longer side's."""
    match statement:
        case tirx.For():
            yield from _flops(statement.body, times * _turns(statement.extent))
        case tirx.SeqStmt():
            for part in statement.seq:
                yield from _flops(part, times)
        case s_tir.SBlockRealize():
            yield from _flops(statement.block.body, times)
        case tirx.IfThenElse():
            sides = [statement.then_case, *([statement.else_case] if statement.else_case is not None else [])]
            yield max(sum(_flops(side, times)) for side in sides)
        case tirx.BufferStore():
            yield times * _operations(statement.value, set())
        case tirx.Bind():
            yield times * _operations(statement.value, set())
        case _ if hasattr(statement, "body"):
            yield from _flops(statement.body, times)


def _turns(extent: Any) -> int:
    """How often a loop runs; the most, where the run tells: a cache is attended to up to the token's position."""
    return int(tvm.sym.Analyzer().const_int_bound(extent).max_value)


def _operations(expression: Any, seen: set[int]) -> int:
    """Sums, products, quotients and comparisons of floats in an expression, a lane each; what it shares counts once."""
    key = expression.__chandle__()
    if key in seen:
        return 0
    seen.add(key)
    found = 0
    if isinstance(expression, _ARITHMETIC) and "float" in str(expression.ty):
        found = expression.ty.dtype.lanes
    for name in _OPERANDS:
        operand = getattr(expression, name, None)
        for part in operand if name == "args" and operand is not None else [operand]:
            if isinstance(part, tvm.ir.Expr):
                found += _operations(part, seen)
    return found
