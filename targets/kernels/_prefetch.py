"""Weights on their way while the processor multiplies: a product asks for its next panel of columns as it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mc_opt.targets._relax import dims
from mc_opt.targets.kernels._loops import Buffer, Expr

# Steps of a reduction between two prefetches, floats of a cache line, and its bytes.
_RUN, _LINE, _LINE_BYTES = 8, 16, 64
# Bytes that packed weights are asked for ahead of their use: what a core has under way at a time, some times over.
_AHEAD = 32 << 10


def ahead(size: int, step: int) -> int:
    """By how many steps to ask ahead for a stream of `size` bytes, of which each step takes so many.

    What is asked for beyond the end of a stream may not be wanted: that is a quarter of it at most.
    """
    return min(_AHEAD, size // 4) // step


def ask(buffer: Buffer, *index: Expr, size: int) -> None:
    """Let `size` bytes from an element on come to the second level of the caches; any address will do.

    Hardware looks ahead within a page of 4 KiB alone: of weights beyond the caches it reads half as much in a time.
    """
    *outer, last = index
    item = np.dtype(str(buffer.dtype)).itemsize
    for byte in range(0, size, _LINE_BYTES):
        address = tirx.address_of(tirx.BufferLoad(buffer, [*outer, last + byte // item]))
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))


def runs(state: Any, block: Any, order: Sequence[Any], steps: Sequence[Any]) -> Any:
    """Cut the reduction of a product with large panels of packed weights into short runs; None for any other."""
    sizes = [dims.dim(state.get(x).extent) for x in (*order, *steps)]
    if str(state.get(block).name_hint) != "mc_gemm" or not dims.is_static(sizes) or math.prod(sizes[:-3]) != 1:
        return None
    if sizes[-2] < 4 or sizes[-1] % _RUN or sizes[-1] < 128:
        return None
    return state.split(steps[0], [None, _RUN])


def look_ahead(state: Any, block: Any, panel: Any, rows: Any, run: Any) -> None:
    """Let each run of a product's steps ask for its share of the next panel of weights.

    A product of few rows uses a panel for a few tiles only, and waiting for it costs as much as the work: hardware
    looks ahead within a page of 4 KiB alone. An address beyond the last panel is no error.
    """
    weights = next(r.source for r in reversed(state.get(block).reads) if len(r.region) >= 3)
    panel, rows, run_loop = (state.get(x) for x in (panel, rows, run))
    tiles, count = dims.dim(rows.extent), dims.dim(run_loop.extent)
    first = (rows.loop_var * count + run_loop.loop_var) * _RUN // tiles
    lead = [0] * (len(weights.ty.shape) - 3)
    hints = []
    for row in range(max(1, _RUN // tiles)):
        for c in range(0, dims.dim(weights.ty.shape[-1]), _LINE):
            element = tirx.BufferLoad(weights, [*lead, panel.loop_var + 1, first + row, c])
            hints.append(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(element), 0, 2, 1)))
    body = tirx.SeqStmt([*hints, run_loop.body])
    state.state.replace(
        state.get_sref(run), tirx.For(run_loop.loop_var, run_loop.min, run_loop.extent, run_loop.kind, body)
    )
