"""The predicted time of a layer, dense or as a chain of Kronecker factors, before there is a kernel of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mc_opt import ir
from mc_opt.targets._base import Price

# A byte that is moved into another order takes as long as so many that only pass from one kernel to the next.
_MOVES = 2
# One vector of outputs reads a number of the input for each multiply-add, where two fit in the time of 1.6 reads: the
# rule of `kernels/_tile.py`.
_ALONE = 1.6
# A multiply-add of a depthwise stage, whose inputs serve one output channel each, takes as long as so many of a
# register tile's: 0.03 nanoseconds beside 0.011, measured on 56 x 56 positions of 134 channels.
_DEPTHWISE = 2.7


def predicted_time(
    shapes: Sequence[Sequence[int]],
    ranks: int = 0,
    *,
    outputs: int,
    inputs: int | None = None,
    group: int = 1,
    itemsize: int = 4,
    price: Price,
) -> float:
    """Nanoseconds that our kernels take for one layer on one core.

    Of every stage of a chain (a dense layer is a chain of one factor): its multiply-adds, where the dimension that
    stands in vectors is rounded up to whole vectors, and one vector alone waits for what it reads; its weights, read
    once; what it writes for the next kernel to read; what it costs to transpose channels behind those that it sums
    over, where that is cheaper than short vectors; and what a call of a kernel costs beside them. Padding, tails of
    tiles and misses of a cache are not modelled.

    Args:
        shapes: the factors' shapes, factor 1 first; of a dense layer [its weight's], [F, C / group, K_1, ..].
        ranks: the number of leading rank axes.
        outputs: output positions: batch x output pixels; of a linear layer its rows.
        inputs: input positions; `outputs` when left out.
        group: groups of the dense convolution.
        itemsize: bytes of an element.
        price: of the target.
    """
    chain = ir.Chain(tuple(tuple(shape) for shape in shapes), ranks)
    reverse = chain.runs_reversed()
    places = ir.stage_positions(chain, outputs, outputs if inputs is None else inputs)
    total = 0.0
    for stage, place in zip(chain.stages(reverse=reverse), places, strict=True):
        total += _stage_time(chain, stage, place, group=group, reverse=reverse, itemsize=itemsize, price=price)
    return total


def _stage_time(
    chain: ir.Chain, stage: ir.Stage, place: int, *, group: int, reverse: bool, itemsize: int, price: Price
) -> float:
    k, count = stage.factor, len(chain.shapes)
    earlier, later = range(1, k), range(k + 1, count + 1)
    # Reversed, the outputs made so far stand before what is to be summed, and its rest behind.
    before = math.prod(chain.outputs(j) if reverse else chain.inputs(j) for j in earlier)
    behind = math.prod(chain.inputs(j) if reverse else chain.outputs(j) for j in later)
    passed = math.prod(chain.rank(r) for r in stage.passed)
    groups = math.prod(chain.rank(r) for r in stage.grouped)
    made = chain.outputs(k) * math.prod(chain.rank(r) for r in stage.made)
    depth = chain.inputs(k) * math.prod(chain.kernel(k)) * math.prod(chain.rank(r) for r in stage.summed)
    if k == 1:  # the factor's outputs are those of all groups
        made //= group
    channels = groups * group
    rows = place * before * passed * channels
    moved = 0
    if channels > 1 and made == behind == 1 and depth == math.prod(chain.kernel(k)):  # depthwise: groups in vectors
        steps = _DEPTHWISE * rows // channels * -(-channels // price.lanes) * price.lanes * depth
    elif channels == 1 < behind < price.lanes and price.lanes % behind == 0:  # these vectors hold several outputs each
        steps = rows * _filled(made * behind, price.lanes) * depth
    else:
        # Vectors along what the stage makes; or, with channels behind, along these if no transposition is cheaper.
        steps = rows * behind * depth * _filled(made, price.lanes)
        if behind > 1:
            moved = rows * behind * (depth + made) * itemsize
            left = rows * depth * made * behind * price.lanes // math.gcd(behind, price.lanes)
            if left * (price.mul + price.add) <= steps * (price.mul + price.add) + moved * _MOVES * price.traffic:
                steps, moved = left, 0
    written = rows * made * behind * itemsize + moved * _MOVES
    weights = math.prod(chain.shapes[k - 1]) * itemsize
    return steps * (price.mul + price.add) + weights * price.bytes + written * price.traffic + price.call


def _filled(count: int, lanes: int) -> float:
    """Numbers that stand in vectors, filled up; a vector shorter than the register takes as long."""
    vectors = -(-count // lanes)
    return lanes * max(vectors, _ALONE if lanes > 1 else 1.0)
