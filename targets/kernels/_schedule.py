"""Schedules of all kernels of a lowered module: the register tile where one is annotated, a general rule elsewhere.

A block that carries `mc_tile` is a convolution or matrix product; its element-wise consumers run on the
tile while it is in registers. Kernels that were written out loop by loop carry SCHEDULED and stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _estimate, _packed, _prefetch, _sliding, _split, _window
from mc_opt.targets.kernels._loops import SCHEDULED

# Reductions of a depthwise kernel up to this many steps are written out; of others up to so many multiply-adds of
# vectors: above that LLVM moves loads ahead until the sums no longer fit in registers (measured: 24 steps of 28 vectors
# take twice as long written out).
_UNROLLED_STEPS = 32
_UNROLLED_PRODUCTS = 96

# Vectors of sums that a reduction keeps in registers, and the shortest vector that is worth it.
_SUMS, _SHORTEST = 16, 4

_SPATIAL, _REDUCE = 0, 2
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
        if any(_window.read(state.get(b).annotations) for b in blocks(state)):
            return _sliding_window(state, machine)
        tiled = [b for b in blocks(state) if _tile(state, b)]
        if not tiled:
            _general(state, machine)
            return state.mod["main"], ""
        try:
            for block in tiled:
                _register_tile(state, block, machine, fused=fused)
            _general(state, machine)
        except Exception as error:  # the schedule's own refusals have no common type
            problem = problem or first_line(error)
            continue
        note = "" if fused else f"consumers run apart from the tile: {problem}"
        return state.mod["main"], note
    state = s_tir.Schedule(function)
    inline(state)
    _general(state, machine)
    return state.mod["main"], f"no register tile: {problem}"


def _sliding_window(state: Any, machine: Machine) -> tuple[Any, str]:
    """A convolution or pooling and its consumer, loop by loop; the general rule where it is more than that."""
    found = [state.get(b) for b in blocks(state)]
    stage = next((block for block in found if _packed.is_stage(block)), None)
    first, *rest = [block for block in found if not _packed.is_stage(block)]
    try:
        if len(rest) > 1 or not _window.read(first.annotations):
            raise ValueError(f"{len(rest) + 1} blocks")
        return _sliding.written(state.mod["main"], first, rest[0] if rest else None, machine, stage=stage), ""
    except ValueError as error:
        _general(state, machine)
        return state.mod["main"], f"no register tile: {error}"


def first_line(error: Exception) -> str:
    """What an error of TVM's says, in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if "rror" in line and "Traceback" not in line), lines[-1] if lines else "")
    return found[:160] or type(error).__name__


def blocks(state: Any) -> list[Any]:
    """The blocks of a function, in order."""
    return list(state.get_child_blocks(state.get_sblock("root")))


def _tile(state: Any, block: Any) -> list[int]:
    return [int(v) for v in state.get(block).annotations.get("mc_tile", ())]


def _extent(state: Any, loop: Any) -> int:
    """The steps of a loop; an open number counts as its fixed factor, by which alone it can be cut."""
    return dims.factor(dims.dim(state.get(loop).extent))


def _work(state: Any, loops: Sequence[Any]) -> int:
    """The steps of a nest of loops, open numbers estimated."""
    return math.prod(dims.nominal(dims.dim(state.get(x).extent)) for x in loops)


def _is_open(state: Any, loop: Any) -> bool:
    return not isinstance(dims.dim(state.get(loop).extent), int)


def _kinds(state: Any, block: Any) -> list[int]:
    return [int(v.iter_type) for v in state.get(block).iter_vars]


def _is_plain(state: Any, block: Any) -> bool:
    """Each loop drives one axis of the block, in order, and none is scheduled yet."""
    loops = state.get_loops(block)
    return len(loops) == len(_kinds(state, block)) and all(int(state.get(x).kind) == 0 for x in loops)


def inline(state: Any) -> None:
    """Compute injective producers inside their consumers, until none is left."""
    changed = True
    while changed:
        changed = False
        for block in blocks(state):
            if _REDUCE in _kinds(state, block) or _tile(state, block) or not state.get_consumers(block):
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
    kinds, loops = _kinds(state, block), list(state.get_loops(block))
    outer = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _SPATIAL]
    steps = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCE]
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
    count = _work(state, steps)
    short = count * high * wide * (columns // vector) <= _UNROLLED_PRODUCTS or _is_depthwise(state, block)
    if count <= _UNROLLED_STEPS and short and not any(_is_open(state, s) for s in steps):
        for loop in steps:
            state.unroll(loop)
    for loop in (*inner, registers):
        state.unroll(loop)
    if vector > 1:
        state.vectorize(lane)
    work = _work(state, [*order, *steps, *inner, registers, lane])
    # Threads may fuse the loop over panels, whose number the prefetch needs, with others.
    runs = _prefetch.runs(state, block, order, steps) if machine.threads == 1 else None
    steps = steps if runs is None else runs
    _parallel(state, order[:-1], work / _split.SUMS, machine)
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
    extent = _extent(state, loops[-1])
    width = math.gcd(extent, vector)
    if width > 1:
        register, lane = state.split(loops[-1], [None, width])
        state.vectorize(lane)
        state.unroll(register)
    for loop in loops[:-1]:
        state.unroll(loop)


def _parallel(state: Any, loops: Sequence[Any], nanoseconds: float, machine: Machine) -> None:
    """Split the outermost loops among threads when the work is worth starting them."""
    threads = _split.threads(nanoseconds, machine)
    several = [x for x in loops if _work(state, [x]) > 1]
    if threads < 2 or not several:
        return
    first = [x.same_as(several[0]) for x in loops].index(True)
    depth = _split.depth([_work(state, [x]) for x in loops[first:]], threads)
    chosen = loops[first : first + depth]
    state.parallel(state.fuse(*chosen) if len(chosen) > 1 else chosen[0])


def _general(state: Any, machine: Machine) -> None:
    """Vectorise and split what no tile took; a block that resists stays a plain loop nest."""
    for block in blocks(state):
        if not state.get_loops(block) or not _is_plain(state, block):
            continue
        try:
            if _REDUCE in _kinds(state, block):
                _reduction(state, block, machine)
            else:
                _elementwise(state, block, machine)
        except s_tir.ScheduleError:
            continue


def _elementwise(state: Any, block: Any, machine: Machine) -> None:
    """Vectors along the last axis; short or odd rows are first fused with the axes before them."""
    loops = list(state.get_loops(block))
    extents = [_extent(state, x) for x in loops]
    work = _work(state, loops) / _split.ELEMENTS
    lanes = machine.lanes
    if extents[-1] % lanes and math.prod(extents) % lanes == 0 and _is_linear(state, block):
        loops = [state.fuse(*loops) if len(loops) > 1 else loops[0]]
    crossed = _crossed_axis(state, block) if len(loops) > 1 else None
    if crossed is not None:
        _transposition(state, loops, crossed, machine)
        return
    last = loops.pop()
    # A vector that reaches beyond the end would need a condition a lane, which makes it scalar.
    width = math.gcd(_extent(state, last), lanes)
    if width > 1:
        last, lane = state.split(last, [None, width])
        state.vectorize(lane)
    loops.append(last)
    _parallel(state, loops, work, machine)


def _crossed_axis(state: Any, block: Any) -> int | None:
    """The axis along which something large is contiguous, when that is not the axis along which the block writes."""
    body = state.get(block)
    axes = [v.var for v in body.iter_vars]
    for region in body.reads:
        last = region.region[-1].min if region.region else None
        for k, axis in enumerate(axes[:-1]):
            if last is not None and last.same_as(axis) and len(region.region) > 1:
                return k
    return None


def _transposition(state: Any, loops: Sequence[Any], crossed: int, machine: Machine) -> None:
    """Blocks of one cache line by one vector, so that every line that is read or written is used up at once."""
    lanes = machine.lanes
    work = _work(state, loops) / _split.ELEMENTS
    outer, inner = list(loops), list[Any]()
    for k in (len(loops) - 1, crossed):
        if _extent(state, loops[k]) > lanes:
            outer[k], step = state.split(loops[k], [None, lanes])
            inner.insert(0, step)
        else:
            outer.remove(loops[k])
            inner.insert(0, loops[k])
    state.reorder(*outer, *inner)
    if _extent(state, inner[-1]) == lanes:
        state.vectorize(inner[-1])
    _parallel(state, outer, work, machine)


def _is_linear(state: Any, block: Any) -> bool:
    """All buffers are indexed by exactly the block's axes, so that fused loops walk them in order."""
    body = state.get(block)
    axes = [v.var for v in body.iter_vars]
    for region in (*body.reads, *body.writes):
        indices = [r.min for r in region.region]
        if len(indices) != len(axes) or not all(i.same_as(v) for i, v in zip(indices, axes, strict=True)):
            return False
    return True


def _reduction(state: Any, block: Any, machine: Machine) -> None:
    """Vectors over the last kept axis when it is contiguous and long; partial sums in lanes when it is reduced."""
    kinds, loops = _kinds(state, block), list(state.get_loops(block))
    kept = [x for x, kind in zip(loops, kinds, strict=True) if kind == _SPATIAL]
    steps = [x for x, kind in zip(loops, kinds, strict=True) if kind == _REDUCE]
    work = _work(state, loops) / _split.ELEMENTS
    lanes = machine.lanes
    width = math.gcd(_extent(state, kept[-1]), lanes) if kept else 1
    if width >= min(_SHORTEST, lanes) and _reads_last(state, block, kept_axis=True):
        whole, lane = state.split(kept.pop(), [None, width])
        # Several vectors at once hide the latency of a sum, and read whole runs of memory.
        whole, held = state.split(whole, [None, _divisor(_extent(state, whole), _SUMS)])
        state.reorder(*kept, whole, *steps, held, lane)
        state.unroll(held)
        state.vectorize(lane)
        _parallel(state, [*kept, whole], work, machine)
        state.decompose_reduction(block, steps[0])
        return
    if steps and _extent(state, steps[-1]) % lanes == 0 and _reads_last(state, block, kept_axis=False):
        _lane_sums(state, block, steps[-1], lanes)
        return
    _parallel(state, kept, work, machine)


def _divisor(count: int, most: int) -> int:
    """The largest number up to `most` that divides `count`."""
    return max(d for d in range(1, most + 1) if count % d == 0)


def _reads_last(state: Any, block: Any, *, kept_axis: bool) -> bool:
    """The last index of everything that is read is the last kept (or the last reduced) axis."""
    body = state.get(block)
    kind = _SPATIAL if kept_axis else _REDUCE
    axis = [v.var for v in body.iter_vars if int(v.iter_type) == kind][-1]
    written = [region.source for region in body.writes]
    reads = [r for r in body.reads if not any(r.source.same_as(w) for w in written)]
    return bool(reads) and all(r.region and r.region[-1].min.same_as(axis) for r in reads)


def _lane_sums(state: Any, block: Any, step: Any, lanes: int) -> None:
    """Reduce into one partial result a lane, then reduce the lanes."""
    _, lane = state.split(step, [None, lanes])
    partial = state.rfactor(lane, factor_axis=0)
    loops = state.get_loops(partial)
    kinds = _kinds(state, partial)
    # rfactor's block has the lane as its first axis; it becomes the innermost, vectorised loop.
    vector = loops[-1]
    assert kinds
    outer = state.get_loops(block)
    kept = [x for x, kind in zip(outer, _kinds(state, block), strict=True) if kind == _SPATIAL]
    if kept:
        state.compute_at(partial, kept[-1])
        loops = state.get_loops(partial)
        vector = next(x for x in loops if _extent(state, x) == lanes)
    inner = [x for x in state.get_loops(partial)[len(kept) :] if not x.same_as(vector)]
    state.reorder(*inner, vector)
    state.vectorize(vector)
    state.decompose_reduction(partial, inner[0])
