"""Whether a module is worth several threads, by what its kernels take on one: about as long as their loops are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tvm import s_tir, tirx

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _split, _window
from mc_opt.targets.kernels._loops import SCHEDULED

_REDUCE = 2


def threads_pay(functions: Iterable[Any], machine: Machine) -> bool:
    """Whether to split the kernels of a module that are long enough.

    Kernels whose loops were written out have decided before; where they start threads, those beside them may too.
    """
    times = []
    for function in functions:
        if not (function.attrs and SCHEDULED in function.attrs):
            times.append(_nanoseconds(function))
        elif _starts_threads(function.body):
            return machine.threads > 1
    return _split.pays(times, machine)


def _nanoseconds(function: Any) -> float:
    """About what a kernel takes on one thread: its sums, or else the elements that it writes."""
    state = s_tir.Schedule(function)
    total = elements = 0.0
    for handle in state.get_child_blocks(state.get_sblock("root")):
        block = state.get(handle)
        steps = math.prod(dims.nominal(dims.dim(v.dom.extent)) for v in block.iter_vars)
        window = _window.read(block.annotations)
        if any(int(v.iter_type) == _REDUCE for v in block.iter_vars):
            dense = "mc_tile" in block.annotations or (window is not None and not window.channelwise)
            total += steps / (_split.SUMS if dense else _split.TAPS)
        elements = steps
    return total or elements / _split.ELEMENTS


def _starts_threads(statement: Any) -> bool:
    """Whether a loop in a statement is split among threads."""
    if isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL:
        return True
    parts = [getattr(statement, name, None) for name in ("body", "block", "then_case", "else_case")]
    return any(_starts_threads(part) for part in [*parts, *getattr(statement, "seq", ())] if part is not None)
