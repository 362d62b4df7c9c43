"""The predicted time of a layer, dense or as a chain of Kronecker factors, before there is a kernel of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mc_opt import ir
from mc_opt.targets import _row_blocks
from mc_opt.targets._base import Price
from mc_opt.targets._row_blocks import Part

# A byte that is moved into another order takes as long as so many that only pass from one kernel to the next.
_MOVES = 2
# One vector of outputs reads a number of the input for each multiply-add, where two fit in the time of 1.6 reads: the
# rule of `kernels/_tile.py`.
_ALONE = 1.6
# A multiply-add of a depthwise stage, whose inputs serve one output channel each, takes as long as so many of a
# register tile's: 0.03 nanoseconds beside 0.011, measured on 56 x 56 positions of 134 channels.
_DEPTHWISE = 2.7
# One of fewer taps takes as long as one of so many: what it reads and writes bounds it (28 x 28 positions of 278
# channels: 92 microseconds with 3 x 1 taps, 99 with 3 x 3).
_TAPS = 9


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
    over, where that is cheaper than short vectors; and what a call of a kernel costs beside them. Stages that run as
    one kernel (`_row_blocks`; positions of an image taken to be as wide as high) hand nothing on. Padding, tails of
    tiles and other misses of a cache are not modelled.

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
    places = [outputs if inputs is None else inputs]
    places += ir.stage_positions(chain, outputs, places[0])
    taken = [
        _stage_time(chain, stage, place, before=before, group=group, reverse=reverse, itemsize=itemsize, price=price)
        for stage, before, place in zip(chain.stages(reverse=reverse), places, places[1:], strict=False)
    ]
    return sum(stage.sums + stage.handed + stage.rest for stage in taken) - _saved(taken, price)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What a stage takes.

    Attributes:
        sums: nanoseconds of its multiply-adds.
        handed: of what it writes for the next kernel to read.
        rest: of weights, channels that move and the call.
        part: what decides whether it runs in one kernel with others; None where its channels are not one axis.
        follows: whether it can run in the kernel of the stage before it.
    """

    sums: float
    handed: float
    rest: float
    part: Part | None
    follows: bool


def _saved(stages: Sequence[_Taken], price: Price) -> float:
    """Nanoseconds that stages save by running as one kernel."""
    total, run = 0.0, list[_Taken]()
    for stage in [*stages, None]:
        if stage is not None and stage.part is not None and (stage.follows or not run):
            run.append(stage)
            continue
        parts = [taken.part for taken in run if taken.part is not None]
        for joined in _row_blocks.joined(parts, cache=price.cache, lanes=price.lanes):
            total += sum(taken.handed + price.call for taken in run[joined.first : joined.last - 1])
            total -= joined.nanoseconds
        run = [] if stage is None or stage.part is None else [stage]
    return total


def _stage_time(
    chain: ir.Chain,
    stage: ir.Stage,
    place: int,
    *,
    before: int,
    group: int,
    reverse: bool,
    itemsize: int,
    price: Price,
) -> _Taken:
    k, count = stage.factor, len(chain.shapes)
    earlier, later = range(1, k), range(k + 1, count + 1)
    # Reversed, the outputs made so far stand before what is to be summed, and its rest behind.
    ahead = math.prod(chain.outputs(j) if reverse else chain.inputs(j) for j in earlier)
    behind = math.prod(chain.inputs(j) if reverse else chain.outputs(j) for j in later)
    passed = math.prod(chain.rank(r) for r in stage.passed)
    groups = math.prod(chain.rank(r) for r in stage.grouped)
    made = chain.outputs(k) * math.prod(chain.rank(r) for r in stage.made)
    depth = chain.inputs(k) * math.prod(chain.kernel(k)) * math.prod(chain.rank(r) for r in stage.summed)
    if k == 1:  # the factor's outputs are those of all groups
        made //= group
    channels = groups * group
    rows = place * ahead * passed * channels
    moved = 0
    taps = math.prod(chain.kernel(k))
    is_depthwise = channels > 1 and made == behind == 1 and depth == taps
    if is_depthwise:  # groups in vectors
        steps = _DEPTHWISE * rows // channels * -(-channels // price.lanes) * price.lanes * max(taps, _TAPS)
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
    weights = math.prod(chain.shapes[k - 1]) * itemsize
    sums = steps * (price.mul + price.add)
    part = None
    if not chain.spatial and groups == ahead == passed == behind == 1:
        part = Part(place, 1, made, 1, 1, 0, weights, rows * made * depth, channelwise=False, itemsize=itemsize)
    if chain.spatial == 2 and ahead == passed == behind == 1:
        side, span = max(math.isqrt(place), 1), chain.kernel(k)[0]
        stride = max(round(math.sqrt(before / place)), 1)
        work = rows * made * depth
        part = Part(side, side, channels * made, span, stride, span // 2, weights, work, is_depthwise, itemsize)
    return _Taken(
        sums,
        handed=rows * made * behind * itemsize * price.traffic,
        rest=moved * _MOVES * price.traffic + weights * price.bytes + price.call,
        part=part,
        follows=part is not None and (part.stride <= part.span if is_depthwise else taps == part.stride == 1),
    )


def _filled(count: int, lanes: int) -> float:
    """Numbers that stand in vectors, filled up; a vector shorter than the register takes as long."""
    vectors = -(-count // lanes)
    return lanes * max(vectors, _ALONE if lanes > 1 else 1.0)
