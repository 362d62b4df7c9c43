"""The forms a weight may be factorised in: factor shapes, and which factor carries which rank index.

A structure is a table of carriers. With T blocked by the factor shapes (see `_factor`), rank index j is summed over
all factors that carry it:

    gkpd     r_1 by both factors
    cp       r_1 by all
    tt       r_j by factors j and j+1
    sekron   r_j by factors j, j+1, .., S
    tucker   r_j by the factor of one axis and by the core
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mc_opt.passes._factor import Shape, Structure

STRUCTURES: tuple[Structure, ...] = ("gkpd", "tucker", "tt", "cp", "sekron")

_SPLITS = 24  # ways to cut the channels into three digits that are tried at most


@dataclass(frozen=True)
class Form:
    """Factor shapes [F_k, C_k, K_k1, ..], factor 1 first, and the factors (from 0) that carry each rank index."""

    structure: Structure
    blocks: tuple[Shape, ...]
    carriers: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """|b_k|: elements of each factor at rank one."""
        return tuple(math.prod(block) for block in self.blocks)

    @property
    def dense(self) -> Shape:
        """The shape of the weight."""
        return tuple(math.prod(axis) for axis in zip(*self.blocks, strict=True))

    def parameters(self, ranks: Sequence[np.ndarray | int]) -> np.ndarray:
        """Elements of all factors; ranks may be arrays of one shape, to ask for many at once."""
        total = np.zeros(np.shape(ranks[0]))
        for k, size in enumerate(self.sizes):
            total = total + size * _product([ranks[j] for j, who in enumerate(self.carriers) if k in who])
        return total

    def multiplications(self, ranks: Sequence[np.ndarray | int], loads: Sequence[float]) -> np.ndarray:
        """Multiplications of all stages; loads: those of each factor's stage at rank one.

        A stage works on every rank index that a factor at or after it and one at or before it carry.
        """
        total = np.zeros(np.shape(ranks[0]))
        for k, load in enumerate(loads):
            total = total + load * _product([ranks[j] for j, who in enumerate(self.carriers) if who[0] <= k <= who[-1]])
        return total

    def shapes(self, ranks: Sequence[int]) -> tuple[Shape, ...]:
        """The factors' shapes with their rank axes: [R_1|1, .., R_m|1, F_k, C_k, K_k1, ..]."""
        return tuple(
            (*(rank if k in who else 1 for rank, who in zip(ranks, self.carriers, strict=True)), *block)
            for k, block in enumerate(self.blocks)
        )

    def unfolding(self, rank: int) -> Shape:
        """The slow side of the matrix that rank index j of a chain cuts T into: the product of factors 1 .. j+1."""
        return tuple(math.prod(axis) for axis in zip(*self.blocks[: rank + 1], strict=True))

    def largest(self) -> tuple[int, ...]:
        """The rank of each index above which nothing is gained; for cp a bound that always suffices."""
        sizes = self.sizes
        total = math.prod(sizes)
        match self.structure:
            case "gkpd":
                return (min(sizes),)
            case "cp":
                return (total // max(sizes) if len(sizes) > 2 else min(sizes),)
            case "tt":
                return tuple(
                    min(math.prod(sizes[: j + 1]), math.prod(sizes[j + 1 :])) for j in range(len(self.carriers))
                )
            case "tucker":
                return tuple(sizes[self.mode(j)] for j in range(len(self.carriers)))
            case "sekron":
                return tuple(min(sizes[j], math.prod(sizes[j + 1 :])) for j in range(len(self.carriers)))

    def mode(self, rank: int) -> int:
        """Of a Tucker form: the factor of the axis that rank index j belongs to."""
        return next(k for k in self.carriers[rank] if k != self.core)

    @property
    def core(self) -> int:
        """Of a Tucker form: the factor that carries every rank index."""
        return next(k for k in range(len(self.blocks)) if all(k in who for who in self.carriers))

    def axis(self, factor: int) -> int:
        """The axis that a factor of one axis spans."""
        return next(axis for axis, size in enumerate(self.blocks[factor]) if size > 1)

    @property
    def splits_an_axis(self) -> bool:
        """Whether an axis is divided between factors, which CP, TT and Tucker of the weight's own axes cannot say."""
        return any(sum(size > 1 for size in axis) > 1 for axis in zip(*self.blocks, strict=True))


def _product(values: Sequence[np.ndarray | int]) -> np.ndarray:
    result = np.ones(())
    for value in values:
        result = result * value
    return result


def forms(dense: Shape, structure: Structure, *, group: int = 1, table: bool = False) -> Iterator[Form]:
    """Every form of one structure that is tried for a weight [F, C, K_1, ..].

    Args:
        dense: the weight's shape.
        structure: which.
        group: of a grouped convolution: factor 1 spans the groups.
        table: a table that is read by rows: factor 1 has them all, and there are two factors.
    """
    for form in _FORMS[structure](dense):
        if form.blocks[0][0] % group == 0 and (not table or (len(form.blocks) == 2 and form.blocks[0][0] == dense[0])):
            yield form


def with_ranks(listed: Sequence[Form], ranks: Sequence[int]) -> list[Form]:
    """The forms that given ranks may be meant for: a Tucker form of the channels, or of every axis."""
    meant = [form for form in listed if len(form.carriers) == len(ranks)]
    channels = [form for form in meant if {form.axis(form.mode(j)) for j in range(len(ranks))} == {0, 1}]
    return channels or meant


def _gkpd(dense: Shape) -> Iterator[Form]:
    for first in itertools.product(*(_divisors(size) for size in dense)):
        second = tuple(size // part for size, part in zip(dense, first, strict=True))
        mirrored = len(dense) == 2 and first == (1, dense[1])  # a linear chain runs from the cheaper end anyway
        if math.prod(first) > 1 and math.prod(second) > 1 and not (mirrored and dense[0] > 1):
            yield Form("gkpd", (first, second), ((0, 1),))


def _cp(dense: Shape) -> Iterator[Form]:
    for blocks in _by_axis(dense):
        yield Form("cp", blocks, (tuple(range(len(blocks))),))


def _tt(dense: Shape) -> Iterator[Form]:
    for blocks in dict.fromkeys((*_orders(dense), *_digits(dense), *_states(dense))):
        yield Form("tt", blocks, tuple((j, j + 1) for j in range(len(blocks) - 1)))


def _sekron(dense: Shape) -> Iterator[Form]:
    for blocks in dict.fromkeys((*_orders(dense), *_digits(dense))):
        if len(blocks) == 3:
            yield Form("sekron", blocks, ((0, 1, 2), (1, 2)))


def _tucker(dense: Shape) -> Iterator[Form]:
    """Any axes with a factor of their own: the output channels' first, the input channels' last.

    One axis alone is also a gkpd; of these the one of the input channels is here. A matrix has no other: beside the
    factors of both its axes a core only adds numbers.
    """
    axes = [axis for axis, size in enumerate(dense) if size > 1]
    for count in range(len(axes) if len(axes) > 2 else 1, 0, -1):
        for own in itertools.combinations(axes, count) if count > 1 else [(1,)]:
            first = [axis for axis in own if axis == 0]
            last = [axis for axis in own if axis > 1] + [axis for axis in own if axis == 1]
            core = tuple(1 if axis in own else size for axis, size in enumerate(dense))
            blocks = (*(_only(dense, a) for a in first), core, *(_only(dense, a) for a in last))
            middle = len(first)
            yield Form("tucker", blocks, tuple(tuple(sorted((k, middle))) for k in range(len(blocks)) if k != middle))


def _by_axis(dense: Shape) -> list[tuple[Shape, ...]]:
    """A factor an axis, the output channels first and the input channels last; also all spatial axes as one."""
    spatial = [axis for axis in range(2, len(dense)) if dense[axis] > 1]
    ends = [[_only(dense, axis)] if dense[axis] > 1 else [] for axis in (0, 1)]
    apart = (*ends[0], *(_only(dense, axis) for axis in spatial), *ends[1])
    found = [apart]
    if len(spatial) > 1:
        found.append((*ends[0], (1, 1, *dense[2:]), *ends[1]))
    return [blocks for blocks in found if len(blocks) > 1]


def _orders(dense: Shape) -> Iterator[tuple[Shape, ...]]:
    """The axes in every order that a chain may take them in, spatial axes together or apart."""
    for blocks in _by_axis(dense):
        yield from itertools.permutations(blocks)


def _digits(dense: Shape) -> Iterator[tuple[Shape, ...]]:
    """Both channel axes cut into three digits, the taps with the last: the most even cuts."""
    triples = [sorted(_triples(size), key=lambda t: (max(t), t)) for size in dense[:2]]
    found = sorted(itertools.product(*triples), key=lambda pair: (max(f * c for f, c in zip(*pair, strict=True)), pair))
    ones = (1,) * (len(dense) - 2)
    for outputs, inputs in found[:_SPLITS]:
        blocks = tuple(
            (f, c, *(dense[2:] if k == 2 else ones)) for k, (f, c) in enumerate(zip(outputs, inputs, strict=True))
        )
        if all(math.prod(block) > 1 for block in blocks):
            yield blocks


def _states(dense: Shape) -> Iterator[tuple[Shape, ...]]:
    """The outputs cut into two digits, then the inputs: a low-rank product whose sides are trains (matrix product
    states), beside `_digits`, which are operators.
    """
    if math.prod(dense[2:]) > 1:
        return
    pairs = [sorted(((d, size // d) for d in _divisors(size)), key=lambda p: (max(p), p))[:2] for size in dense[:2]]
    ones = (1,) * (len(dense) - 2)
    for (f, g), (c, d) in itertools.product(*pairs):
        if min(f, g, c, d) > 1:
            yield ((f, 1, *ones), (g, 1, *ones), (1, c, *ones), (1, d, *ones))


def _triples(size: int) -> Iterator[tuple[int, int, int]]:
    for first in _divisors(size):
        for second in _divisors(size // first):
            yield first, second, size // first // second


def _divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def _only(dense: Shape, axis: int) -> Shape:
    return tuple(size if a == axis else 1 for a, size in enumerate(dense))


_FORMS = {"gkpd": _gkpd, "cp": _cp, "tt": _tt, "tucker": _tucker, "sekron": _sekron}
