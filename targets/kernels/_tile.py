"""The register tile of a convolution or matrix product, chosen by a rule: same shape and machine, same tile."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mc_opt.targets._machine import Machine
from mc_opt.targets.kernels import _choice

# Candidates of one number of columns: with three numbers, eight in all.
_OF_EACH_WIDTH = 3
# Estimated times beyond so many of the least are not worth measuring.
_WORTH = 1.5


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
    return next(iter(candidates(rows, width, columns, machine).values()))


def candidates(rows: int, width: int, columns: int, machine: Machine, *, panel: int = 0) -> dict[str, Tile]:
    """The tiles that `choose` thinks least time for, by name: the best few of each number of columns, its own first.

    `panel` columns are what the weights are packed in already; 0 where they are not.
    """
    if machine.kind == "cuda":
        return {"1x1x1": Tile(1, 1, 1, 1)}  # its schedules tile what threads share (_threads.py)
    vector = vector_width(columns, machine)
    limit = machine.registers - 4
    vectors = math.ceil(columns / vector)
    # Wider tiles than three registers stream weights faster than the second-level cache gives them
    # (measured with AVX-512: 64 columns reach 80 % of 48); only few positions need them, to hide the latency.
    widest = (3 if machine.kind == "x86" else 2) if rows * width >= 4 else 8
    ranked = []
    for held in [panel // vector] if panel else range(1, min(widest, vectors) + 1):
        found = []
        for wide in range(1, min(width, limit // held) + 1):
            for high in range(1, min(rows, limit // (held * wide)) + 1):
                positions = wide * high
                step = max(positions * held / 2, 0.8 * (positions + held), 4.0, 1.5 * held)
                tiles = math.ceil(rows / high) * math.ceil(width / wide) * math.ceil(vectors / held)
                tile = Tile(high, wide, held * vector, vector)
                # The input is copied to where it fills the last tiles.
                copy = 1.0 if width % wide == 0 and rows % high == 0 else 1.05
                found.append((copy * tiles * (step + 0.25 * held), -positions * held, tile))
        ranked += sorted(found, key=lambda key: key[:2])[:_OF_EACH_WIDTH]
    ranked.sort(key=lambda key: key[:2])
    worth = [tile for cost, _, tile in ranked if cost <= _WORTH * ranked[0][0]]
    return {_choice.by(t.high, t.wide, t.columns): t for t in worth[: _choice.MOST]}


def exact_candidates(rows: int, width: int, columns: int, machine: Machine, *, panel: int = 0) -> dict[str, Tile]:
    """Tiles by name where the last ones are as small as what is left, the least estimated time first.

    The first is the rule's: it leaves height and width to `positions`, as 0. The others are the best few of each number
    of columns, so that what is measured differs in more than one way. `panel` is as in `candidates`.
    """
    if machine.kind == "cuda":
        return {"1x1x1": Tile(1, 1, 1, 1)}
    vector = vector_width(columns, machine)
    vectors = math.ceil(columns / vector)
    widest = (3 if machine.kind == "x86" else 2) if rows * width >= 4 else 8
    best, others = [], []
    for held in [panel // vector] if panel else range(1, min(widest, vectors) + 1):
        first, *rest = [
            (cost, high, wide, held)
            for cost, _, high, wide in _positions(rows, width, vectors, held, machine)[:_OF_EACH_WIDTH]
        ]
        best.append(first)
        others += rest
    rule = min(best)
    others = sorted([key for key in (*best, *others) if key != rule and key[0] <= _WORTH * rule[0]])[: _choice.MOST - 1]
    named = {_choice.by(*key[1:3], key[3] * vector): key for key in (rule, *others)}
    return {name: Tile(*((0, 0) if key == rule else key[1:3]), key[3] * vector, vector) for name, key in named.items()}


def dividing(group: int, tile: Tile, machine: Machine) -> Tile:
    """The tile with columns that divide a group's."""
    if group % tile.columns == 0:
        return tile
    columns = max(d for d in range(1, tile.columns + 1) if group % d == 0)
    return dataclasses.replace(tile, columns=columns, vector=math.gcd(columns, machine.lanes))


def positions(rows: int, width: int, columns: int, tile: Tile, machine: Machine) -> tuple[int, int]:
    """How high and wide a tile of so many columns is best, where the last tiles are as small as what is left."""
    vectors = math.ceil(columns / tile.vector)
    _, _, high, wide = _positions(rows, width, vectors, tile.columns // tile.vector, machine)[0]
    return high, wide


def _positions(rows: int, width: int, vectors: int, held: int, machine: Machine) -> list[tuple[float, int, int, int]]:
    """Heights and widths by the estimated time of `choose`, the tail tiles by themselves: time, rank, height, width."""
    limit = max(machine.registers - 4, held)  # the outputs of a group may be more, one by one where they are odd
    found = []
    for wide in range(1, min(width, limit // held) + 1):
        for high in range(1, min(rows, limit // (held * wide)) + 1):
            cost = 0.0
            for h, down in _cut(rows, high):
                for w, across in _cut(width, wide):
                    for v, panels in _cut(vectors, held):
                        step = max(h * w * v / 2, 0.8 * (h * w + v), 4.0, 1.5 * v)
                        cost += down * across * panels * (step + 0.25 * v)
            found.append((cost, -high * wide, high, wide))
    return sorted(found)


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
