"""Chains of Kronecker factors as pure shapes and arrays: what each stage sums over, its work, the dense weight.

A factor k of S has the shape [R_1|1, .., R_m|1, F_k, C_k, K_k1, .., K_kn]: m rank axes, an output and an input
channel axis, n spatial axes (none for a linear layer). Factor 1 is the slow one of the product,

    W[f, c, t] = Σ_r Π_k A⁽ᵏ⁾[r, f_k, c_k, t_k],    f = (f_1·F_2 + f_2)·F_3 + f_3 .., c and t likewise,

and the stages run from factor S to factor 1.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mc_opt.ir.op import Work


@dataclass(frozen=True)
class Stage:
    """What the stage of one factor does with the rank indices; a tuple lists rank axes.

    Attributes:
        factor: the factor's number, from 1.
        grouped: came from an earlier stage and is needed by a later one: each has its own slice of the factor.
        summed: came from an earlier stage and ends here.
        made: begins here, as output channels.
        passed: the factor does not carry it, a later one needs it.
    """

    factor: int
    grouped: tuple[int, ...]
    summed: tuple[int, ...]
    made: tuple[int, ...]
    passed: tuple[int, ...]


@dataclass(frozen=True)
class Chain:
    """The shapes of all factors; `ranks` is the number m of leading rank axes."""

    shapes: tuple[tuple[int, ...], ...]
    ranks: int

    @property
    def spatial(self) -> int:
        """The number n of spatial axes; 0 for a linear layer."""
        return len(self.shapes[0]) - self.ranks - 2

    def rank(self, axis: int) -> int:
        """The extent of a rank axis."""
        return max(shape[axis] for shape in self.shapes)

    def outputs(self, factor: int) -> int:
        """F_k."""
        return self.shapes[factor - 1][self.ranks]

    def inputs(self, factor: int) -> int:
        """C_k."""
        return self.shapes[factor - 1][self.ranks + 1]

    def kernel(self, factor: int) -> tuple[int, ...]:
        """K_k, an extent a spatial axis."""
        return self.shapes[factor - 1][self.ranks + 2 :]

    def carried(self, factor: int) -> tuple[int, ...]:
        """The rank axes that are longer than 1 in a factor."""
        return tuple(axis for axis in range(self.ranks) if self.shapes[factor - 1][axis] > 1)

    def dense(self) -> tuple[int, ...]:
        """The shape of the dense weight: [F, C, K_1, .., K_n]."""
        columns = zip(*(shape[self.ranks :] for shape in self.shapes), strict=True)
        return tuple(math.prod(column) for column in columns)

    def owners(self, axis: int) -> tuple[int, ...]:
        """The factors with more than one tap along a spatial axis, in the order in which they run."""
        return tuple(k for k in range(len(self.shapes), 0, -1) if self.kernel(k)[axis] > 1)

    def stages(self, *, reverse: bool = False) -> tuple[Stage, ...]:
        """The stages as they run: from factor S to 1, or from 1 to S."""
        order = list(range(1, len(self.shapes) + 1))
        if not reverse:
            order.reverse()
        when = {k: i for i, k in enumerate(order)}
        carriers = {r: [when[k] for k in order if r in self.carried(k)] for r in range(self.ranks)}
        carriers = {r: times for r, times in carriers.items() if times}
        # What is needed longest stands outermost, so that the next sum finds its ranks side by side.
        axes = sorted(carriers, key=lambda r: (-max(carriers[r]), r))
        made = []
        for k in order:
            now, mine = when[k], self.carried(k)
            live = [r for r in axes if min(carriers[r]) < now <= max(carriers[r])]
            ends = [r for r in live if max(carriers[r]) == now]
            made.append(
                Stage(
                    factor=k,
                    grouped=tuple(r for r in live if r in mine and r not in ends),
                    summed=tuple(ends),
                    made=tuple(r for r in axes if min(carriers[r]) == now),
                    passed=tuple(r for r in live if r not in mine),
                )
            )
        return tuple(made)

    def multiplications(self, *, reverse: bool = False) -> list[int]:
        """Multiplications of each stage as it runs, for one position and one dense group."""
        count = len(self.shapes)
        result = []
        for stage in self.stages(reverse=reverse):
            k = stage.factor
            live = (*stage.grouped, *stage.summed, *stage.made, *stage.passed)
            before, after = range(1, k), range(k + 1, count + 1)
            kept, done = (after, before) if reverse else (before, after)
            result.append(
                math.prod(self.rank(r) for r in live)
                * math.prod(self.inputs(j) for j in kept)
                * math.prod(self.outputs(j) for j in done)
                * self.outputs(k)
                * self.inputs(k)
                * math.prod(self.kernel(k))
            )
        return result

    def runs_reversed(self) -> bool:
        """Whether a linear layer of two factors needs fewer multiplications when factor 1 runs first."""
        if self.spatial or len(self.shapes) != 2:
            return False
        return sum(self.multiplications(reverse=True)) < sum(self.multiplications())


def kron_weight(factors: Sequence[np.ndarray], ranks: int) -> np.ndarray:
    """The dense weight of Kronecker factors, summed in float64 and returned in their own type.

    factors: S arrays [R_1|1, .., R_m|1, F_k, C_k, K_k1, ..] (linear: [.., m_k, n_k]), factor 1 the slow one.

    Args:
        factors: the factors.
        ranks: the number m of leading rank axes.

    Returns:
        [Π F_k, Π C_k, Π K_k1, ..].
    """
    chain = Chain(tuple(f.shape for f in factors), ranks)
    letters = string.ascii_lowercase
    weight, live = factors[-1].astype(np.float64), chain.carried(len(factors))
    weight = weight.reshape([*(chain.rank(r) for r in live), *chain.shapes[-1][ranks:]])
    axes = weight.ndim - len(live)
    slow, fast = letters[ranks : ranks + axes], letters[ranks + axes : ranks + 2 * axes]
    for k in range(len(factors) - 1, 0, -1):
        mine = chain.carried(k)
        later = {r for j in range(1, k) for r in chain.carried(j)}
        left = factors[k - 1].astype(np.float64)
        left = left.reshape([*(chain.rank(r) for r in mine), *chain.shapes[k - 1][ranks:]])
        kept = tuple(r for r in range(ranks) if r in {*mine, *live} and r in later)
        names = ["".join(letters[r] for r in group) for group in (mine, live, kept)]
        pairs = "".join(a + b for a, b in zip(slow, fast, strict=True))
        product = np.einsum(f"{names[0]}{slow},{names[1]}{fast}->{names[2]}{pairs}", left, weight, optimize=True)
        sizes = zip(left.shape[len(mine) :], weight.shape[len(live) :], strict=True)
        weight, live = product.reshape([*(chain.rank(r) for r in kept), *(a * b for a, b in sizes)]), kept
    dense: np.ndarray = weight.astype(factors[0].dtype)
    return dense


def factored_work(
    shapes: Sequence[tuple[int, ...]],
    ranks: int,
    *,
    outputs: int,
    inputs: int | None = None,
    group: int = 1,
    itemsize: int = 4,
) -> Work:
    """The work of a chain of factors, before there is a node.

    Args:
        shapes: the factors' shapes, factor 1 first.
        ranks: the number m of leading rank axes.
        outputs: positions at which the last stage runs: batch x output pixels; of a linear layer its rows.
        inputs: positions at which the first stage runs: batch x input pixels; `outputs` when left out.
        group: groups of the dense convolution.
        itemsize: bytes of an element.
    """
    total = sum(stage_multiplications(shapes, ranks, outputs=outputs, inputs=inputs, group=group))
    stored = sum(math.prod(shape) for shape in shapes) * itemsize
    return Work(mul=total, add=total, bytes=stored)


def stage_multiplications(
    shapes: Sequence[tuple[int, ...]], ranks: int, *, outputs: int, inputs: int | None = None, group: int = 1
) -> tuple[int, ...]:
    """Multiplications of the stage of each factor, factor 1 first; the arguments are those of `factored_work`."""
    chain = Chain(tuple(tuple(shape) for shape in shapes), ranks)
    reverse = chain.runs_reversed()
    counts = chain.multiplications(reverse=reverse)
    places = stage_positions(chain, outputs, outputs if inputs is None else inputs)
    # F_1 spans the groups, of which each output channel sees one.
    totals = tuple(
        count * place * (group if k > 1 else 1)
        for k, count, place in zip(range(len(counts), 0, -1), counts, places, strict=True)
    )
    return totals if reverse else totals[::-1]


def stage_positions(chain: Chain, outputs: int, inputs: int) -> list[int]:
    """Positions at which each stage runs, as they run: an axis is strided by the last stage that has taps on it."""
    strided = [min(owners) for axis in range(chain.spatial) if (owners := chain.owners(axis))]
    if not strided:  # the first stage strides
        return [outputs] * len(chain.shapes)
    result = []
    for k in range(len(chain.shapes), 0, -1):
        done = sum(home >= k for home in strided) / len(strided)
        result.append(round(inputs ** (1 - done) * outputs**done))
    return result


def dense_work(shape: Sequence[int], *, outputs: int, itemsize: int = 4) -> Work:
    """The work of a Conv or a matrix product with a dense weight.

    Args:
        shape: the weight's: [F, C / group, K_1, ..] of a Conv, both dimensions of a matrix.
        outputs: output positions: batch x output pixels; of a matrix product its rows.
        itemsize: bytes of an element.
    """
    count = math.prod(shape)
    return Work(mul=count * outputs, add=count * outputs, bytes=count * itemsize)
