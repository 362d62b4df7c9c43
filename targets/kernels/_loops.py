"""Kernels written out loop by loop: vectors as values, accumulators as small buffers that LLVM keeps in registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from mc_opt.targets import _machine
from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim

# The attribute of a PrimFunc that needs no schedule.
SCHEDULED = "mc_opt.scheduled"

# Operations of a loop that are worth starting threads for; the loops say how many they count an element.
_WORTH = 1 << 18
# Vectors of partial results that a row is folded into.
_CHAINS = 4

# Expressions, buffers and PrimFuncs of an untyped package.
Expr = Any
Buffer = Any
PrimFunc = Any

# (shape, element type) of a kernel's argument; outputs come last.
Argument = tuple[Sequence[Dim], str]


def kernel(arguments: Sequence[Argument], body: Callable[..., None]) -> PrimFunc:
    """A PrimFunc over buffers of the given shapes whose statements `body(*buffers)` writes; its call names it."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        # No fusion (8 is opaque), no schedule: the loops are what is meant.
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, SCHEDULED: True})
        body(*[T.arg(f"a{k}", T.buffer(list(shape), dtype)) for k, (shape, dtype) in enumerate(arguments)])
    return builder.get()


def inside(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """A shape as a kernel sees it: open extents are variables of its own, bound by the buffer that has that shape."""
    return tuple(d if isinstance(d, int) else tirx.Var(f"n{k}", "int64") for k, d in enumerate(shape))


def registers(count: int, lanes: int, dtype: str = "float32", *, scope: str = "global") -> Buffer:
    """Room for `count` vectors; addressed with constants only, it becomes registers (of a thread: scope `local`)."""
    return T.sblock_alloc_buffer((count * lanes,), dtype, scope=scope)


def zeros(count: int, lanes: int) -> Buffer:
    """Registers that hold `count` vectors of zeros."""
    held = registers(count, lanes)
    for k in range(count):
        store(held, splat(0.0, lanes), k * lanes, lanes=lanes)
    return held


def own_scope(machine: Machine) -> str:
    """The scope of the registers of one turn of `each`: on a GPU, of one thread."""
    return "local" if machine.kind == "cuda" else "global"


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


def each(length: Dim, machine: Machine, *, work: Dim = 0) -> Any:
    """A loop over [0, length), split among threads when `work` operations are worth it; on a GPU, a thread each."""
    if machine.kind == "cuda" and machine.cpu != _machine.HOST:
        return _a_thread_each(length)
    if machine.threads > 1 and dims.nominal(work) >= _WORTH and dims.nominal(length) > 1:
        return T.parallel(0, length)
    return T.serial(0, length)


def each_tile(n: int, columns: int, machine: Machine, tile: Callable[[Expr, int], None], *, work: Dim = 0) -> None:
    """Call `tile(number, width)` for all tiles of n columns; the last may be narrower."""
    if n // columns:
        with each(n // columns, machine, work=work) as t:
            tile(t, columns)
    if n % columns:
        tile(tirx.const(n // columns, "int32"), n % columns)


@contextmanager
def _a_thread_each(length: Dim) -> Iterator[Expr]:
    threads = min(length, 64) if isinstance(length, int) else 64
    blocks = dims.tiles(length, threads)
    with (
        T.thread_binding(0, blocks, thread="blockIdx.x") as block,
        T.thread_binding(0, threads, thread="threadIdx.x") as k,
    ):
        number = block * threads + k
        if dims.factor(length) % threads == 0:
            yield number
            return
        with T.If(number < length), T.Then():
            yield number


def reduce_row(
    read: Callable[[Expr, int], Expr],
    length: Dim,
    combine: Callable[[Expr, Expr], Expr],
    start: float,
    *,
    lanes: int,
    dtype: str = "float32",
) -> Expr:
    """Fold `read(index, width)` over [0, length): partial results a lane, then the lanes in halves, with what is left.

    Several vectors of partial results hide the latency of a combination. Writes the loops and returns the expression
    that reads the result.
    """
    result = registers(1, 1, dtype)
    if not isinstance(length, int):
        _reduce_open_row(result, read, length, combine, start, lanes)
        return result[0]
    runs = {width: (first, count) for first, count, width in split(length, lanes)}
    widest = max(runs, default=1)
    first, count = runs.pop(widest, (0, 0))
    chains = min(_CHAINS, max(count, 1))
    partial = registers(chains, widest, dtype)
    for k in range(chains):
        store(partial, splat(start, widest, dtype), k * widest, lanes=widest)

    def add(index: Expr, width: int, place: int = 0) -> None:
        store(partial, combine(load(partial, place, lanes=width), read(index, width)), place, lanes=width)

    rounds = count // chains
    if rounds:
        with T.serial(0, rounds) as i:
            for k in range(chains):
                add((i * chains + k) * widest + first, widest, k * widest)
    for k in range(count % chains):
        add(tirx.const((rounds * chains + k) * widest + first, "int32"), widest, k * widest)
    for k in range(1, chains):
        other = load(partial, k * widest, lanes=widest)
        store(partial, combine(load(partial, 0, lanes=widest), other), 0, lanes=widest)
    width = widest // 2
    while width:
        half = load(partial, width, lanes=width)
        store(partial, combine(load(partial, 0, lanes=width), half), 0, lanes=width)
        if width in runs:
            add(tirx.const(runs[width][0], "int32"), width)
        width //= 2
    T.buffer_store(result, partial[0], [0])
    return result[0]


def _reduce_open_row(
    result: Buffer,
    read: Callable[[Expr, int], Expr],
    length: Dim,
    combine: Callable[[Expr, Expr], Expr],
    start: float,
    lanes: int,
) -> None:
    """`reduce_row` for a length that the run tells."""
    dtype = str(result.dtype)
    T.buffer_store(result, tirx.const(start, dtype), [0])
    whole = length // lanes
    partial = registers(1, lanes, dtype)
    store(partial, splat(start, lanes, dtype), 0, lanes=lanes)
    with T.serial(0, whole) as i:
        store(partial, combine(load(partial, 0, lanes=lanes), read(i * lanes, lanes)), 0, lanes=lanes)
    with T.serial(0, lanes) as i:
        T.buffer_store(result, combine(result[0], partial[i]), [0])
    with T.serial(0, length - whole * lanes) as i:
        T.buffer_store(result, combine(result[0], read(i + whole * lanes, 1)), [0])


def map_row(write: Callable[[Expr, int], None], length: Dim, *, lanes: int) -> None:
    """Call `write(index, width)` over [0, length) in vectors, the rest in falling powers of two."""
    if not isinstance(length, int):
        _map_open_row(write, length, lanes)
        return
    for start, count, width in split(length, lanes):
        if count == 1:
            write(tirx.const(start, "int32"), width)
            continue
        with T.serial(0, count) as i:
            write(i * width + start, width)


def _map_open_row(write: Callable[[Expr, int], None], length: Dim, lanes: int) -> None:
    """`map_row` for a length that the run tells: each width below the first fits once or not at all."""
    with T.serial(0, length // lanes) as i:
        write(i * lanes, lanes)
    width = lanes // 2
    while width:
        with T.serial(0, length // width % 2) as _:
            write(length // (2 * width) * (2 * width), width)
        width //= 2
