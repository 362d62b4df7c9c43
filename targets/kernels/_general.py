"""The general rule for loops that no kernel is written for: vectors, transpositions in blocks, partial sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _split

# Vectors of sums that a reduction keeps in registers, and the shortest vector that is worth it.
_SUMS, _SHORTEST = 16, 4

SPATIAL, REDUCE = 0, 2


def blocks(state: Any) -> list[Any]:
    """The blocks of a function, in order."""
    return list(state.get_child_blocks(state.get_sblock("root")))


def extent(state: Any, loop: Any) -> int:
    """The steps of a loop; an open number counts as its fixed factor, by which alone it can be cut."""
    return dims.factor(dims.dim(state.get(loop).extent))


def work_of(state: Any, loops: Sequence[Any]) -> int:
    """The steps of a nest of loops, open numbers estimated."""
    return math.prod(dims.nominal(dims.dim(state.get(x).extent)) for x in loops)


def is_open(state: Any, loop: Any) -> bool:
    return not isinstance(dims.dim(state.get(loop).extent), int)


def kinds_of(state: Any, block: Any) -> list[int]:
    return [int(v.iter_type) for v in state.get(block).iter_vars]


def _is_plain(state: Any, block: Any) -> bool:
    """Each loop drives one axis of the block, in order, and none is scheduled yet."""
    loops = state.get_loops(block)
    return len(loops) == len(kinds_of(state, block)) and all(int(state.get(x).kind) == 0 for x in loops)


def parallel(state: Any, loops: Sequence[Any], nanoseconds: float, machine: Machine) -> None:
    """Split the outermost loops among threads when the work is worth starting them."""
    threads = _split.threads(nanoseconds, machine)
    several = [x for x in loops if work_of(state, [x]) > 1]
    if threads < 2 or not several:
        return
    first = [x.same_as(several[0]) for x in loops].index(True)
    depth = _split.depth([work_of(state, [x]) for x in loops[first:]], threads)
    chosen = loops[first : first + depth]
    state.parallel(state.fuse(*chosen) if len(chosen) > 1 else chosen[0])


def schedule(state: Any, machine: Machine) -> None:
    """Vectorise and split what no tile took; a block that resists stays a plain loop nest."""
    for block in blocks(state):
        if not state.get_loops(block) or not _is_plain(state, block):
            continue
        try:
            if REDUCE in kinds_of(state, block):
                _reduction(state, block, machine)
            else:
                _elementwise(state, block, machine)
        except s_tir.ScheduleError:
            continue


def _elementwise(state: Any, block: Any, machine: Machine) -> None:
    """Vectors along the last axis; short or odd rows are first fused with the axes before them."""
    loops = list(state.get_loops(block))
    extents = [extent(state, x) for x in loops]
    work = work_of(state, loops) / _split.ELEMENTS
    lanes = machine.lanes
    if extents[-1] % lanes and math.prod(extents) % lanes == 0 and _is_linear(state, block):
        loops = [state.fuse(*loops) if len(loops) > 1 else loops[0]]
    crossed = _crossed_axis(state, block) if len(loops) > 1 else None
    if crossed is not None:
        _transposition(state, loops, crossed, machine)
        return
    last = loops.pop()
    # A vector that reaches beyond the end would need a condition a lane, which makes it scalar.
    width = math.gcd(extent(state, last), lanes)
    if width > 1:
        last, lane = state.split(last, [None, width])
        state.vectorize(lane)
    loops.append(last)
    parallel(state, loops, work, machine)


def write_views(state: Any) -> None:
    """Let a transposition write what is made of its elements, in another shape too: blocks go by its own axes."""
    found = blocks(state)
    moves = [_copies(state, b) and _crossed_axis(state, b) is not None for b in found]
    for block in found[moves.index(True) + 1 :] if True in moves else ():
        if len(state.get(block).reads) > 1:
            return
        try:
            state.reverse_compute_inline(block)
        except s_tir.ScheduleError:
            return


def _copies(state: Any, block: Any) -> bool:
    """Whether a block stores elements as it reads them."""
    body = state.get(block).body
    return isinstance(body, tirx.BufferStore) and type(body.value).__name__ == "TensorLoad"


def _crossed_axis(state: Any, block: Any) -> int | None:
    """The axis along which something large is contiguous, when that is not the axis along which the block writes."""
    body = state.get(block)
    axes = [v.var for v in body.iter_vars]
    for region in body.reads:
        if len(region.region) > 1:
            steps = tvm.sym.detect_linear_equation(region.region[-1].min, axes)
            strides = [dims.dim(step) for step in steps[:-1]]
            if 1 in strides and strides[-1] == 0:
                return strides.index(1)
    return None


def _transposition(state: Any, loops: Sequence[Any], crossed: int, machine: Machine) -> None:
    """Blocks of one cache line by one vector, so that every line that is read or written is used up at once."""
    lanes = machine.lanes
    work = work_of(state, loops) / _split.ELEMENTS
    outer, inner = list(loops), list[Any]()
    for k in (len(loops) - 1, crossed):
        if extent(state, loops[k]) > lanes:
            outer[k], step = state.split(loops[k], [None, lanes])
            inner.insert(0, step)
        else:
            outer.remove(loops[k])
            inner.insert(0, loops[k])
    state.reorder(*outer, *inner)
    if extent(state, inner[-1]) == lanes:
        state.vectorize(inner[-1])
    parallel(state, outer, work, machine)


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
    kinds, loops = kinds_of(state, block), list(state.get_loops(block))
    kept = [x for x, kind in zip(loops, kinds, strict=True) if kind == SPATIAL]
    steps = [x for x, kind in zip(loops, kinds, strict=True) if kind == REDUCE]
    work = work_of(state, loops) / _split.ELEMENTS
    lanes = machine.lanes
    width = math.gcd(extent(state, kept[-1]), lanes) if kept else 1
    if width >= min(_SHORTEST, lanes) and _reads_last(state, block, kept_axis=True):
        whole, lane = state.split(kept.pop(), [None, width])
        # Several vectors at once hide the latency of a sum, and read whole runs of memory.
        whole, held = state.split(whole, [None, _divisor(extent(state, whole), _SUMS)])
        state.reorder(*kept, whole, *steps, held, lane)
        state.unroll(held)
        state.vectorize(lane)
        parallel(state, [*kept, whole], work, machine)
        state.decompose_reduction(block, steps[0])
        return
    if steps and extent(state, steps[-1]) % lanes == 0 and _reads_last(state, block, kept_axis=False):
        _lane_sums(state, block, steps[-1], lanes)
        return
    parallel(state, kept, work, machine)


def _divisor(count: int, most: int) -> int:
    """The largest number up to `most` that divides `count`."""
    return max(d for d in range(1, most + 1) if count % d == 0)


def _reads_last(state: Any, block: Any, *, kept_axis: bool) -> bool:
    """The last index of everything that is read is the last kept (or the last reduced) axis."""
    body = state.get(block)
    kind = SPATIAL if kept_axis else REDUCE
    axis = [v.var for v in body.iter_vars if int(v.iter_type) == kind][-1]
    written = [region.source for region in body.writes]
    reads = [r for r in body.reads if not any(r.source.same_as(w) for w in written)]
    return bool(reads) and all(r.region and r.region[-1].min.same_as(axis) for r in reads)


def _lane_sums(state: Any, block: Any, step: Any, lanes: int) -> None:
    """Reduce into one partial result a lane, then reduce the lanes."""
    _, lane = state.split(step, [None, lanes])
    partial = state.rfactor(lane, factor_axis=0)
    loops = state.get_loops(partial)
    kinds = kinds_of(state, partial)
    # rfactor's block has the lane as its first axis; it becomes the innermost, vectorised loop.
    vector = loops[-1]
    assert kinds
    outer = state.get_loops(block)
    kept = [x for x, kind in zip(outer, kinds_of(state, block), strict=True) if kind == SPATIAL]
    if kept:
        state.compute_at(partial, kept[-1])
        loops = state.get_loops(partial)
        vector = next(x for x in loops if extent(state, x) == lanes)
    inner = [x for x in state.get_loops(partial)[len(kept) :] if not x.same_as(vector)]
    state.reorder(*inner, vector)
    state.vectorize(vector)
    state.decompose_reduction(partial, inner[0])
