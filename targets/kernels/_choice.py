"""Which of several ways to cut a kernel into tiles it takes: the rule's, or what a table of measured ones says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# Candidates of one shape, the rule's included: what `--tune quick` measures.
MOST = 8
# The block annotation that names the shape of a kernel with candidates.
SHAPE = "mc_shape"


class Choices:
    """The candidates that kernels offered while a model was lowered, and a table that chooses among them.

    A kernel offers the tile of its rule first; without an entry in the table it is taken, as if nothing was offered.

    Attributes:
        offered: the names of the candidates of each shape, the rule's first.
        tiles: which of them it takes.
        panels: the columns of the panels in which a weight is packed, by its name; whoever reads it too keeps to them.
    """

    def __init__(self, table: Mapping[str, str] | None = None) -> None:
        """`table` says by name which candidate a shape takes; names that it does not offer count for nothing."""
        self._table = dict(table or {})
        self.offered: dict[str, tuple[str, ...]] = {}
        self.tiles: dict[str, str] = {}
        self.panels: dict[str, int] = {}

    def pick(self, shape: str, candidates: Mapping[str, T]) -> T:
        """The candidate of a shape; the rule's where it has no name, or nothing to choose."""
        names = tuple(candidates)
        if not shape or len(names) == 1:
            return candidates[names[0]]
        self.offered[shape] = names
        name = self._table.get(shape, "")
        self.tiles[shape] = name if name in candidates else names[0]
        return candidates[self.tiles[shape]]


def annotation(shape: str) -> dict[str, str]:
    """The block annotation of a kernel of that shape; it survives fusion. None for a shape without a name."""
    return {SHAPE: shape} if shape else {}


def by(*numbers: int) -> str:
    """Extents as names have them: `1x56x56x64`."""
    return "x".join(map(str, numbers))
