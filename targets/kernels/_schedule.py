"""Schedules of all kernels of a lowered module: the register tile where one is annotated, a general rule elsewhere.

A block that carries `mc_tile` is a convolution or matrix product; its element-wise consumers run on the
tile while it is in registers. Kernels that were written out loop by loop carry SCHEDULED and stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import tvm
from tvm import s_tir, tirx

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _estimate, _general, _packed, _prefetch, _sliding, _split, _window
from mc_opt.targets.kernels._loops import SCHEDULED

# Reductions of a depthwise kernel up to this many steps are written out; of others up to so many multiply-adds of
# vectors: above that LLVM moves loads ahead until the sums no longer fit in registers (measured: 24 steps of 28 vectors
# take twice as long written out).
_UNROLLED_STEPS = 32
_UNROLLED_PRODUCTS = 96

# relax.OpPatternKind of an injective function.
_INJECTIVE = 2


def correct_patterns(module: tvm.IRModule) -> tvm.IRModule:
    """Call injective what AnnotateTIROpPattern takes for element-wise, though it changes the extent of an axis.

    A pad at the end and a slice from the beginning read the element that they write; on the tile of the
    kernel before them a pad would leave its border unwritten.
    """
    changed = {}
    for variable, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc) or not function.attrs or "op_pattern" not in function.attrs:
            continue
        if int(function.attrs["op_pattern"]) < _INJECTIVE and _resizes(function):
            changed[variable] = function.with_attr("op_pattern", _INJECTIVE)
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    for variable, function in changed.items():
        result[variable] = function
    return result


def _resizes(function: Any) -> bool:
    """Whether an input has an extent that is neither the output's nor 1, axes aligned at the end."""
    # A parameter without a shape is the size of an open dimension.
    shapes = [[dims.dim(s) for s in p.ty.shape] for p in function.params if hasattr(p.ty, "shape")]
    *inputs, output = shapes
    return any(
        not (dims.same(a, 1) or dims.same(a, b))
        for shape in inputs
        for a, b in zip(reversed(shape), reversed(output), strict=False)
    )


def schedule(module: tvm.IRModule, machine: Machine) -> tuple[tvm.IRModule, list[str]]:
    """Schedule every PrimFunc of a module; returns the module and a note for each that fell back, and why."""
    notes = []
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    kernels = [(v, f) for v, f in module.functions.items() if isinstance(f, tirx.PrimFunc)]
    if machine.threads > 1 and not _estimate.threads_pay([f for _, f in kernels], machine):
        machine = dataclasses.replace(machine, threads=1)
    for variable, function in sorted(kernels, key=lambda kv: str(kv[0].name_hint)):
        if function.attrs and SCHEDULED in function.attrs:
            continue
        try:
            scheduled, note = _scheduled(function, machine)
        except Exception as error:  # a plain loop nest is correct too
            scheduled, note = function, f"no schedule: {first_line(error)}"
        result[variable] = scheduled.with_attr("global_symbol", variable.name_hint) if _named(function) else scheduled
        if note:
            notes.append(f"{variable.name_hint}: {note}")
    return result, notes


def _named(function: Any) -> bool:
    return bool(function.attrs and "global_symbol" in function.attrs)


def _scheduled(function: Any, machine: Machine) -> tuple[Any, str]:
    """The best schedule that applies: fused tile, then tile with separate consumers, then the general rule."""
    problem = ""
    for fused in (True, False):
        state = s_tir.Schedule(function)
        inline(state)
        if any(_window.read(state.get(b).annotations) for b in _general.blocks(state)):
            return _sliding_window(state, machine)
        tiled = [b for b in _general.blocks(state) if _tile(state, b)]
        if not tiled:
            _general.schedule(state, machine)
            return state.mod["main"], ""
        try:
            for block in tiled:
                _register_tile(state, block, machine, fused=fused)
            _general.schedule(state, machine)
        except Exception as error:  # the schedule's own refusals have no common type
            problem = problem or first_line(error)
            continue
        note = "" if fused else f"consumers run apart from the tile: {problem}"
        return state.mod["main"], note
    state = s_tir.Schedule(function)
    inline(state)
    _general.schedule(state, machine)
    return state.mod["main"], f"no register tile: {problem}"


def _sliding_window(state: Any, machine: Machine) -> tuple[Any, str]:
    """A convolution or pooling and its consumer, loop by loop; the general rule where it is more than that."""
    found = [state.get(b) for b in _general.blocks(state)]
    stage = next((block for block in found if _packed.is_stage(block)), None)
    first, *rest = [block for block in found if not _packed.is_stage(block)]
    try:
        if len(rest) > 1 or not _window.read(first.annotations):
            raise ValueError(f"{len(rest) + 1} blocks")
        return _sliding.written(state.mod["main"], first, rest[0] if rest else None, machine, stage=stage), ""
    except ValueError as error:
        _general.schedule(state, machine)
        return state.mod["main"], f"no register tile: {error}"


def first_line(error: Exception) -> str:
    """What an error of TVM's says, in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if "rror" in line and "Traceback" not in line), lines[-1] if lines else "")
    return found[:160] or type(error).__name__


def _tile(state: Any, block: Any) -> list[int]:
    return [int(v) for v in state.get(block).annotations.get("mc_tile", ())]


def inline(state: Any) -> None:
    """Compute injective producers inside their consumers, until none is left."""
    if not any(_tile(state, b) for b in _general.blocks(state)):
        _general.write_views(state)
    changed = True
    while changed:
        changed = False
        for block in _general.blocks(state):
            if (
                _general.REDUCE in _general.kinds_of(state, block)
                or _tile(state, block)
                or not state.get_consumers(block)
            ):
                continue
            if _packed.is_stage(state.get(block)):
                continue
            if any(_tile(state, c) for c in state.get_consumers(block)):
                continue
            try:
                state.compute_inline(block)
            except s_tir.ScheduleError:
                continue
            changed = True
            break


def _register_tile(state: Any, block: Any, machine: Machine, *, fused: bool) -> None:
    """Order the loops as tiles | reduction | one tile in registers, the consumer at the end of each tile."""
    high, wide, columns, vector = _tile(state, block)
    kinds, loops = _general.kinds_of(state, block), list(state.get_loops(block))
    outer = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _general.SPATIAL]
    steps = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _general.REDUCE]
    consumers = list(state.get_consumers(block))
    column, registers, lane = state.split(outer.pop(), [None, columns // vector, vector])
    across, position = state.split(outer.pop(), [None, wide])
    inner = [position]
    down = []
    if high > 1:
        rows, row = state.split(outer.pop(), [None, high])
        inner, down = [row, position], [rows]
    order = [*outer, column, *down, across]
    state.reorder(*order, *steps, *inner, registers, lane)
    write = consumers[0] if len(consumers) == 1 and fused else state.cache_write(block, 0, "global")
    state.reverse_compute_at(write, across)
    _vectorise_tile(state, write, len(order), vector)
    count = _general.work_of(state, steps)
    short = count * high * wide * (columns // vector) <= _UNROLLED_PRODUCTS or _is_depthwise(state, block)
    if count <= _UNROLLED_STEPS and short and not any(_general.is_open(state, s) for s in steps):
        for loop in steps:
            state.unroll(loop)
    for loop in (*inner, registers):
        state.unroll(loop)
    if vector > 1:
        state.vectorize(lane)
    work = _general.work_of(state, [*order, *steps, *inner, registers, lane])
    # Threads may fuse the loop over panels, whose number the prefetch needs, with others.
    runs = _prefetch.runs(state, block, order, steps) if machine.threads == 1 else None
    steps = steps if runs is None else runs
    _general.parallel(state, order[:-1], work / _split.SUMS, machine)
    state.decompose_reduction(block, steps[0])
    if runs is not None:
        _prefetch.look_ahead(state, block, order[-2], order[-1], steps[0])


def _is_depthwise(state: Any, block: Any) -> bool:
    return str(state.get(block).name_hint) == "mc_depthwise"


def _vectorise_tile(state: Any, block: Any, depth: int, vector: int) -> None:
    """Write the tile's consumer out: registers and positions unrolled, lanes in vectors."""
    loops = state.get_loops(block)[depth:]
    if not loops:
        return
    extent = _general.extent(state, loops[-1])
    width = math.gcd(extent, vector)
    if width > 1:
        register, lane = state.split(loops[-1], [None, width])
        state.vectorize(lane)
        state.unroll(register)
    for loop in loops[:-1]:
        state.unroll(loop)
