"""Which kernels in a row run as one, a block of rows at a time, by the time that this is predicted to save.

They are convolutions and products; the rows of a product are rows of one position each.

Apart, each writes all that it makes and the next one reads it: as far as the second-level cache does not hold that, it
comes from further away. Joined, a few rows of it stay in the cache, and weights are read again for each block. Both are
small beside the sums where images are small or channels many: then kernels stay apart, as they do where weights and
rows do not fit in the cache together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from mc_opt.targets.kernels import _split

# Nanoseconds to write and read a byte beyond the second-level cache, and to read one from it while sums are made,
# beside the sums of `_split`: from what joined layers of benchmarks/kron_speed.py and MobileNetV2 gained on an Intel
# Xeon (sapphirerapids). They decide for other processors too, whose sums and caches are slower alike.
_FAR, _NEAR = 0.03, 0.002
# The share of the cache that rows and weights may take; the input and the output pass through the rest.
_ROOM = 0.75
# The share of the time that must be saved: estimates are no better.
_WORTH = 0.04


@dataclasses.dataclass(frozen=True)
class Part:
    """A convolution or product as the rule sees it.

    Attributes:
        rows: of what it makes.
        width: positions in a row.
        channels: of a position.
        span: rows of its input that one row of results looks at.
        stride: rows of its input between two rows of results.
        above: rows of zeros above its input.
        weights: bytes.
        steps: multiply-adds, of all images.
        channelwise: whether each channel reads its own alone.
        itemsize: bytes of a number.
        images: how many have so many rows; one is finished before the next one begins.
    """

    rows: int
    width: int
    channels: int
    span: int
    stride: int
    above: int
    weights: int
    steps: int
    channelwise: bool
    itemsize: int
    images: int = 1

    @property
    def nanoseconds(self) -> float:
        """The time of its sums."""
        return self.steps / (_split.TAPS if self.channelwise else _split.SUMS)

    @property
    def slides(self) -> bool:
        """Whether it looks at other rows than its own."""
        return self.span > 1 or self.stride > 1 or self.above > 0

    def reach(self, rows: int) -> int:
        """The rows of its input that so many rows of results look at."""
        return (rows - 1) * self.stride + self.span

    def pitch(self, lanes: int) -> int:
        """Its channels, filled up to whole vectors."""
        return -(-self.channels // lanes) * lanes


@dataclasses.dataclass(frozen=True)
class Joined:
    """Parts from `first` up to `last` as one kernel.

    Attributes:
        first: the first one.
        last: the one behind them.
        high: rows of the last one's results at a time.
        nanoseconds: what it takes beside the sums: weights that are read again, threads with less to do.
    """

    first: int
    last: int
    high: int
    nanoseconds: float


def joined(parts: Sequence[Part], *, cache: int, lanes: int, threads: int = 1) -> list[Joined]:
    """The parts of a row to join, of all ways to cut it that of least time.

    Args:
        parts: kernels of which each reads what the one before it makes, and nobody else does.
        cache: bytes of the second-level cache; 0 where kernels are not joined.
        lanes: numbers in a vector.
        threads: that share the rows.
    """
    best: list[tuple[float, tuple[Joined, ...]]] = [(0.0, ())]
    for last in range(1, len(parts) + 1):
        found = []
        for first in range(last):
            time, chosen = best[first]
            time += _apart(parts[first - 1], cache) if first else 0.0
            if last - first == 1:
                found.append((time, chosen))
                continue
            some = parts[first:last]
            blocks = _blocks(some, cache=cache, lanes=lanes, threads=threads)
            if blocks is not None:
                margin = _WORTH * sum(part.nanoseconds for part in some)
                found.append((time + blocks[0] + margin, (*chosen, Joined(first, last, blocks[1], blocks[0]))))
        best.append(min(found, key=lambda f: f[0]))
    return list(best[-1][1])


def _apart(part: Part, cache: int) -> float:
    """What it costs that a kernel writes a tensor and the next one reads it."""
    size = part.images * part.rows * part.width * part.channels * part.itemsize
    return size * _FAR * min(1.0, size / cache) if cache else 0.0


def _blocks(parts: Sequence[Part], *, cache: int, lanes: int, threads: int) -> tuple[float, int] | None:
    """What joining some parts costs beside their sums, and the best height of a block; None where the cache does
    not hold a block, or rows would be computed twice.
    """
    if any(part.slides for part in parts[2:]):
        return None
    sums = sum(part.nanoseconds for part in parts)
    rows, images, found = parts[-1].rows, parts[-1].images, []
    for high in (h for h in range(1, rows) if rows % h == 0):
        if sum(part.weights for part in parts) + held(parts, high, lanes) > _ROOM * cache:
            break
        count = rows // high
        longest = -(-count // threads) * threads / count if images % threads else 1.0
        found.append((_again(parts, high) * _NEAR + sums * (longest - 1), high))
    return min(found, default=None)


def held(parts: Sequence[Part], high: int, lanes: int) -> int:
    """Bytes of the rows between some parts."""
    return sum(
        (after.reach(high) if after.slides else high) * before.width * before.pitch(lanes) * before.itemsize
        for before, after in itertools.pairwise(parts)
    )


def _again(parts: Sequence[Part], high: int) -> int:
    """Bytes of weights that are read once more: each block reads them, the first part's for every row at a border."""
    images, second = parts[-1].images, parts[1]
    blocks = passes = parts[-1].rows // high
    if second.slides:
        new = high * second.stride
        passes = max(blocks - 2, 0) + min(blocks, 2) * new + second.span - second.stride
    later = sum(part.weights for part in parts[1:])
    return (images * passes - 1) * parts[0].weights + (images * blocks - 1) * later
