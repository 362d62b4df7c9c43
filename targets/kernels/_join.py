"""Kernels in a row that run as one, a block of rows at a time: found in main of a lowered model, and replaced there.

Products of all rows with one matrix, pointwise and channelwise convolutions in a row are looked at: stages of a
factored layer, a feed-forward network, blocks of a MobileNet. Those of which nobody else reads what stands between
them are joined where `_row_blocks` predicts that it saves time.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from mc_opt.targets import _row_blocks
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _general, _schedule, _sliding_joined, _window
from mc_opt.targets.kernels._expressions import is_load, rebuilt, walk
from mc_opt.targets.kernels._loops import SCHEDULED
from mc_opt.targets.kernels._nest import Sums, read_sums, reads
from mc_opt.targets.kernels._sliding_joined import Stage

# The attribute of a PrimFunc that names the kernels in it.
PARTS = "mc_opt.parts"

# Blocks of sums to which zeros beyond an image add nothing: convolutions and products, not maxima.
_JOINABLE = ("mc_conv", "mc_depthwise", "mc_gemm")


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a kernel in main: what it makes, of what, by which kernel."""

    result: Any
    kernel: Any
    arguments: tuple[Any, ...]
    stage: Stage


def join(module: tvm.IRModule, machine: Machine) -> tuple[tvm.IRModule, list[str]]:
    """The fused module with kernels joined where that saves time, and a line for each row of them: how it runs."""
    stages = {v: _stage(f) for v, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    builder = relax.BlockBuilder(module)
    made: dict[tuple[Any, ...], Any] = {}
    mains, notes = {}, []
    for variable, function in module.functions.items():
        if not isinstance(function, relax.Function):
            continue
        replaced = {}
        for run in _runs(function, stages):
            parts = [call.stage.part for call in run]
            cuts = _row_blocks.joined(parts, cache=machine.l2, lanes=machine.lanes, threads=machine.threads)
            for cut in cuts:
                calls = run[cut.first : cut.last]
                key = tuple(call.kernel for call in calls)
                if key not in made:
                    named = [_renamed(call.stage, k) for k, call in enumerate(calls)]
                    kernel = _sliding_joined.written(named, cut.high, machine)
                    kernel = kernel.with_attr(PARTS, [v.name_hint for v in key])
                    made[key] = builder.add_func(kernel, "joined_" + "_".join(v.name_hint for v in key))
                replaced[calls[-1].result] = _joined(calls, made[key])
            notes.append(_said(run, cuts))
        if replaced:
            mains[variable] = _with(function, replaced)
    if not mains:
        return module, notes
    result = builder.get()
    for variable, function in mains.items():
        result[variable] = function
    return relax.transform.DeadCodeElimination()(result), notes


def _joined(calls: list[_Call], kernel: Any) -> Any:
    """The call of a kernel in the place of several."""
    inner = [call.result for call in calls[:-1]]
    arguments = [a for call in calls for a in call.arguments if not any(map(a.same_as, inner))]
    return relax.call_tir(kernel, arguments, calls[-1].result.ty)


def _with(function: Any, replaced: Mapping[Any, Any]) -> Any:
    """A function of main's form with other values of some variables."""
    blocks = [
        type(block)([relax.VarBinding(b.var, replaced.get(b.var, b.value)) for b in block.bindings])
        for block in function.body.blocks
    ]
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _said(run: list[_Call], cuts: list[_row_blocks.Joined]) -> str:
    """For the report: which kernels became one, and which of a row did not."""
    names = [call.kernel.name_hint for call in run]
    words = []
    at = 0
    for cut in cuts:
        words += names[at : cut.first]
        rows = "1 row" if cut.high == 1 else f"{cut.high} rows"
        words.append(f"({' + '.join(names[cut.first : cut.last])} in blocks of {rows})")
        at = cut.last
    return f"kernels in a row: {', '.join([*words, *names[at:]])}"


# --- what kernels do ----------------------------------------------------------------------------


def _stage(function: Any) -> Stage | None:
    """What a convolution or product of fixed sizes with a dense weight does; None for any other kernel."""
    if function.attrs and SCHEDULED in function.attrs:
        return None
    state = s_tir.Schedule(function)
    _schedule.inline(state)
    first, *rest = [state.get(b) for b in _general.blocks(state)] or [None]
    window = None if first is None else _window.read(first.annotations)
    if window is None or first.name_hint not in _JOINABLE or len(rest) > 1 or window.behind > 1:
        return None
    try:
        sums = read_sums(first, rest[0] if rest else None)
    except ValueError:
        return None
    # Rows of an image, or those of a product, which have one axis.
    ranks = (2,) if window.channelwise else (1, 2)
    if not dims.is_static(sums.extents) or len(window.axes) not in ranks:
        return None
    source = _source(sums)
    # Rows between two stages are of one type: a consumer may cast what it stores.
    if source is None or len({str(x.dtype) for x in (source, sums.total, sums.made.buffer)}) > 1:
        return None
    return Stage(tuple(state.mod["main"].params), source, sums, window)


def _source(sums: Sums) -> Any:
    """The parameter that a window slides over, where nothing else reads it."""
    column = sums.kept[-2]
    loads = [x for x in walk(sums.term) if is_load(x)]
    found = [x.source for x in loads if any(part.same_as(column) for i in x.indices for part in walk(i))]
    if len(found) != 1 or any(reads(x, found[0]) for x in walk(sums.made.value)):
        return None
    return found[0]


def _renamed(stage: Stage, number: int) -> Stage:
    """The stage with parameters of its own: one kernel may stand several times in a row."""
    sums = stage.sums
    own = {p: type(p)(f"{p.name}_{number}", p.ty) for p in stage.parameters}

    def other(x: Any) -> Any:
        return tirx.BufferLoad(own[x.source], x.indices) if is_load(x) and x.source in own else None

    made = tirx.BufferStore(own[stage.result], rebuilt(sums.made.value, {}, other), sums.made.indices)
    sums = dataclasses.replace(sums, term=rebuilt(sums.term, {}, other), made=made)
    return dataclasses.replace(stage, parameters=tuple(own.values()), source=own[stage.source], sums=sums)


# --- who reads what -----------------------------------------------------------------------------


def _runs(function: Any, stages: Mapping[Any, Stage | None]) -> Iterator[list[_Call]]:
    """The longest rows of calls of which each reads what the one before it made, and nobody else does."""
    bindings = [b for block in function.body.blocks for b in block.bindings]
    uses = Counter(v for b in bindings for v in relax.analysis.free_vars(b.value))
    uses.update(relax.analysis.free_vars(function.body.body))
    calls: dict[Any, _Call] = {}
    after = {}
    for b in bindings:
        stage = stages.get(b.value.args[0]) if _is_kernel(b.value) else None
        if stage is None:
            continue
        call = calls[b.var] = _Call(b.var, b.value.args[0], tuple(b.value.args[1].fields), stage)
        read = call.arguments[[p.same_as(stage.source) for p in stage.parameters].index(True)]
        is_only = uses[read] == 1 and sum(read.same_as(a) for a in call.arguments) == 1
        if read in calls and is_only and _may_follow(stage):
            after[read] = call
    inner = {call.result for call in after.values()}
    for call in calls.values():
        run = [] if call.result in inner else [call]
        while run and run[-1].result in after:
            run.append(after[run[-1].result])
        if len(run) > 1:
            yield run


def _is_kernel(value: Any) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir" and len(value.args) == 2


def _may_follow(stage: Stage) -> bool:
    """Whether a stage can read rows that the one before it has just made."""
    if stage.window.channelwise:
        return stage.part.stride <= stage.part.span
    return not any(axis.kernel > 1 or axis.stride > 1 or axis.before for axis in stage.window.axes)
