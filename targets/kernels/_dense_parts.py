"""What the loops of a dense window pass on: positions, a panel of the weight, and the steps that they multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mc_opt.targets.kernels._expressions import Expr


@dataclasses.dataclass(frozen=True)
class Region:
    """Positions of an image: `rows` by `width` from a corner on."""

    row: Expr | int
    rows: int
    column: Expr | int
    width: int


@dataclasses.dataclass(frozen=True)
class Panel:
    """A tile of columns of the weight: its vectors, its number, and how many of its columns are channels."""

    held: int
    number: Expr
    valid: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Steps that are multiplied at once: all of them, or of one tap the channels from `first` on.

    Attributes:
        taps: the taps of the kernel; empty for all of them.
        first: the first channel.
        channels: how many.
        memory: where sums stay between blocks; None where there is one block only.
        is_last: whether sums end here.
        decoded: the steps of a weight in codes, decoded: [steps · columns]; None for a weight that is dense.
        row: where they begin in it.
    """

    taps: Sequence[Expr]
    first: Expr | int
    channels: int
    memory: Any = None
    is_last: Expr | bool = True
    decoded: Any = None
    row: Expr | int = 0
