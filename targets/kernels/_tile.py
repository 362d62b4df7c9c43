"""The register tile of a convolution or matrix product, chosen by a rule: same shape and machine, same tile."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mc_opt.targets._machine import Machine


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one pass over the reduction computes: `high` x `wide` positions of `columns` channels.

    Attributes:
        high: rows of output positions (1 for a matrix product).
        wide: output positions in a row.
        columns: output channels; a multiple of `vector`.
        vector: lanes of one register.
    """

    high: int
    wide: int
    columns: int
    vector: int

    def annotation(self) -> dict[str, Any]:
        """The tile as a block annotation, which survives fusion."""
        return {"mc_tile": [self.high, self.wide, self.columns, self.vector]}


def vector_width(columns: int, machine: Machine) -> int:
    """Lanes that `columns` channels deserve: the machine's, or the power of two that holds them."""
    return min(machine.lanes, 1 << max(columns - 1, 0).bit_length())


def choose(rows: int, width: int, columns: int, machine: Machine) -> Tile:
    """The tile of least estimated time for `rows` x `width` positions of `columns` channels.

    A step of the reduction loads high·wide scalars and the tile's registers of weights, and does their
    product in fused multiply-adds: two a cycle, loads a little fewer, a latency of four cycles, and weights that come
    from the second-level cache.
    """
    if machine.kind == "cuda":
        return Tile(1, 1, 1, 1)  # its schedules tile what threads share (_threads.py)
    vector = vector_width(columns, machine)
    limit = machine.registers - 4
    vectors = math.ceil(columns / vector)
    # Wider tiles than three registers stream weights faster than the second-level cache gives them
    # (measured with AVX-512: 64 columns reach 80 % of 48); only few positions need them, to hide the latency.
    widest = (3 if machine.kind == "x86" else 2) if rows * width >= 4 else 8
    best: tuple[float, int, Tile] | None = None
    for held in range(1, min(widest, vectors) + 1):
        for wide in range(1, min(width, limit // held) + 1):
            for high in range(1, min(rows, limit // (held * wide)) + 1):
                positions = wide * high
                step = max(positions * held / 2, 0.8 * (positions + held), 4.0, 1.5 * held)
                tiles = math.ceil(rows / high) * math.ceil(width / wide) * math.ceil(vectors / held)
                tile = Tile(high, wide, held * vector, vector)
                # The input is copied to where it fills the last tiles.
                copy = 1.0 if width % wide == 0 and rows % high == 0 else 1.05
                key = (copy * tiles * (step + 0.25 * held), -positions * held, tile)
                if best is None or key[:2] < best[:2]:
                    best = key
    assert best is not None
    return best[2]


def exact(rows: int, width: int, columns: int, machine: Machine) -> Tile:
    """The tile of least estimated time where the last tiles are as small as what is left."""
    if machine.kind == "cuda":
        return Tile(1, 1, 1, 1)
    vector = vector_width(columns, machine)
    vectors = math.ceil(columns / vector)
    widest = (3 if machine.kind == "x86" else 2) if rows * width >= 4 else 8
    tiles = [(*_positions(rows, width, vectors, held, machine), held) for held in range(1, min(widest, vectors) + 1)]
    _, high, wide, held = min(tiles)
    return Tile(high, wide, held * vector, vector)


def positions(rows: int, width: int, columns: int, tile: Tile, machine: Machine) -> tuple[int, int]:
    """How high and wide a tile of so many columns is best, where the last tiles are as small as what is left."""
    vectors = math.ceil(columns / tile.vector)
    _, high, wide = _positions(rows, width, vectors, tile.columns // tile.vector, machine)
    return high, wide


def _positions(rows: int, width: int, vectors: int, held: int, machine: Machine) -> tuple[float, int, int]:
    """The estimated time of `choose`, the tail tiles by themselves, and the height and width that need it."""
    limit = machine.registers - 4
    best: tuple[float, int, int, int] | None = None
    for wide in range(1, min(width, limit // held) + 1):
        for high in range(1, min(rows, limit // (held * wide)) + 1):
            cost = 0.0
            for h, down in _cut(rows, high):
                for w, across in _cut(width, wide):
                    for v, panels in _cut(vectors, held):
                        step = max(h * w * v / 2, 0.8 * (h * w + v), 4.0, 1.5 * v)
                        cost += down * across * panels * (step + 0.25 * v)
            key = (cost, -high * wide, high, wide)
            best = key if best is None or key < best else best
    assert best is not None
    return best[0], best[2], best[3]


def _cut(length: int, size: int) -> list[tuple[int, int]]:
    """(size, count) of the whole tiles, and of what is left."""
    whole = [(size, length // size)] if length >= size else []
    return whole + ([(length % size, 1)] if length % size else [])


def open_ended(columns: int, machine: Machine, *, multiple: int = 1) -> Tile:
    """The tile of a product whose number of rows only the run tells.

    The rows of the last tile beyond the end are computed in vain, so it is not high; its rows are addressed one by
    one, and eight addresses are what a processor keeps in registers.

    Args:
        columns: columns of the result.
        machine: the processor.
        multiple: what the number of rows is a multiple of.
    """
    if machine.kind == "cuda":
        return Tile(1, 1, 1, 1)
    vector = vector_width(columns, machine)
    vectors, limit = math.ceil(columns / vector), machine.registers - 4
    wide = whole(multiple, min(8, limit // min(2, vectors)))
    held = min(max(2, 16 // wide), vectors, limit // wide)
    return Tile(1, wide, held * vector, vector)


def whole(multiple: int, most: int) -> int:
    """Rows of a tile, `most` at most, of a number of rows that is a multiple of something.

    Tiles then come out even: what is cut off 2·s in eights, TVM does not see to cover it.
    """
    return most if multiple == 1 else max(d for d in range(1, most + 1) if multiple % d == 0)
