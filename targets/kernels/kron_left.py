"""Products from the left: a small matrix times every block of channels, which stay where they are in memory.

    y[n, p, b, g, o, v] = Σ_k,i  A[g, o / c, k, i, o mod c] · x[n, p · stride + k · dilation, b, g, i, v]

The dimension v behind what is summed stands in vectors, and numbers of A are spread over their lanes: in this way a
stage of a chain needs no transposition before it and none behind it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, te

from mc_opt.targets._machine import Machine
from mc_opt.targets._relax import dims
from mc_opt.targets._relax.dims import Dim
from mc_opt.targets._relax.emitter import Emitter
from mc_opt.targets.kernels import conv
from mc_opt.targets.kernels._tile import Tile


@dataclasses.dataclass(frozen=True)
class Block:
    """The channels of x, slowest first, as names of dimensions, and their extents.

    Attributes:
        extents: the extent of each name.
        held: the order of the dimensions in x.
        groups: dimensions that both sides have.
        summed: dimensions that are summed over.
        kept: dimensions that only x has, in their order in y, in front of what is made; not those in vectors.
        lanes: dimensions that stand in vectors: the last ones of x.
    """

    extents: dict[str, int]
    held: tuple[str, ...]
    groups: tuple[str, ...]
    summed: tuple[str, ...]
    kept: tuple[str, ...]
    lanes: tuple[str, ...]

    def size(self, names: Sequence[str]) -> int:
        """The product of extents."""
        return math.prod(self.extents[name] for name in names)


def tile(width: Dim, outputs: int, columns: int, machine: Machine) -> Tile:
    """The tile of `outputs` rows of the matrix times `columns` lanes, at `width` positions side by side."""
    vector = math.gcd(columns, machine.lanes)
    limit = machine.registers - 4
    best: tuple[float, int, Tile] | None = None
    for held in range(1, 3):
        if columns % (held * vector):
            continue
        for wide in range(1, min(outputs, limit // held) + 1):
            for high in range(1, limit // (held * wide) + 1) if isinstance(width, int) else (1,):
                if isinstance(width, int) and width % high:
                    continue
                count = wide * high
                # As in `_tile.choose`; each position has vectors of its own, which all rows of the matrix share.
                step = max(count * held / 2, (wide + held * high) / 2, 4.0)
                key = math.ceil(outputs / wide) * wide / outputs * (step + 0.25 * held) / (count * held)
                if best is None or (key, -count * held) < best[:2]:
                    best = (key, -count * held, Tile(high, wide, held * vector, vector))
    assert best is not None
    return best[2]


def product(
    e: Emitter,
    x: relax.Expr,
    block: Block,
    weight: Callable[[int], relax.Expr],
    *,
    outputs: int,
    window: conv.Window,
    bias: relax.Expr | None,
) -> tuple[relax.Expr, list[Dim]]:
    """x: [*positions, *held] -> [*positions, *kept, Π groups, outputs, Π lanes], and the positions.

    Args:
        e: the emitter.
        x: x, whose last positions are those of the window.
        block: its channels.
        weight: makes A [Π groups · tiles, *kernel, Π summed, columns] for a number of columns, rows filled up with 0.
        outputs: rows of A in a group.
        window: strides, dilations and pads.
        bias: [Π kept · Π groups · outputs · Π lanes].
    """
    lead = dims.sizes(x)[: -len(block.held)]
    spatial = len(window.kernel)
    first = len(lead) - spatial
    batch, area = lead[:first], lead[first:]
    positions = window.output(area) if spatial else ()
    vectors = block.size(block.lanes)
    chosen = tile(positions[-1] if spatial else 1, outputs, vectors, e.machine)
    middle = [block.extents[d] for d in block.held if d not in block.lanes]
    source = x
    if any(map(any, window.pads)):
        reach = [n + a + b for n, (a, b) in zip(area, window.pads, strict=True)]
        channels = block.size(block.held)
        flat = e.reshape(x, [*lead, channels])
        source = conv.padded(e, flat, [p[0] for p in window.pads], reach, channels=channels)
    source = e.reshape(source, [*dims.sizes(source)[: len(lead)], *middle, vectors])
    a = weight(chosen.wide)
    summed, groups = block.size(block.summed), block.size(block.groups)
    tiles = -(-outputs // chosen.wide)
    kept = [block.extents[d] for d in block.kept]

    def compute(s: te.Tensor, w: te.Tensor, *rest: te.Tensor) -> te.Tensor:
        taps = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(window.kernel)]
        inner = te.reduce_axis((0, summed), name="i")

        # The tile is of the two axes before the vectors: positions in a row, then outputs.
        def element(*i: Any) -> Any:
            n, (*front, o, v) = i[: len(batch)], i[len(batch) :]
            across = [front.pop()] if spatial else []
            g = front.pop()
            p, outer = [*front[: max(spatial - 1, 0)], *across], front[max(spatial - 1, 0) :]
            at = [q * s + k * d for q, s, k, d in zip(p, window.strides, taps, window.dilations, strict=True)]
            index = _unravelled(block, dict(zip(block.kept, outer, strict=True)), g, inner)
            return te.sum(
                s(*n, *at, *index, v) * w(g * tiles + o // chosen.wide, *taps, inner, o % chosen.wide),
                axis=[*taps, inner],
            )

        domain = (*batch, *positions[:-1], *kept, groups, *positions[-1:], tiles * chosen.wide, vectors)
        total = te.compute(domain, element, name="mc_left", attrs=chosen.annotation())
        return _ordered(total, len(batch), spatial, (*batch, *positions, *kept, groups, outputs, vectors), *rest)

    arguments = [source, a] if bias is None else [source, a, bias]
    return conv.fusable(e, compute, *arguments, name="kron_left"), [*batch, *positions]


def _unravelled(block: Block, kept: dict[str, Any], g: Any, i: Any) -> list[Any]:
    """The index of every dimension of x but those in vectors."""
    found = dict(kept)
    for names, flat in ((block.groups, g), (block.summed, i)):
        for name in reversed(names):
            found[name] = flat % block.extents[name] if name != names[0] else flat
            flat = flat // block.extents[name]
    return [found[d] for d in block.held if d not in block.lanes]


def _ordered(total: te.Tensor, batch: int, spatial: int, shape: Sequence[Dim], *bias: te.Tensor) -> te.Tensor:
    """The tile's axes in the order of memory, without what fills it up, plus a bias."""
    columns = shape[batch + spatial :]

    def element(*i: Any) -> Any:
        n, p, c = i[:batch], i[batch : batch + spatial], i[batch + spatial :]
        value = total(*n, *p[:-1], *c[:-2], *p[-1:], *c[-2:])
        if not bias:
            return value
        flat: Any = 0
        for k, extent in zip(c, columns, strict=True):
            flat = flat * extent + k
        return value + bias[0](flat)

    return te.compute(tuple(shape), element, name="mc_bias" if bias else "mc_cut")


def pack(matrix: np.ndarray, groups: int, columns: int) -> np.ndarray:
    """matrix: [groups · o, i, *kernel] -> [groups · o / columns, *kernel, i, columns], each group filled up."""
    o = matrix.shape[0] // groups
    missing = -o % columns
    split = matrix.reshape(groups, o, *matrix.shape[1:])
    filled = np.pad(split, [(0, 0), (0, missing), *[(0, 0)] * (split.ndim - 2)]) if missing else split
    tiles = filled.reshape(-1, columns, *matrix.shape[1:])
    rank = matrix.ndim - 2
    return np.ascontiguousarray(tiles.transpose(0, *range(3, 3 + rank), 2, 1))
