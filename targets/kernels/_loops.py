"""Kernels written out loop by loop: vectors as values, accumulators as small buffers that LLVM keeps in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels._schedule import SCHEDULED

# Expressions, buffers and PrimFuncs of an untyped package.
Expr = Any
Buffer = Any
PrimFunc = Any

# (shape, element type) of a kernel's argument; outputs come last.
Argument = tuple[Sequence[int], str]


def kernel(arguments: Sequence[Argument], body: Callable[..., None], *, name: str) -> PrimFunc:
    """A PrimFunc over buffers of the given shapes whose statements `body(*buffers)` writes."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        # No fusion (8 is opaque), no schedule: the loops are what is meant.
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, SCHEDULED: True})
        body(*[T.arg(f"a{k}", T.buffer(list(shape), dtype)) for k, (shape, dtype) in enumerate(arguments)])
    return builder.get()


def registers(count: int, lanes: int, dtype: str = "float32") -> Buffer:
    """Room for `count` vectors; addressed with constants only, it becomes registers."""
    return T.sblock_alloc_buffer((count * lanes,), dtype)


def load(buffer: Buffer, *index: Expr, lanes: int) -> Expr:
    """`lanes` values from `index` on along the last axis."""
    if lanes == 1:
        return buffer[index if len(index) > 1 else index[0]]
    *outer, last = index
    where = (*outer, T.ramp(last, 1, lanes))
    return buffer[where if len(where) > 1 else where[0]]


def store(buffer: Buffer, value: Expr, *index: Expr, lanes: int) -> None:
    """Write `lanes` values from `index` on along the last axis."""
    *outer, last = index
    T.buffer_store(buffer, value, [*outer, last if lanes == 1 else T.ramp(last, 1, lanes)])


def splat(value: Expr | float, lanes: int, dtype: str = "float32") -> Expr:
    """A value in every lane."""
    scalar = tirx.const(value, dtype) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def split(length: int, lanes: int) -> list[tuple[int, int, int]]:
    """Cuts [0, length) into runs (start, vectors, width) of falling powers of two, the widest first."""
    runs = []
    start, width = 0, lanes
    while start < length:
        count = (length - start) // width
        if count:
            runs.append((start, count, width))
            start += count * width
        width //= 2
    return runs


def each(length: int, machine: Machine, *, work: int = 0) -> Any:
    """A loop over [0, length), split among threads when `work` operations are worth it."""
    if machine.threads > 1 and work >= 1 << 20 and length > 1:
        return T.parallel(0, length)
    return T.serial(0, length)
