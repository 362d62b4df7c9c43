"""Places for the intermediate tensors of a straight-line program in one workspace, by their lifetimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Lifetime:
    """A buffer's size in bytes and the steps, both included, between which its content must stay."""

    size: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each buffer stands.

    Attributes:
        offsets: one a buffer, in the order asked; multiples of the alignment.
        size: bytes of the workspace.
        bound: bytes alive at the busiest step; no plan can be smaller.
    """

    offsets: tuple[int, ...]
    size: int
    bound: int


def plan(lifetimes: Sequence[Lifetime], *, alignment: int = ALIGNMENT) -> Plan:
    """Offsets such that buffers that live at the same step never overlap.

    Placing the buffers one after the other, each at the lowest gap that holds it, gives a plan for any order
    of placing. Which order is best depends on the model; the three below are cheap, so the smallest plan wins.
    """
    orders: tuple[Callable[[int], tuple[int, ...]], ...] = (
        lambda k: (-lifetimes[k].size, lifetimes[k].first, k),
        lambda k: (lifetimes[k].first, -lifetimes[k].size, k),
        lambda k: (lifetimes[k].first - lifetimes[k].last, -lifetimes[k].size, k),
    )
    plans = [_place(lifetimes, sorted(range(len(lifetimes)), key=order), alignment) for order in orders]
    return min(plans, key=lambda p: p.size)


def bound(lifetimes: Iterable[Lifetime], *, alignment: int = ALIGNMENT) -> int:
    """Bytes alive at the busiest step, every buffer rounded up to the alignment."""
    # A buffer leaves at the step after its last, together with those that arrive there.
    changes: dict[int, int] = {}
    for life in lifetimes:
        size = _rounded(life.size, alignment)
        changes[life.first] = changes.get(life.first, 0) + size
        changes[life.last + 1] = changes.get(life.last + 1, 0) - size
    alive = most = 0
    for step in sorted(changes):
        alive += changes[step]
        most = max(most, alive)
    return most


def _place(lifetimes: Sequence[Lifetime], order: Sequence[int], alignment: int) -> Plan:
    offsets = [0] * len(lifetimes)
    placed: list[int] = []  # sorted by offset
    top = 0
    for k in order:
        life, size = lifetimes[k], _rounded(lifetimes[k].size, alignment)
        offset = 0
        for other in placed:
            if lifetimes[other].first > life.last or life.first > lifetimes[other].last:
                continue
            if offset + size <= offsets[other]:
                break
            offset = max(offset, offsets[other] + _rounded(lifetimes[other].size, alignment))
        offsets[k] = offset
        _insert(placed, k, offsets)
        top = max(top, offset + size)
    return Plan(tuple(offsets), top, bound(lifetimes, alignment=alignment))


def _insert(placed: list[int], k: int, offsets: Sequence[int]) -> None:
    position = len(placed)
    while position and offsets[placed[position - 1]] > offsets[k]:
        position -= 1
    placed.insert(position, k)


def _rounded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
