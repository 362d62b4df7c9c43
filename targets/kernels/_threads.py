"""Schedules for a GPU: every block of every kernel runs in threads, by the first of TVM's rules that takes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight

from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _lookup_rows
from mc_opt.targets.kernels._loops import SCHEDULED
from mc_opt.targets.kernels._schedule import first_line

# Rules that give one sum to many threads.
_SHARED_SUMS = (dlight.gpu.GEMV, dlight.gpu.LowBatchGEMV, dlight.gpu.Reduction, dlight.gpu.GeneralReduction)
# A sum of at most so many terms stays in a thread where there are at least so many sums.
_FEW_TERMS, _MANY_SUMS = 128, 4096
_THREADS = 256
_RULES = (
    dlight.gpu.Matmul,
    dlight.gpu.GEMV,
    dlight.gpu.LowBatchGEMV,
    dlight.gpu.Reduction,
    dlight.gpu.GeneralReduction,
    dlight.gpu.RMSNorm,
    dlight.gpu.Transpose,
    dlight.gpu.Fallback,
)


def bind(module: tvm.IRModule, target: tvm.target.Target) -> tuple[tvm.IRModule, list[str]]:
    """Schedule every PrimFunc of a module; returns the module and a note for each that runs in one thread only."""
    notes = []
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    for variable, function in sorted(module.functions.items(), key=lambda kv: str(kv[0].name_hint)):
        if not isinstance(function, tirx.PrimFunc):
            continue
        if function.attrs and SCHEDULED in function.attrs:
            bound = function
            if _is_unbound(function.body):
                bound = function.with_body(_one_thread(function.body))
                notes.append(f"{variable.name_hint}: runs in one thread; each element depends on the one before")
        else:
            bound = _scheduled(function, target, variable.name_hint)
        assert not _is_unbound(bound.body), f"{variable.name_hint}: a part of the kernel runs in no thread"
        result[variable] = bound.with_attr("tirx.is_scheduled", True)
    return result, notes


def _scheduled(function: Any, target: tvm.target.Target, name: str) -> Any:
    """The kernel by the first rule whose schedule can be compiled; some rules take more than they can finish."""
    problems = []
    rules: list[tuple[str, Callable[[], Any]]] = [("ours", lambda: _lookup_rows.schedule(function))]
    chosen = [rule for rule in _RULES if rule not in _SHARED_SUMS] if _sums_little(function) else list(_RULES)
    rules += [(rule.__name__, functools.partial(rule().apply, function, target, False)) for rule in chosen]
    rules.append(("axis by axis", lambda: _axis_by_axis(function)))
    for rule, apply in rules:
        try:
            made = apply()
            if made is None:
                continue
            scheduled = (made if isinstance(made, s_tir.Schedule) else made[0]).mod["main"]
            _lower(scheduled, target)
        except Exception as error:  # the rules' own refusals have no common type
            problems.append(f"{rule}: {first_line(error)}")
            continue
        if not _is_unbound(scheduled.body):
            return scheduled
    raise RuntimeError(f"{name}: no rule puts the kernel into threads: {'; '.join(problems) or 'none takes it'}")


def _sums_little(function: Any) -> bool:
    """Whether the kernel is one short sum for each of many elements, such as a depthwise convolution or a pooling."""
    state = s_tir.Schedule(function)
    blocks = [state.get(b) for b in state.get_child_blocks(state.get_sblock("root"))]
    sums = [b for b in blocks if any(int(v.iter_type) == tirx.IterVar.CommReduce for v in b.iter_vars)]
    if len(sums) != 1:
        return False
    terms = count = 1
    for axis in sums[0].iter_vars:
        extent = int(axis.dom.extent) if isinstance(axis.dom.extent, tirx.IntImm) else dims.NOMINAL
        if int(axis.iter_type) == tirx.IterVar.CommReduce:
            terms *= extent
        else:
            count *= extent
    return terms <= _FEW_TERMS and count >= _MANY_SUMS


def _axis_by_axis(function: Any) -> s_tir.Schedule:
    """Open axes as the grid, each by itself, and the others as threads: nothing needs to be proven about products."""
    state = s_tir.Schedule(function)
    for block in state.get_child_blocks(state.get_sblock("root")):
        kinds = [int(v.iter_type) for v in state.get(block).iter_vars]
        loops = list(state.get_loops(block))
        kept = [x for x, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar]
        steps = [x for x, kind in zip(loops, kinds, strict=True) if kind != tirx.IterVar.DataPar]
        grid = [x for x in kept if not isinstance(state.get(x).extent, tirx.IntImm)]
        fixed = [x for x in kept if isinstance(state.get(x).extent, tirx.IntImm)] or [state.add_unit_loop(block)]
        state.reorder(*grid, *fixed, *steps)
        for loop, tag in zip(grid, ("blockIdx.x", "blockIdx.y", "blockIdx.z"), strict=False):
            state.bind(loop, tag)
        inner = state.fuse(*fixed) if len(fixed) > 1 else fixed[0]
        _, thread = state.split(inner, [None, min(_THREADS, int(state.get(inner).extent))])
        state.bind(thread, "threadIdx.x")
        if steps:
            state.decompose_reduction(block, steps[0])
    return state


def _lower(function: Any, target: tvm.target.Target) -> None:
    """Run all passes up to the split of host and device; raises what they find wrong."""
    module = tirx.transform.BindTarget(target)(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))
    s_tir.pipeline.default_s_tir_pipeline()[0](module)


def _is_unbound(statement: Any) -> bool:
    """Whether anything that a statement does runs outside of threads: on a GPU's memory, but on the processor."""
    match type(statement).__name__:
        case "For":
            return statement.thread_binding is None and _is_unbound(statement.body)
        case "AttrStmt":
            return statement.attr_key != "thread_extent" and _is_unbound(statement.body)
        case "SeqStmt":
            return any(_is_unbound(part) for part in statement.seq)
        case "SBlockRealize":
            return _is_unbound(statement.block)
        case "BufferStore" | "Evaluate" | "IfThenElse" | "While":
            return True
        case _:
            return _is_unbound(statement.body)


def _one_thread(body: Any) -> Any:
    """The statement in a grid of one thread."""
    one = tirx.const(1, "int32")
    for tag in ("threadIdx.x", "blockIdx.x"):
        variable = tirx.IterVar((0, 1), tirx.Var(tag.replace(".", "_"), "int32"), tirx.IterVar.ThreadIndex, tag)
        body = tirx.AttrStmt(variable, "thread_extent", one, body)
    return body
