"""Products with A ⊗ I_v: a small matrix times blocks of a few neighbouring numbers, which stay where they are.

    y[n, p, o·v + j] = Σ_k,i  A[o, k, i] · x[n, p · stride + k · dilation, i·v + j],   0 <= j < v

A stage of a chain needs it whose later factors made 2, 4 or 8 outputs: too few for vectors of their own (`kron_left`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.emitter import Emitter
from mc_opt.targets.kernels import _tile, conv
from mc_opt.targets.kernels._window import Sliding, axes_of, shape_of


def takes(behind: int, dtype: str, machine: Machine) -> bool:
    """Whether blocks of so many numbers fill a vector of a processor."""
    return machine.kind != "cuda" and dtype == "float32" and 1 < behind < machine.lanes and machine.lanes % behind == 0


def repeated(matrix: np.ndarray, behind: int) -> np.ndarray:
    """A [o, i, *kernel], a row for each lane: [o · behind, i, *kernel]."""
    return np.repeat(matrix, behind, axis=0)


def product(
    e: Emitter, x: relax.Expr, weight: conv.Weight, behind: int, bias: relax.Expr | None, *, window: conv.Window
) -> relax.Expr:
    """x: [n, *spatial, i · behind], weight `repeated` [o · behind, i, *kernel] -> [n, *positions, o · behind]."""
    shape = dims.sizes(x)
    outputs, depth = weight.shape[:2]
    positions = window.output(shape[1:-1])
    reach = [n + before + after for n, (before, after) in zip(shape[1:-1], window.pads, strict=True)]
    source = conv.padded(e, x, [p[0] for p in window.pads], reach, channels=shape[-1])
    axes = axes_of(window, dims.sizes(source))
    rows, width = positions[-2] if len(positions) > 1 else 1, positions[-1]
    tiles = _tile.exact_candidates(rows, width, outputs, e.machine)
    result = (shape[0], *positions, outputs)
    called = shape_of(f"kron_spread of {behind}", dims.sizes(source), result, axes, str(x.ty.dtype))
    tile = e.choices.pick(called, tiles)
    # Vectors hold whole blocks, also where there are few outputs.
    lanes = e.machine.lanes
    columns = tile.columns // tile.vector * lanes
    sliding = Sliding(columns, lanes, False, axes, tile.high, tile.wide, called, behind)

    def compute(a: te.Tensor, b: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        reduce = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(window.kernel)]
        channel = te.reduce_axis((0, depth), name="c")

        def element(n: Any, *i: Any) -> Any:
            *p, column = i
            where = [q * s + k * d for q, s, k, d in zip(p, window.strides, reduce, window.dilations, strict=True)]
            w = b(column // columns, *reduce, channel, column % columns)
            return te.sum(a(n, *where, channel * behind + column % behind) * w, axis=[*reduce, channel])

        domain = (shape[0], *positions, int(b.shape[0]) * columns)
        total = te.compute(domain, element, name="mc_conv", attrs=sliding.annotation(e.machine))
        return conv.cut(total, result, *rest)

    added = [] if bias is None else [bias]
    return conv.fusable(e, compute, source, weight.packed(columns), *added, name="kron_spread")
