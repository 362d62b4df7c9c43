"""What the written-out loops of all sliding windows share: the sums, their consumer, indices and outer loops."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets.kernels import _loops, _split
from mc_opt.targets.kernels._expressions import Expr, is_load, rebuilt, walk
from mc_opt.targets.kernels._window import Sliding

# Bytes below which TVM keeps a buffer on the stack (kMaxStackAlloca), where LLVM makes registers of it. A larger one
# comes from a pool: sums in it are read and written at every tile, and in a thread's code at every step.
_STACK = 1024


@dataclasses.dataclass(frozen=True)
class Sums:
    """The block of sums and the block that consumes them.

    Attributes:
        kept: axes of the sums: image, positions, channel.
        steps: axes that are summed over: the kernel's, then the input channel of a dense window.
        total: the buffer of sums.
        start: what a sum begins with.
        combine: sum, term -> sum.
        term: what a step adds.
        consumer: axes of the consumer, in the order of `kept`.
        made: the store that the consumer does.
        extents: how many images, positions and channels the consumer writes.
        inputs: the channels that a dense window sums over.
    """

    kept: list[Any]
    steps: list[Any]
    total: Any
    start: Expr
    combine: Callable[[Expr, Expr], Expr]
    term: Expr
    consumer: list[Any]
    made: Any
    extents: list[Any]
    inputs: int


def read_sums(block: Any, consumer: Any | None) -> Sums:
    """The two blocks; ValueError where they are not what convolutions and poolings describe."""
    kept = [v for v in block.iter_vars if int(v.iter_type) == 0]
    steps = [v for v in block.iter_vars if int(v.iter_type) == 2]
    stored, total = block.body.value, block.body.buffer
    combine = {"Add": lambda a, b: a + b, "Max": tirx.max}.get(type(stored).__name__)
    if combine is None or not reads(stored.a, total):
        raise ValueError("the sum has another form")
    axes = [v.var for v in (block.iter_vars[: len(kept)] if consumer is None else consumer.iter_vars)]
    made = tirx.BufferStore(total, tirx.BufferLoad(total, axes), axes) if consumer is None else consumer.body
    if type(made).__name__ != "BufferStore":
        raise ValueError("a consumer is more than one store")
    found = [x for x in walk(made.value) if reads(x, total)]
    if not found or not all(_same(x.indices, axes) for x in found) or len(axes) != len(kept):
        raise ValueError("a consumer reads sums of other positions")
    return Sums(
        kept=[v.var for v in kept],
        steps=[v.var for v in steps],
        total=total,
        start=block.init.value,
        combine=combine,
        term=rebuilt(stored.b, {}, _inside),
        consumer=axes,
        made=made,
        extents=[dims.dim(v.dom.extent) for v in (kept if consumer is None else consumer.iter_vars)],
        inputs=int(steps[-1].dom.extent),
    )


def reads(expr: Expr, buffer: Any) -> bool:
    """Whether an expression is an element of a buffer."""
    return is_load(expr) and bool(expr.source.same_as(buffer))


def _same(indices: Sequence[Any], axes: Sequence[Any]) -> bool:
    return len(indices) == len(axes) and all(i.same_as(v) for i, v in zip(indices, axes, strict=True))


def _inside(expr: Expr) -> Expr | None:
    """A tap that may be padding, taken for one that is none: the loops leave the others out."""
    if type(expr).__name__ == "Call" and expr.op.name == "prim.if_then_else":
        return expr.args[1]
    return None


@dataclasses.dataclass(frozen=True)
class Span:
    """`count` tiles of `size` from `start` on."""

    start: int
    size: int
    count: int


def spans(length: int, size: int) -> list[Span]:
    """[0, length) in tiles of `size`, and what is left."""
    whole = length // size
    made = [Span(0, size, whole)] if whole else []
    return made + ([Span(whole * size, length - whole * size, 1)] if length % size else [])


@dataclasses.dataclass(frozen=True)
class Registers:
    """A buffer for the sums of `count` positions of a tile, from `first` on."""

    first: int
    count: int
    buffer: Any


class Nest:
    """What both kinds of windows share: indices, outer loops, and the code of a tile."""

    def __init__(self, sums: Sums, window: Sliding, machine: Machine) -> None:
        self.sums, self.window, self.machine = sums, window, machine
        self.dtype, self.kind = str(sums.total.dtype), str(sums.kept[0].ty)
        # The rows of a matrix product are positions of one image.
        self.images, *positions, channels = sums.extents if len(sums.extents) > 2 else [1, *sums.extents]
        self.positions, self.channels = [int(p) for p in positions], int(channels)

    def index(self, value: Expr | int) -> Expr:
        """An integer in the type of the axes."""
        return tirx.const(value, self.kind) if isinstance(value, int) else value

    def serial(self, count: Any, start: Any = 0) -> Any:
        """A loop over [start, count)."""
        return T.serial(self.index(start), self.index(count))

    @contextmanager
    def unrolled(self, *extents: int) -> Iterator[list[Expr]]:
        """Loops that are written out; the last one is a vector."""
        *outer, lanes = extents
        zero = self.index(0)
        with ExitStack() as stack:
            at = [stack.enter_context(T.unroll(zero, self.index(n))) if n > 1 else zero for n in outer]
            at.append(stack.enter_context(T.vectorized(zero, self.index(lanes))) if lanes > 1 else zero)
            yield at

    @contextmanager
    def loops(self, extents: Sequence[Any]) -> Iterator[list[Expr]]:
        """Serial loops, none for an extent of 1."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.serial(n)) if not _is_one(n) else self.index(0) for n in extents]

    @contextmanager
    def where(self, condition: Expr) -> Iterator[None]:
        """Statements for where a condition holds."""
        with T.If(condition), T.Then():
            yield

    @contextmanager
    def outer(self, extents: Sequence[Any], nanoseconds: float) -> Iterator[list[Expr]]:
        """Serial loops; the first of them split among threads when the work is worth starting them."""
        threads = _split.threads(nanoseconds, self.machine)
        fixed = list(itertools.takewhile(lambda n: isinstance(n, int), extents))
        head = _split.depth(fixed, threads) if threads > 1 else 0
        with ExitStack() as stack:
            at: list[Expr] = []
            if head:
                rest = stack.enter_context(T.parallel(self.index(0), self.index(math.prod(extents[:head]))))
                for extent in reversed(extents[1:head]):
                    at.insert(0, rest % extent)
                    rest = rest // extent
                at.insert(0, rest)
            at += stack.enter_context(self.loops(extents[head:]))
            yield at

    def registers(self, positions: int, held: int, lanes: int) -> list[Registers]:
        """Room for the sums of `positions` of `held` vectors, in buffers that become registers."""
        most = max(1, (_STACK - 1) // (held * lanes * np.dtype(self.dtype).itemsize))
        each = -(-positions // -(-positions // most))
        counts = [(first, min(each, positions - first)) for first in range(0, positions, each)]
        return [Registers(first, n, _loops.registers(n * held, lanes, self.dtype)) for first, n in counts]

    def start(self, acc: Any, count: int, lanes: int) -> None:
        """Begin `count` vectors of sums."""
        with self.unrolled(count, lanes) as (k, lane):
            T.buffer_store(acc, self.sums.start, [k * lanes + lane])

    def add(
        self,
        acc: Any,
        at: Expr,
        kept: Sequence[Expr | int],
        steps: Sequence[Expr | int],
        other: tuple[Any, Expr] | None = None,
    ) -> None:
        """Add the term of one step to the sum at `at`; `other` stands for what the term reads of a buffer."""
        axes = [*self.sums.kept, *self.sums.steps]
        where = {v: self.index(x) for v, x in zip(axes, [*kept, *steps], strict=True)}
        term = rebuilt(self.sums.term, where, lambda x: other[1] if other and reads(x, other[0]) else None)
        T.buffer_store(acc, self.sums.combine(acc[at], term), [at])

    def finish(self, acc: Any, at: Expr, kept: Sequence[Expr | int]) -> None:
        """Let the consumer store what it makes of the sum at `at`."""
        where = {v: self.index(x) for v, x in zip(self.sums.consumer, kept, strict=True)}
        value = rebuilt(self.sums.made.value, where, lambda x: acc[at] if reads(x, self.sums.total) else None)
        T.buffer_store(self.sums.made.buffer, value, [rebuilt(i, where) for i in self.sums.made.indices])


def _is_one(extent: Any) -> bool:
    return isinstance(extent, int) and extent == 1
